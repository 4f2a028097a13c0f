"""Distils a HuBERT into a LightHuBERT supernet, on one process or many.

Stage 1 trains the full-size student, stage 2 its subnets:

    python training/run_distillation.py --config training/lighthubert_training/configs/distillation/stage1.yaml --output_dir stage1
    python training/run_distillation.py --config training/lighthubert_training/configs/distillation/stage2_small.yaml --output_dir supernet \\
        --student_name_or_path stage1

A recipe holds any of the options below; those on the command line have the last word. Two CPU processes:
`python -m torch.distributed.run --standalone --nproc_per_node 2 training/run_distillation.py ...`.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import AutoFeatureExtractor, AutoModel, HfArgumentParser, Wav2Vec2FeatureExtractor, get_scheduler

from lighthubert_training.data.batches import (
    BatchSampler,
    DistillationCollator,
    RandomAccessSampler,
    StreamSampler,
    Unreadable,
    Visit,
    Visits,
    durations,
    recording_name,
)
from lighthubert_training.data.sources import DataArguments, SpeechDataset, load_speech
from lighthubert_training.distillation.arguments import FREE_TO_CHANGE, DistillationArguments
from lighthubert_training.distillation.loop import Distiller
from lighthubert_training.distillation.teacher import ObjectiveArguments, Teacher
from lighthubert_training.runs.checkpoints import checkpoints, find_checkpoint
from lighthubert_training.runs.hub import push_folder
from lighthubert_training.runs.log import RunLog, plot_losses, write_card
from lighthubert_training.runs.options import parse_recipe, save_recipe
from modeling_lighthubert import LightHubertConfig, LightHubertForPreTraining, SearchSpace
from modeling_lighthubert.search_space import search_space_from


def build_teacher(
    arguments: DistillationArguments, objective: ObjectiveArguments
) -> tuple[Teacher, Wav2Vec2FeatureExtractor]:
    """The teacher with its own feature extractor."""
    model = AutoModel.from_pretrained(arguments.teacher_name_or_path, dtype=arguments.teacher_dtype)
    extractor = AutoFeatureExtractor.from_pretrained(arguments.teacher_name_or_path)
    return Teacher(model, objective), extractor


def build_student(arguments: DistillationArguments, teacher: Teacher) -> LightHubertForPreTraining:
    """The student where it starts, with the search space asked for, and no more width than its largest subnet."""
    space = arguments.search_space
    if space is not None:
        space = SearchSpace.from_json_file(space) if space.endswith(".json") else search_space_from(space)
    options = {
        "teacher_hidden_size": teacher.hidden_size,
        "num_prediction_heads": teacher.objective.num_prediction_heads,
        "layerdrop": 0.0,
        # the subnet that is selected where the student starts from may not be in another space
        **({} if space is None else {"search_space": space, "subnet": None}),
        **({} if arguments.feat_extract_norm is None else {"feat_extract_norm": arguments.feat_extract_norm}),
    }
    if arguments.student_name_or_path == "random":
        config = LightHubertConfig.from_pretrained(arguments.teacher_name_or_path, **options)
        student = LightHubertForPreTraining(config)
    else:
        start = arguments.student_name_or_path or arguments.teacher_name_or_path
        student = LightHubertForPreTraining.from_pretrained(start, dtype=torch.float32, **options)
    if student.search_space is not None:
        student = student.trim()  # what no subnet uses would cost memory, and time of the optimiser
        student.set_subnet("largest")
    if arguments.freeze_feature_encoder or arguments.share_feature_encoder:
        student.freeze_feature_encoder()
    if teacher.objective.target == "feature_encoder":
        if arguments.freeze_feature_encoder or arguments.share_feature_encoder:
            raise ValueError("target feature_encoder: a feature encoder that is frozen or shared has nothing to learn")
        if student.config.hidden_size > teacher.hidden_size:
            raise ValueError(
                f"target feature_encoder: the student is {student.config.hidden_size} wide and the teacher"
                f" {teacher.hidden_size}, so there is not enough to learn from"
            )
    if arguments.progressive_shrinking_ratio and getattr(student.search_space, "conv_dim", None) is None:
        raise ValueError(
            "progressive_shrinking_ratio: all subnets of the student have the same feature encoder, so there is none"
            " to shrink. Leave it out, or give a --search_space with conv_dim"
        )
    return student


def build_optimizer(arguments: DistillationArguments, student: LightHubertForPreTraining) -> torch.optim.Optimizer:
    """AdamW. The convolutions may have a learning rate of their own."""
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    rates = {False: arguments.learning_rate, True: arguments.feature_encoder_learning_rate or arguments.learning_rate}
    groups = [
        {
            "params": [each for name, each in trained.items() if ("feature_extractor." in name) == is_of_ear],
            "lr": rate,
        }
        for is_of_ear, rate in rates.items()
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, weight_decay=arguments.weight_decay, fused=True)


def check_frame_rates(
    student: LightHubertForPreTraining, teacher: Teacher, extractors: tuple[Wav2Vec2FeatureExtractor, ...]
) -> None:
    """Student and teacher have to hear the same audio and make the same number of frames of it.

    Raises:
        ValueError: they do not.
    """
    rates = [extractor.sampling_rate for extractor in extractors]
    if len(set(rates)) > 1:
        raise ValueError(f"student and teacher take audio at {rates} Hz: they cannot be compared")
    samples = [16_000, 80_000, 123_456]
    ours = [int(student._get_feat_extract_output_lengths(length)) for length in samples]
    theirs = [int(teacher.model._get_feat_extract_output_lengths(length)) for length in samples]
    if ours != theirs:
        raise ValueError(
            f"student and teacher make {ours} and {theirs} frames of {samples} samples: they cannot be compared. Start"
            " the student from a model with the convolutions (conv_kernel, conv_stride) of the teacher"
        )


def check_same_feature_encoder(student: LightHubertForPreTraining, teacher: Teacher) -> None:
    """To be computed once for both, the convolutions have to be the same.

    Raises:
        ValueError: they are not.
    """
    if student.search_space is not None and student.search_space.conv_dim is not None:
        raise ValueError(
            "share_feature_encoder: in this search space subnets choose their own part of the feature encoder, so it"
            " cannot be computed once for all"
        )
    ours, theirs = (model.feature_extractor.state_dict() for model in (student.hubert, teacher.model))
    options = ("feat_extract_norm", "feat_extract_activation", "conv_stride")
    differing = [
        option
        for option in options
        if getattr(student.config, option) != getattr(teacher.model.config, option, getattr(student.config, option))
    ]
    if ours.keys() != theirs.keys():
        differing.append("layers")
    elif not all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in ours):
        differing.append("weights")
    if differing:
        raise ValueError(
            f"share_feature_encoder: the feature encoders of student and teacher differ in {', '.join(differing)}."
            " Start the student from the teacher, or use freeze_feature_encoder"
        )


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


def prepare_output(
    arguments: DistillationArguments, recipe: dict[str, Any], accelerator: Accelerator
) -> tuple[Path, dict[str, Any]] | None:
    """Writes the recipe to the output folder, before anything takes long.

    Returns:
        The checkpoint to go on from and its state, if any.

    Raises:
        ValueError: the folder cannot be written, holds the checkpoints of another run, or there is nothing whole to go
            on from.
    """
    output_dir, resumed = Path(arguments.output_dir), None
    if arguments.resume_from_checkpoint is not None:
        resumed = find_checkpoint(accelerator, arguments.resume_from_checkpoint, output_dir)
        if resumed is not None:
            check_same_recipe(recipe, resumed[1]["recipe"])
    elif found := checkpoints(output_dir):
        raise ValueError(
            f"{output_dir} has checkpoints of an earlier run, {found[-1].name} the newest: go on from it with"
            " --resume_from_checkpoint latest, delete them, or choose another --output_dir"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            save_recipe(recipe, arguments.output_dir)
        except OSError as error:
            raise ValueError(f"--output_dir {output_dir} cannot be written: {error}") from error
    return resumed


def build_train_loader(
    arguments: DistillationArguments,
    data: Dataset | IterableDataset,
    audio_column_name: str,
    collator: DistillationCollator,
    accelerator: Accelerator,
    unreadable: Unreadable,
    start: int,
    sampler_state: dict[str, Any] | None,
) -> DataLoader:
    """This process's batches from step `start` on, without end: `gradient_accumulation_steps` for each step."""
    accumulated = arguments.gradient_accumulation_steps
    first = accelerator.process_index * accumulated
    options = {
        "batch_size": arguments.per_device_train_batch_size,
        "max_batch_seconds": arguments.per_device_train_batch_seconds,
        "crop_seconds": arguments.crop_seconds,
        "seed": arguments.seed,
        "shares": range(first, first + accumulated),
        "num_shares": accelerator.num_processes * accumulated,
        "start": start,
    }
    rate, speech = collator.student_feature_extractor.sampling_rate, None
    if isinstance(data, IterableDataset):
        sampler: BatchSampler = StreamSampler(data, audio_column_name, unreadable, sampler_state or None, **options)
    else:
        speech = SpeechDataset(data, audio_column_name, rate)
        seconds, unreadable.num_recordings = durations(speech), len(speech)
        for index in (index for index, length in enumerate(seconds) if length == 0):
            name = recording_name(speech.encoded(index), index)
            unreadable.add(name, "no header of audio, or no samples")
        sampler = RandomAccessSampler(seconds, **options)
    return DataLoader(
        Visits(speech, rate, arguments.crop_seconds, arguments.seed),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def build_eval_loader(
    arguments: DistillationArguments,
    data: Dataset,
    audio_column_name: str,
    collator: DistillationCollator,
    accelerator: Accelerator,
) -> DataLoader:
    """This process's batches of held-out speech, every time the same."""
    speech = SpeechDataset(data, audio_column_name, collator.student_feature_extractor.sampling_rate)
    visits, size = [Visit(0, index) for index in range(len(speech))], arguments.per_device_train_batch_size
    batches = [visits[at : at + size] for at in range(0, len(visits), size)]
    return DataLoader(
        Visits(speech, speech.sampling_rate, arguments.crop_seconds, seed=0),
        batch_sampler=batches[accelerator.process_index :: accelerator.num_processes],
        collate_fn=collator,
        num_workers=arguments.dataloader_num_workers,
    )


def compile_layers(student: LightHubertForPreTraining, teacher: Teacher) -> None:
    """Compiles the encoder layers, each on its own: subnets differ in which they run, and in their sizes.

    Every combination of sizes is compiled when it first comes: 27 of a layer in the small space.
    """
    torch._dynamo.config.recompile_limit = 64
    for layer in [*student.hubert.encoder.layers, *teacher.model.encoder.layers]:
        layer.compile(dynamic=True)


def save_student(distiller: Distiller, feature_extractor: Wav2Vec2FeatureExtractor) -> None:
    """The trained model with its largest subnet selected, its card, and how training went."""
    folder, student = Path(distiller.arguments.output_dir), distiller.student
    if student.search_space is not None:
        student.set_subnet("largest")
    student.save_pretrained(folder)
    feature_extractor.save_pretrained(folder)
    results = {f"eval_loss_{name}": loss for name, loss in distiller.eval_losses.items()}
    if results:
        (folder / "eval_results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "history.json").write_text(json.dumps(distiller.log.history, indent=2) + "\n")
    plot_losses(distiller.log.history, folder / "loss.png")
    write_card(student, distiller.recipe, distiller.eval_losses, folder)


def main() -> None:
    parser = HfArgumentParser(
        (DistillationArguments, ObjectiveArguments, DataArguments), description=__doc__.splitlines()[0]
    )
    arguments, objective, data_arguments = parsed = parse_recipe(parser)
    recipe = {name: value for part in parsed for name, value in asdict(part).items()}
    accelerator = Accelerator(
        cpu=arguments.cpu,
        mixed_precision=arguments.mixed_precision,
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_dir=arguments.output_dir,
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "weights have to be whole on every process: use plain data parallelism, not FSDP or DeepSpeed"
        )
    resumed = prepare_output(arguments, recipe, accelerator)
    folder, state = resumed or (None, {"step": 0, "log": None, "sampler": None})
    set_seed(arguments.seed)

    teacher, teacher_extractor = build_teacher(arguments, objective)
    student = build_student(arguments, teacher)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    if arguments.share_feature_encoder:
        check_same_feature_encoder(student, teacher)
        extractor = teacher_extractor
    check_frame_rates(student, teacher, (extractor, teacher_extractor))
    collator = DistillationCollator(extractor, teacher_extractor, student.base_model.samples_per_first_frame)
    with accelerator.main_process_first():
        train_data, eval_data = (load_speech(data_arguments, training) for training in (True, False))

    optimizer = build_optimizer(arguments, student)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type, optimizer, int(arguments.warmup_ratio * arguments.max_steps), arguments.max_steps
    )
    teacher.to(accelerator.device)
    if arguments.torch_compile:
        compile_layers(student, teacher)
    # "evaluation": not wrapped in DistributedDataParallel, see distillation_step
    student = accelerator.prepare_model(student, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(optimizer)
    accelerator.register_for_checkpointing(scheduler)  # not prepared: it would advance once for every process
    accelerator.init_trackers("tensorboard")
    if folder is not None:
        accelerator.load_state(str(folder))

    column, unreadable = data_arguments.audio_column_name, Unreadable(arguments.max_unreadable_share)
    loader = build_train_loader(
        arguments, train_data, column, collator, accelerator, unreadable, state["step"], state["sampler"]
    )
    distiller = Distiller(
        arguments=arguments,
        student=student,
        teacher=teacher,
        optimizer=optimizer,
        scheduler=scheduler,
        accelerator=accelerator,
        loader=loader,
        eval_loader=eval_data and build_eval_loader(arguments, eval_data, column, collator, accelerator),
        sampling_rate=extractor.sampling_rate,
        unreadable=unreadable,
        log=RunLog(accelerator, arguments.logging_steps, state["log"]),
        recipe=recipe,
    )
    if distiller.train(state["step"]) and accelerator.is_main_process:
        save_student(distiller, extractor)
        print(" ".join(f"eval_loss_{name}={loss:.4f}" for name, loss in distiller.eval_losses.items()))
        if arguments.push_to_hub:
            push_folder(Path(arguments.output_dir), arguments.hub_model_id)
    accelerator.end_training()


if __name__ == "__main__":
    main()
