"""Builds what a distillation trains: the configuration of the student, its initial weights, and its optimiser."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from lighthubert_training.distillation.arguments import DistillationArguments, ObjectiveArguments
from lighthubert_training.distillation.teacher import Teacher, masking_options
from modeling_lighthubert import LightHubertConfig, LightHubertForPreTraining
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.loading import is_supernet, load_config, load_cut_model, load_model, parse_search_space


def build_config(
    arguments: DistillationArguments, objective: ObjectiveArguments, teacher_config: PreTrainedConfig
) -> LightHubertConfig:
    """Configuration of the student, with the search space asked for.

    Raises:
        UserError: no such checkpoint, or a subnet of what is no supernet.
    """
    space, start = parse_search_space(arguments.search_space), arguments.student_name_or_path
    if start in (None, "random"):
        start = arguments.teacher_name_or_path
    options = {
        "teacher_hidden_size": teacher_config.hidden_size,
        "num_prediction_heads": objective.num_prediction_heads,
        "layerdrop": 0.0,
        # the subnet that is selected where the student starts from may not be in another space
        **({} if space is None else {"search_space": space, "subnet": None}),
        **({} if arguments.feat_extract_norm is None else {"feat_extract_norm": arguments.feat_extract_norm}),
    }
    config: Any = load_config(start, LightHubertConfig, **options)
    config.update(masking_options(config))
    if arguments.subnet is not None and not is_supernet(config):
        raise UserError(
            f"--subnet {arguments.subnet}: {start} is no supernet. Leave it out, or give a supernet as"
            " --student_name_or_path"
        )
    return config


def build_student(arguments: DistillationArguments, teacher: Teacher) -> LightHubertForPreTraining:
    """The student with its initial weights: a supernet with the search space asked for and no more width than its
    largest subnet, one model, or the subnet asked for, cut out with its part of the prediction heads.

    Raises:
        UserError: no such checkpoint or subnet, or a subnet of what is no supernet.
    """
    config, start = build_config(arguments, teacher.objective, teacher.model.config), arguments.student_name_or_path
    if start == "random":
        student = LightHubertForPreTraining(config)
    else:
        start = start or arguments.teacher_name_or_path
        load = load_model if arguments.subnet is None else load_cut_model
        student = load(start, arguments.subnet, head=LightHubertForPreTraining, dtype=torch.float32, config=config)
    if student.search_space is not None:
        student = student.trim()  # what no subnet uses would cost memory, and time of the optimiser
        student.set_subnet("largest")
    if arguments.freeze_feature_encoder or arguments.share_feature_encoder:
        student.freeze_feature_encoder()
    return student


def build_optimizer(arguments: DistillationArguments, student: LightHubertForPreTraining) -> torch.optim.Optimizer:
    """AdamW. The convolutions may have a learning rate of their own."""
    trained = [(name, weight) for name, weight in student.named_parameters() if weight.requires_grad]
    convolutions = [weight for name, weight in trained if "feature_extractor." in name]
    others = [weight for name, weight in trained if "feature_extractor." not in name]
    rate = arguments.feature_encoder_learning_rate or arguments.learning_rate
    groups = [{"params": others, "lr": arguments.learning_rate}, {"params": convolutions, "lr": rate}]
    groups = [group for group in groups if group["params"]]
    moments: dict[str, Any] = {"betas": (0.9, arguments.adam_beta2), "eps": arguments.adam_epsilon}
    return torch.optim.AdamW(groups, weight_decay=arguments.weight_decay, **moments, fused=True)
