"""Distils a HuBERT into a LightHuBERT supernet, on one process or many.

Stage 1 trains the full-size student, stage 2 its subnets:

    python training/run_distillation.py --config training/configs/stage1.yaml --output_dir stage1
    python training/run_distillation.py --config training/configs/stage2_small.yaml --output_dir supernet \\
        --student_name_or_path stage1

A recipe holds any of the options below; those on the command line have the last word. Two CPU processes:
`python -m torch.distributed.run --standalone --nproc_per_node 2 training/run_distillation.py ...`.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoModel, HfArgumentParser, Wav2Vec2FeatureExtractor, get_scheduler

from modeling_lighthubert import LightHubertConfig, LightHubertForPreTraining, SearchSpace
from modeling_lighthubert.search_space import search_space_from

from distillation import ObjectiveArguments, Teacher, draw_time_mask, evaluate, student_loss
from recipes import parse_recipe, save_recipe
from speech_data import DataArguments, DistillationCollator, SpeechDataset, load_speech
from subnet_sampling import SAMPLING_STRATEGIES, draw_subnets


@dataclass
class DistillationArguments:
    """Teacher, student and recipe. Defaults are the paper's where it gives them."""

    output_dir: str = field(metadata={"help": "Folder for the trained student."})
    teacher_name_or_path: str = field(metadata={"help": "HuBERT-like model to learn from."})
    student_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Where the student starts: a checkpoint (a teacher, or the result of stage 1), or 'random'."
            " Default: the teacher's weights."
        },
    )
    search_space: str | None = field(
        default=None,
        metadata={
            "help": "small, base, or a JSON file with the choices. Default: that of the student, or none: a student"
            " that is one model."
        },
    )
    sampling: str = field(
        default="uniform",
        metadata={
            "help": "Subnets of each step: largest (stage 1), uniform (stage 2), uniform_size (sizes as likely as each"
            " other), or sandwich (smallest, random ones, largest).",
            "choices": SAMPLING_STRATEGIES,
        },
    )
    num_random_subnets: int = field(default=1, metadata={"help": "Random subnets of each step."})
    subnet_per_process: bool = field(
        default=False, metadata={"help": "Each process draws subnets of its own. Default: all train the same."}
    )
    feat_extract_norm: str | None = field(
        default=None,
        metadata={
            "help": "Norm of the student's convolutions: layer (as published: answers do not depend on padding) or"
            " group. Default: as where it starts. What does not carry over starts anew, and is reported.",
            "choices": ("layer", "group"),
        },
    )
    freeze_feature_encoder: bool = field(default=False, metadata={"help": "Keep the convolutions as they start."})
    max_steps: int = field(default=1000, metadata={"help": "Optimiser steps."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Recordings in a batch, on each process."})
    max_seconds: float = field(default=20.0, metadata={"help": "Longer recordings are cropped at random, in seconds."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak of the schedule."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    warmup_ratio: float = field(
        default=0.08, metadata={"help": "Share of the steps that the rate rises; then it falls."}
    )
    max_grad_norm: float = field(default=10.0, metadata={"help": "Gradients are clipped to this norm."})
    dataloader_num_workers: int = field(default=1, metadata={"help": "Processes that decode audio."})
    seed: int = field(default=0, metadata={"help": "Of everything random."})
    cpu: bool = field(default=False, metadata={"help": "Train on the CPU even if there is a GPU."})


def build_teacher(
    arguments: DistillationArguments, objective: ObjectiveArguments
) -> tuple[Teacher, Wav2Vec2FeatureExtractor]:
    """The teacher with its own feature extractor."""
    model = AutoModel.from_pretrained(arguments.teacher_name_or_path)
    return (
        Teacher(model, objective),
        AutoFeatureExtractor.from_pretrained(arguments.teacher_name_or_path),
    )


def build_student(arguments: DistillationArguments, teacher: Teacher) -> LightHubertForPreTraining:
    """The student where it starts, with the search space asked for."""
    space = arguments.search_space
    if space is not None:
        space = SearchSpace.from_json_file(space) if space.endswith(".json") else search_space_from(space)
    options = {
        "teacher_hidden_size": teacher.hidden_size,
        "num_prediction_heads": teacher.objective.num_prediction_heads,
        "layerdrop": 0.0,
        **({} if space is None else {"search_space": space}),
        **({} if arguments.feat_extract_norm is None else {"feat_extract_norm": arguments.feat_extract_norm}),
    }
    if arguments.student_name_or_path == "random":
        config = LightHubertConfig.from_pretrained(arguments.teacher_name_or_path, **options)
        student = LightHubertForPreTraining(config)
    else:
        start = arguments.student_name_or_path or arguments.teacher_name_or_path
        student = LightHubertForPreTraining.from_pretrained(start, **options)
    if student.search_space is not None:
        student.set_subnet("largest")
    if arguments.freeze_feature_encoder:
        student.freeze_feature_encoder()
    return student


def check_frame_rates(student: LightHubertForPreTraining, teacher: Teacher) -> None:
    """Student and teacher have to make the same number of frames of a recording.

    Raises:
        ValueError: they do not.
    """
    seconds = [16_000, 80_000, 123_456]
    ours = [int(student._get_feat_extract_output_lengths(length)) for length in seconds]
    theirs = [int(teacher.model._get_feat_extract_output_lengths(length)) for length in seconds]
    if ours != theirs:
        raise ValueError(
            f"student and teacher make {ours} and {theirs} frames of {seconds} samples: they cannot be compared"
        )


def endless(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """Batches, epoch after epoch."""
    for epoch in itertools.count():
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield from loader


def training_step(
    student: torch.nn.Module,
    teacher: Teacher,
    batch: dict[str, torch.Tensor],
    arguments: DistillationArguments,
    accelerator: Accelerator,
    step: int,
) -> float:
    """Adds up the gradients of the step's subnets, and returns their mean loss."""
    model = accelerator.unwrap_model(student)
    objective = teacher.objective
    answer = teacher(batch["teacher_input_values"], batch["attention_mask"])
    mask = draw_time_mask(model, batch["attention_mask"], objective.mask_time_prob, objective.mask_time_length)
    subnets = draw_subnets(
        model.search_space,
        arguments.sampling,
        arguments.seed,
        step,
        arguments.num_random_subnets,
        accelerator.process_index if arguments.subnet_per_process else None,
    )
    losses = []
    for subnet in subnets:
        if subnet is not None:
            model.set_subnet(subnet)
        loss = student_loss(student, batch, answer, mask, objective)
        # processes exchange gradients once a step, in the last pass: with unused parameters more would go wrong
        with nullcontext() if subnet is subnets[-1] else accelerator.no_sync(student):
            accelerator.backward(loss / len(subnets))
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)


def train(
    student: torch.nn.Module,
    teacher: Teacher,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    arguments: DistillationArguments,
    accelerator: Accelerator,
) -> None:
    """`max_steps` optimiser steps, with a progress bar of loss and seconds of audio per second."""
    student.train()
    bar = tqdm(total=arguments.max_steps, desc="distilling", disable=not accelerator.is_main_process, file=sys.stdout)
    seconds, start = 0.0, time.perf_counter()
    for step, batch in zip(range(arguments.max_steps), endless(loader)):
        loss = training_step(student, teacher, batch, arguments, accelerator, step)
        accelerator.clip_grad_norm_(student.parameters(), arguments.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seconds += float(batch["attention_mask"].sum()) / 16_000 * accelerator.num_processes
        rate = seconds / (time.perf_counter() - start)
        bar.set_postfix(loss=f"{loss:.4f}", audio_per_second=f"{rate:.0f}", refresh=False)
        bar.update()
    bar.close()


def evaluate_subnets(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    loader: DataLoader,
    device: torch.device,
) -> dict[str, float]:
    """Loss on held-out speech, of every named subnet."""
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in loader]
    if student.search_space is None:
        return {"eval_loss": evaluate(student, teacher, batches)}
    losses = {}
    for name in student.search_space.named:
        with student.using_subnet(name):
            losses[f"eval_loss_{name}"] = evaluate(student, teacher, batches)
    return losses


def build_loader(
    arguments: DistillationArguments, data_arguments: DataArguments, collator: DistillationCollator, training: bool
) -> DataLoader | None:
    """Batches of training or held-out speech; `None` if there is none."""
    dataset = load_speech(data_arguments, training)
    if dataset is None:
        return None
    rate = collator.student_feature_extractor.sampling_rate
    return DataLoader(
        SpeechDataset(dataset, data_arguments.audio_column_name, rate, arguments.max_seconds),
        batch_size=arguments.per_device_train_batch_size,
        shuffle=training,
        collate_fn=collator,
        num_workers=arguments.dataloader_num_workers,
        persistent_workers=arguments.dataloader_num_workers > 0,
    )


def main() -> None:
    parser = HfArgumentParser(
        (DistillationArguments, ObjectiveArguments, DataArguments), description=__doc__.splitlines()[0]
    )
    arguments, objective, data_arguments = recipe = parse_recipe(parser)
    # a subnet leaves weights without gradient: all of a dropped layer, for one
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=arguments.cpu, kwargs_handlers=[unused])
    set_seed(arguments.seed, device_specific=True)

    teacher, teacher_feature_extractor = build_teacher(arguments, objective)
    student = build_student(arguments, teacher)
    check_frame_rates(student, teacher)
    feature_extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    collator = DistillationCollator(
        feature_extractor, teacher_feature_extractor, student.base_model.samples_per_first_frame
    )
    loader = build_loader(arguments, data_arguments, collator, training=True)
    eval_loader = build_loader(arguments, data_arguments, collator, training=False)

    optimizer = torch.optim.AdamW(
        [parameter for parameter in student.parameters() if parameter.requires_grad],
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
    )
    scheduler = get_scheduler(
        "linear", optimizer, int(arguments.warmup_ratio * arguments.max_steps), arguments.max_steps
    )
    teacher.to(accelerator.device)
    # the scheduler is not prepared: it would advance once for every process
    model, loader, optimizer = accelerator.prepare(student, loader, optimizer)
    train(model, teacher, loader, optimizer, scheduler, arguments, accelerator)

    if accelerator.is_main_process:
        save_recipe(recipe, arguments.output_dir)
        if student.search_space is not None:
            student.set_subnet("largest")
        student.save_pretrained(arguments.output_dir)
        feature_extractor.save_pretrained(arguments.output_dir)
        if eval_loader is not None:
            results = evaluate_subnets(student, teacher, eval_loader, accelerator.device)
            (Path(arguments.output_dir) / "eval_results.json").write_text(json.dumps(results, indent=2) + "\n")
            print(" ".join(f"{name}={loss:.4f}" for name, loss in results.items()))
    accelerator.end_training()


if __name__ == "__main__":
    main()
