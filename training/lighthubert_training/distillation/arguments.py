"""Options of a distillation: the models and their training (`DistillationArguments`), and what the student predicts
(`ObjectiveArguments`). Where the speech comes from is in `DataArguments`.

Sources are section 2 of the LightHuBERT paper (arXiv 2203.15610) and what its authors answered in issues 4 and 6 of
their repository; what neither says is marked as our choice. The options cover what related methods do as well:

| method | target | layers | normalisation | loss |
|---|---|---|---|---|
| LightHuBERT | feed_forward | mean of the last 8 | instance (as data2vec; not published) | L1, masked frames |
| DistilHuBERT, arXiv 2110.01900 | hidden_states | 4, 8, 12, a head each | none | L1 + cosine, all frames |
| DPHuBERT, arXiv 2305.17651 | hidden_states | 0, 4, 8, 12, a head each | none | L1 + cosine, all frames |
| STaRHuBERT, arXiv 2312.09040 | temporal relation of every layer | all | frames of length 1 (our choice) | squared |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lighthubert_training.runs.distributed import DEVICE_HELP
from lighthubert_training.runs.options import option
from lighthubert_training.sampling import SAMPLING_STRATEGIES
from modeling_lighthubert.errors import UserError


@dataclass
class DistillationArguments:
    """Teacher, student and training. Defaults are the paper's where it gives them."""

    teacher_name_or_path: str = option(help="HuBERT-like model to distil.")
    output_dir: str = option("", "Folder for the trained student. Required, but with --estimate.")
    teacher_dtype: str = option(
        "auto",
        "Precision of the teacher; auto: its weights', which is slow on a CPU if it is half.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    student_name_or_path: str | None = option(
        None, "Initial weights of the student: a checkpoint, or 'random'. Default: the teacher's weights."
    )
    search_space: str | None = option(
        None, "Search space: small, base, or a JSON file. Default: that of the initial weights, or none: one model."
    )
    subnet: str | None = option(
        None,
        "Subnet of the supernet that is the initial student, a name or a JSON file: it is cut out first, and distilled"
        " as one model.",
    )
    sampling: str = option(
        "uniform",
        "Subnets of a step: largest (stage 1), uniform (stage 2), uniform_size (by size), sandwich (with both ends).",
        choices=SAMPLING_STRATEGIES,
    )
    num_random_subnets: int = option(1, "Number of random subnets in each step.")
    subnet_per_process: bool = option(False, "Each process draws subnets of its own. Default: all train the same.")
    feat_extract_norm: str | None = option(
        None,
        "Norm of the student's convolutions: layer (as published: outputs do not depend on padding) or"
        " group. Default: that of the initial weights. Weights that do not fit are drawn anew, and reported.",
        choices=("layer", "group"),
    )
    freeze_feature_encoder: bool = option(False, "Train everything but the convolutions.")
    share_feature_encoder: bool = option(
        False, "Freeze the convolutions, the teacher's, and compute them once for both, on audio for the teacher."
    )
    teacher_cache_dir: str | None = option(
        None,
        "Folder that keeps the teacher's outputs, in half precision, for runs of several epochs, or several runs on"
        " the same data. Default: the teacher runs in every step.",
    )
    max_steps: int = option(1000, "Number of optimiser steps.")
    per_device_train_batch_size: int = option(8, "Number of recordings in a batch, on each process.")
    per_device_train_batch_seconds: float | None = option(None, "Most seconds of audio in a padded batch.")
    gradient_accumulation_steps: int = option(1, "Number of batches in each step, on each process.")
    crop_seconds: float = option(20.0, "Length to which longer recordings are cropped at random, in seconds.")
    learning_rate: float = option(5e-4, "Peak learning rate.")
    feature_encoder_learning_rate: float | None = option(None, "Peak rate of the convolutions. Default: as above.")
    weight_decay: float = option(0.01, "Weight decay of AdamW.")
    adam_beta2: float = option(0.98, "Decay of AdamW's mean of squared gradients.")
    adam_epsilon: float = option(1e-6, "What AdamW adds to the root of that mean.")
    warmup_ratio: float = option(0.08, "Fraction of the steps in which the learning rate rises; then it falls.")
    lr_scheduler_type: str = option("linear", "Shape of the fall of the learning rate.", choices=("linear", "cosine"))
    max_grad_norm: float = option(10.0, "Norm to which gradients are clipped.")
    dataloader_num_workers: int = option(1, "Number of processes that decode audio.")
    mixed_precision: str = option("no", "Precision in which the student runs.", choices=("no", "bf16", "fp16"))
    torch_compile: bool = option(False, "Compile the layers of student and teacher. Pays in long runs on a GPU.")
    eval_steps: int | None = option(None, "Steps between evaluations on held-out speech. Default: only at the end.")
    num_eval_subnets: int = option(2, "Number of random subnets to evaluate beside the named ones, always the same.")
    logging_steps: int = option(10, "Steps between entries of the log, which are averages.")
    report_to: str = option("tensorboard", "Tracker of the log beside history.json.", choices=("tensorboard", "none"))
    save_steps: int = option(500, "Steps between checkpoints.")
    save_total_limit: int = option(2, "Number of checkpoints that are kept, the newest; the best is kept besides.")
    resume_from_checkpoint: str | None = option(
        None, "Checkpoint to go on from: a folder, or 'latest', the newest in output_dir, if any."
    )
    estimate: bool = option(False, "Print what memory and how many hours of GPUs the run will take, and end.")
    push_to_hub: bool = option(False, "Upload the trained student to the Hub.")
    hub_model_id: str | None = option(None, "Repository to upload to. Default: the name of output_dir.")
    seed: int = option(0, "Random seed.")
    device: str | None = option(None, DEVICE_HELP)

    def __post_init__(self) -> None:
        if not (self.output_dir or self.estimate):
            raise ValueError("the following arguments are required: --output_dir")
        counts = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "save_steps")
        for name in (*counts, "logging_steps", "save_total_limit", "eval_steps"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name}={count} has to be at least 1, or left out")
        fixed = self.freeze_feature_encoder or self.share_feature_encoder
        if fixed and self.feature_encoder_learning_rate is not None:
            raise ValueError("feature_encoder_learning_rate: the feature encoder is frozen, so leave it out")
        if self.crop_seconds <= 0:
            raise ValueError(f"crop_seconds={self.crop_seconds} has to be above 0")
        if self.subnet is not None and self.search_space is not None:
            raise ValueError(
                f"--subnet {self.subnet} is distilled as one model, which has no search space: leave out"
                f" --search_space {self.search_space}, or set it to none"
            )
        if self.subnet is not None and self.student_name_or_path in (None, "random"):
            raise ValueError(
                f"--subnet {self.subnet} is cut out of a supernet: give its folder or its name on the Hub as"
                " --student_name_or_path"
            )


@dataclass
class ObjectiveArguments:
    """What the student predicts, and how its error is measured. Defaults are the paper's where it gives them."""

    target: str = option(
        "feed_forward",
        "Part of a teacher's layer to predict: feed-forward output, before the residual, or hidden states.",
        choices=("feed_forward", "hidden_states"),
    )
    num_target_layers: int = option(8, "Number of teacher layers, from the top, whose mean is the target.")
    target_layers: list[int] | None = option(
        None, "Teacher layers from 1 (hidden states: from 0, the input), each with its own head, in place of the mean."
    )
    target_norm: str = option(
        "instance",
        "Normalisation of each layer before the mean: over time (instance), over features (layer), none.",
        choices=("instance", "layer", "none"),
    )
    mask_time_prob: float = option(0.65, "Fraction of the student's frames to mask.")
    mask_time_length: int = option(10, "Length of a masked span, in frames.")
    loss_frames: str = option("masked", "Frames that the loss is a mean over.", choices=("masked", "all"))
    prediction_weight: float = option(1.0, "Weight of the loss of the prediction heads. STaRHuBERT has none.")
    cosine_weight: float = option(0.0, "Weight of the cosine loss beside L1.")
    temporal_relation_weight: float = option(0.0, "Weight of the loss between frames' similarities, layer by layer.")

    def __post_init__(self) -> None:
        first = 0 if self.target == "hidden_states" else 1
        if self.target_layers is not None and (not self.target_layers or min(self.target_layers) < first):
            raise ValueError(f"target_layers={self.target_layers}: {self.target} are counted from {first}")
        if not 0.0 <= self.mask_time_prob <= 1.0:
            raise ValueError(f"mask_time_prob={self.mask_time_prob} has to be between 0 and 1")
        if self.loss_frames == "masked" and self.mask_time_prob == 0.0:
            raise ValueError("no frame would count: loss_frames='masked' needs mask_time_prob above 0")
        if self.prediction_weight == 0.0 and self.temporal_relation_weight == 0.0:
            raise ValueError("nothing would be learnt: prediction_weight and temporal_relation_weight are both 0")

    @property
    def num_prediction_heads(self) -> int:
        return 1 if self.target_layers is None else len(self.target_layers)


FREE_TO_CHANGE = {
    "output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "dataloader_num_workers", "device",
    "validation_file", "eval_split_name", "max_eval_samples", "eval_steps", "num_eval_subnets", "logging_steps",
    "report_to", "estimate", "push_to_hub", "hub_model_id", "max_unreadable_share", "preprocessing_num_workers",
}  # fmt: skip
"""Options that do not change what a run computes."""


def check_same_recipe(recipe: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
    """Raises a `UserError` that names the options with which a resumed run would not compute what it began with."""
    changed = [
        f"{name} was {earlier.get(name)!r} and is {value!r}"
        for name, value in recipe.items()
        if name not in FREE_TO_CHANGE and value != earlier.get(name)
    ]
    if changed:
        raise UserError(
            f"the checkpoint was made with other options: {'; '.join(changed)}. Give the same ones, or start anew in"
            " another --output_dir"
        )
