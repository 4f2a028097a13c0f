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
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoModel, HfArgumentParser, Wav2Vec2FeatureExtractor, get_scheduler

from modeling_lighthubert import LightHubertConfig, LightHubertForPreTraining, SearchSpace
from modeling_lighthubert.search_space import search_space_from

from checkpoints import any_process, load_checkpoint, save_checkpoint
from distillation import ObjectiveArguments, Teacher, evaluate
from distillation_step import training_step
from recipes import parse_recipe, save_recipe
from speech_data import (
    BatchSampler,
    DataArguments,
    DistillationCollator,
    SpeechDataset,
    Unreadable,
    Visits,
    load_speech,
)
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
    per_device_train_batch_seconds: float | None = field(
        default=None, metadata={"help": "No more audio in a batch than this, with its padding, in seconds."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches of each step, on each process."})
    max_unreadable_share: float = field(
        default=0.01,
        metadata={"help": "Recordings that cannot be read are left out; more than this share stop the run."},
    )
    max_seconds: float = field(default=20.0, metadata={"help": "Longer recordings are cropped at random, in seconds."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak of the schedule."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    warmup_ratio: float = field(
        default=0.08, metadata={"help": "Share of the steps that the rate rises; then it falls."}
    )
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "How the rate falls.", "choices": ("linear", "cosine")}
    )
    max_grad_norm: float = field(default=10.0, metadata={"help": "Gradients are clipped to this norm."})
    dataloader_num_workers: int = field(default=1, metadata={"help": "Processes that decode audio."})
    mixed_precision: str = field(
        default="no", metadata={"help": "Precision of the student's passes.", "choices": ("no", "bf16", "fp16")}
    )
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints that stay, the newest."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'latest', the newest whole checkpoint in output_dir, if any; or a folder."}
    )
    seed: int = field(default=0, metadata={"help": "Of everything random."})
    cpu: bool = field(default=False, metadata={"help": "Train on the CPU even if there is a GPU."})

    def __post_init__(self) -> None:
        for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least 1")
        if self.save_total_limit < 1:
            raise ValueError(f"save_total_limit={self.save_total_limit}: at least the newest checkpoint has to stay")


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


def stop_on_sigterm() -> threading.Event:
    """An event that is set when the process is asked to end, as by a scheduler that takes the machine away."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return stop


FREE_TO_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "dataloader_num_workers", "cpu"),
    *("validation_file", "eval_split_name", "max_eval_samples", "max_unreadable_share"),
}
"""Options that do not change what a run computes."""


def check_same_recipe(recipe: dict[str, Any], earlier: dict[str, Any]) -> None:
    """A resumed run computes what it would have without the interruption.

    Raises:
        ValueError: it was started with other options; the message names them.
    """
    changed = [
        f"{name} was {earlier.get(name)!r} and is {value!r}"
        for name, value in recipe.items()
        if name not in FREE_TO_CHANGE and value != earlier.get(name)
    ]
    if changed:
        raise ValueError(
            f"the checkpoint was made with other options: {'; '.join(changed)}. Give the same ones, or start anew in"
            " another --output_dir"
        )


def build_train_loader(
    arguments: DistillationArguments,
    speech: SpeechDataset,
    collator: DistillationCollator,
    accelerator: Accelerator,
    unreadable: Unreadable,
    start: int,
) -> DataLoader:
    """This process's batches from step `start` on, without end: `gradient_accumulation_steps` for each step."""
    rate, seconds = speech.sampling_rate, arguments.per_device_train_batch_seconds
    lengths = speech.lengths()
    for index in (index for index, length in enumerate(lengths) if length == 0):
        unreadable.add(index, "no header of audio, or no samples")
    accumulated = arguments.gradient_accumulation_steps
    first = accelerator.process_index * accumulated
    sampler = BatchSampler(
        [min(length, int(arguments.max_seconds * rate)) for length in lengths],
        arguments.per_device_train_batch_size,
        None if seconds is None else int(seconds * rate),
        arguments.seed,
        shares=range(first, first + accumulated),
        num_shares=accelerator.num_processes * accumulated,
        start=start,
    )
    return DataLoader(
        Visits(speech, arguments.max_seconds, arguments.seed),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=arguments.dataloader_num_workers,
    )


def build_eval_batches(
    arguments: DistillationArguments, speech: SpeechDataset, collator: DistillationCollator
) -> DataLoader:
    """Batches of held-out speech, in its order."""
    visits = [(0, index) for index in range(len(speech))]
    size = arguments.per_device_train_batch_size
    return DataLoader(
        Visits(speech, arguments.max_seconds, arguments.seed),
        batch_sampler=[visits[at : at + size] for at in range(0, len(visits), size)],
        collate_fn=collator,
    )


def train(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    arguments: DistillationArguments,
    accelerator: Accelerator,
    unreadable: Unreadable,
    recipe: dict[str, Any],
    start: int,
) -> bool:
    """The steps from `start` to `max_steps`, with a progress bar, and checkpoints.

    Returns:
        Whether all were made. If not, SIGTERM came, and a checkpoint of the last step is there.
    """
    student.train()
    batches, stop, output_dir = iter(loader), stop_on_sigterm(), Path(arguments.output_dir)
    bar = tqdm(
        range(start, arguments.max_steps),
        desc="distilling",
        initial=start,
        total=arguments.max_steps,
        disable=not accelerator.is_main_process,
        file=sys.stdout,
    )
    samples, begin = 0, time.perf_counter()
    for step in bar:
        of_step = itertools.islice(batches, arguments.gradient_accumulation_steps)
        accumulated = [send_to_device(batch, accelerator.device) for batch in of_step]
        for index, reason in (broken for batch in accumulated for broken in batch.pop("unreadable")):
            unreadable.add(index, reason)
        process = accelerator.process_index if arguments.subnet_per_process else None
        subnets = draw_subnets(
            student.search_space, arguments.sampling, arguments.seed, step, arguments.num_random_subnets, process
        )
        # dropout, too, follows from the step
        torch.manual_seed(random.Random(f"{arguments.seed}-{step}-{accelerator.process_index}").getrandbits(63))
        try:
            loss = training_step(student, teacher, accumulated, subnets, accelerator, arguments.seed)
        except FloatingPointError as error:
            visits = torch.cat([batch["visits"] for batch in accumulated]).tolist()
            names = [loader.dataset.speech.name(index) for _, index in visits]
            raise FloatingPointError(
                f"{error} at step {step}, on {', '.join(names)}. The last checkpoint is as it was: lower the learning"
                " rate, or leave these recordings out"
            ) from error
        accelerator.clip_grad_norm_(student.parameters(), arguments.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        samples += accelerator.num_processes * sum(int(batch["attention_mask"].sum()) for batch in accumulated)
        rate = samples / loader.dataset.speech.sampling_rate / (time.perf_counter() - begin)
        bar.set_postfix(loss=f"{loss:.4f}", audio_per_second=f"{rate:.0f}", refresh=False)
        stopping = any_process(accelerator, stop.is_set())
        if (step + 1) % arguments.save_steps == 0 or stopping:
            save_checkpoint(accelerator, output_dir, step + 1, {"recipe": recipe}, arguments.save_total_limit)
        if stopping and step + 1 < arguments.max_steps:
            bar.close()
            accelerator.print(f"stopped after step {step + 1}: go on with --resume_from_checkpoint latest")
            return False
    return True


def evaluate_subnets(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    loader: DataLoader,
    device: torch.device,
) -> dict[str, float]:
    """Loss on held-out speech, of every named subnet."""
    batches = [send_to_device(batch, device) for batch in loader]
    if student.search_space is None:
        return {"eval_loss": evaluate(student, teacher, batches)}
    losses = {}
    for name in student.search_space.named:
        with student.using_subnet(name):
            losses[f"eval_loss_{name}"] = evaluate(student, teacher, batches)
    return losses


def save_student(
    student: LightHubertForPreTraining, feature_extractor: Wav2Vec2FeatureExtractor, output_dir: str
) -> None:
    """The trained model, with its largest subnet selected."""
    if student.search_space is not None:
        student.set_subnet("largest")
    student.save_pretrained(output_dir)
    feature_extractor.save_pretrained(output_dir)


def main() -> None:
    parser = HfArgumentParser(
        (DistillationArguments, ObjectiveArguments, DataArguments), description=__doc__.splitlines()[0]
    )
    arguments, objective, data_arguments = parsed = parse_recipe(parser)
    recipe = {name: value for part in parsed for name, value in asdict(part).items()}
    accelerator = Accelerator(cpu=arguments.cpu, mixed_precision=arguments.mixed_precision)
    set_seed(arguments.seed)

    teacher, teacher_feature_extractor = build_teacher(arguments, objective)
    student = build_student(arguments, teacher)
    check_frame_rates(student, teacher)
    feature_extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    collator = DistillationCollator(
        feature_extractor, teacher_feature_extractor, student.base_model.samples_per_first_frame
    )
    columns = (data_arguments.audio_column_name, feature_extractor.sampling_rate)
    train_data, eval_data = (load_speech(data_arguments, training) for training in (True, False))

    optimizer = torch.optim.AdamW(
        [parameter for parameter in student.parameters() if parameter.requires_grad],
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
    )
    scheduler = get_scheduler(
        arguments.lr_scheduler_type, optimizer, int(arguments.warmup_ratio * arguments.max_steps), arguments.max_steps
    )
    teacher.to(accelerator.device)
    # "evaluation": not wrapped in DistributedDataParallel, see distillation_step
    student = accelerator.prepare_model(student, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(optimizer)
    accelerator.register_for_checkpointing(scheduler)  # not prepared: it would advance once for every process

    start = 0
    if arguments.resume_from_checkpoint is not None:
        state = load_checkpoint(accelerator, arguments.resume_from_checkpoint, Path(arguments.output_dir))
        if state is not None:
            check_same_recipe(recipe, state["recipe"])
            start = state["step"]
    speech = SpeechDataset(train_data, *columns)
    unreadable = Unreadable(speech, arguments.max_unreadable_share)
    loader = build_train_loader(arguments, speech, collator, accelerator, unreadable, start)
    if accelerator.is_main_process:
        save_recipe(recipe, arguments.output_dir)
    finished = train(student, teacher, loader, optimizer, scheduler, arguments, accelerator, unreadable, recipe, start)

    if finished and accelerator.is_main_process:
        save_student(student, feature_extractor, arguments.output_dir)
        if eval_data is not None:
            eval_batches = build_eval_batches(arguments, SpeechDataset(eval_data, *columns), collator)
            results = evaluate_subnets(student, teacher, eval_batches, accelerator.device)
            (Path(arguments.output_dir) / "eval_results.json").write_text(json.dumps(results, indent=2) + "\n")
            print(" ".join(f"{name}={loss:.4f}" for name, loss in results.items()))
    accelerator.end_training()


if __name__ == "__main__":
    main()
