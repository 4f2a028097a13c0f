"""Distils a HuBERT into a LightHuBERT supernet, on one process or many.

Stage 1 trains the full-size student, stage 2 its subnets:

    python training/run_distillation.py --config stage1 --output_dir stage1
    python training/run_distillation.py --config stage2_small --output_dir supernet --student_name_or_path stage1

A subnet may be cut out, and go on by itself:

    python training/run_distillation.py --config recovery --output_dir recovered --student_name_or_path supernet \\
        --subnet best.json

What a run takes is told beforehand, from shapes alone:

    python training/run_distillation.py --config stage2_small --estimate

A recipe, one of ours by name or a YAML file, holds any of the options below; those on the command line have the last
word. Two CPU processes:
`python -m torch.distributed.run --standalone --nproc_per_node 2 training/run_distillation.py --device cpu ...`.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import Wav2Vec2FeatureExtractor, get_scheduler

from lighthubert_training.cards.render import NUM_AVAILABLE, NUM_RECORDINGS
from lighthubert_training.cards.supernet import write_supernet_card
from lighthubert_training.data.collators import DistillationCollator
from lighthubert_training.data.sources import DataArguments, count_recordings, load_speech
from lighthubert_training.distillation.arguments import DistillationArguments, ObjectiveArguments
from lighthubert_training.distillation.building import build_config, build_optimizer, build_student
from lighthubert_training.distillation.cache import CachedTeacher
from lighthubert_training.distillation.estimate import estimate, report
from lighthubert_training.distillation.loaders import SpeechLoader
from lighthubert_training.distillation.loop import Distiller, compile_layers, prepare_output
from lighthubert_training.distillation.teacher import build_teacher, check_feature_encoder, check_frame_rates
from lighthubert_training.runs.checkpoints import saving_results
from lighthubert_training.runs.distributed import build_accelerator, locked_by_main_process, require_whole_weights
from lighthubert_training.runs.hub import check_push, push_folder
from lighthubert_training.runs.log import RunLog
from lighthubert_training.runs.options import OptionParser, parse_options
from lighthubert_training.runs.plots import plot_losses
from modeling_lighthubert.errors import UserError, run, user_error
from modeling_lighthubert.files import whole_files, write_json
from modeling_lighthubert.loading import load_config, parse_subnet


def print_estimate(arguments: DistillationArguments, objective: ObjectiveArguments) -> None:
    """Prints memory and hours of the run. A checkpoint to start from that is not there yet is taken to be of the
    teacher's shape."""
    teacher_config = load_config(arguments.teacher_name_or_path)
    try:
        config = build_config(arguments, objective, teacher_config)
    except UserError:
        if arguments.subnet is not None or arguments.student_name_or_path in (None, "random"):
            raise
        config = build_config(replace(arguments, student_name_or_path=None), objective, teacher_config)
        print(f"{arguments.student_name_or_path} cannot be read: taken to be of the teacher's shape")
    if arguments.subnet is not None:
        config = config.cut_to(config.resolve_subnet(parse_subnet(arguments.subnet)))
    with user_error("--estimate: "):  # of a search space or layers that the models do not have
        found = estimate(config, teacher_config, arguments, objective)
    print(report(found, arguments))


def save_student(
    distiller: Distiller, feature_extractor: Wav2Vec2FeatureExtractor, counts: dict[str, int] | None
) -> None:
    """The trained model with its largest subnet selected, its card, and how training went.

    Args:
        counts: the recordings that the losses on held-out speech are of, and those that the data have.
    """
    folder, student, log = Path(distiller.arguments.output_dir), distiller.student, distiller.log
    if student.search_space is not None:
        student.set_subnet("largest")
    with whole_files(folder) as unfinished:
        student.save_pretrained(unfinished)
        feature_extractor.save_pretrained(unfinished)
    if log.eval_losses:
        results = {f"loss_{name}": loss for name, loss in log.eval_losses.items()} | (counts or {})
        write_json(folder / "eval_results.json", {f"eval_{name}": value for name, value in results.items()})
        print(" ".join(f"eval_loss_{name}={loss:.4f}" for name, loss in log.eval_losses.items()))
    write_json(folder / "history.json", log.history)
    plot_losses(log.history, folder / "loss.png")
    before = next((entry["eval_loss"] for entry in log.history if entry["step"] == 0), None)
    results = {} if before is None else {"as it was cut": before}
    write_supernet_card(student, distiller.recipe, results | log.eval_losses, folder, counts)


def distil(
    accelerator: Accelerator,
    arguments: DistillationArguments,
    objective: ObjectiveArguments,
    data_arguments: DataArguments,
    recipe: dict[str, Any],
) -> bool:
    """Trains the student and saves it. Returns whether all steps were made: see `Distiller.train`."""
    checkpoint, state = prepare_output(arguments, recipe, accelerator)
    set_seed(arguments.seed)

    teacher, teacher_extractor = build_teacher(arguments.teacher_name_or_path, arguments.teacher_dtype, objective)
    student = build_student(arguments, teacher)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    if arguments.share_feature_encoder:
        check_feature_encoder(student, teacher)
        extractor = teacher_extractor
    check_frame_rates(student, teacher, (extractor, teacher_extractor))
    masking = {"mask_time_prob": objective.mask_time_prob, "mask_time_length": objective.mask_time_length}
    kept = {"seed": arguments.seed, "keep_waveforms": arguments.teacher_cache_dir is not None}
    collator = DistillationCollator(extractor, teacher_extractor, student.config, **masking, **kept)
    with accelerator.main_process_first():
        train_data, eval_data = (load_speech(data_arguments, training) for training in (True, False))

    optimizer = build_optimizer(arguments, student)
    warmup_steps = int(arguments.warmup_ratio * arguments.max_steps)
    scheduler = get_scheduler(arguments.lr_scheduler_type, optimizer, warmup_steps, arguments.max_steps)
    if arguments.teacher_cache_dir is not None:
        max_samples = int(arguments.crop_seconds * teacher_extractor.sampling_rate)
        teacher = CachedTeacher(teacher, Path(arguments.teacher_cache_dir), max_samples)
    teacher.to(accelerator.device)
    if arguments.torch_compile:
        compile_layers(student, teacher)
    # "evaluation": not wrapped in DistributedDataParallel, see sum_gradients
    student = accelerator.prepare_model(student, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(optimizer)
    accelerator.register_for_checkpointing(scheduler)  # not prepared: it would advance once for every process
    accelerator.init_trackers("tensorboard")
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))

    same_masks = replace(collator, seed=0)
    eval_loader = eval_data and SpeechLoader(arguments, data_arguments, eval_data, same_masks, accelerator, None)
    distiller = Distiller(
        arguments=arguments,
        student=student,
        teacher=teacher,
        optimizer=optimizer,
        scheduler=scheduler,
        accelerator=accelerator,
        loader=SpeechLoader(arguments, data_arguments, train_data, collator, accelerator, state),
        eval_loader=eval_loader,
        log=RunLog(accelerator, arguments.logging_steps, state["log"]),
        recipe=recipe,
    )
    finished = distiller.train(state["step"])
    if finished and accelerator.is_main_process:
        counts = None
        if eval_loader:
            num_recordings = len(eval_data) - len(eval_loader.unreadable.names)
            counts = {NUM_RECORDINGS: num_recordings, NUM_AVAILABLE: count_recordings(data_arguments)}
        with saving_results(Path(arguments.output_dir)):
            save_student(distiller, extractor, counts)
    accelerator.end_training()
    return finished


def main() -> None:
    kinds = (DistillationArguments, ObjectiveArguments, DataArguments)
    parser = OptionParser(kinds, description=__doc__)
    arguments, objective, data_arguments = parsed = parse_options(parser, "distillation")
    if arguments.estimate:
        print_estimate(arguments, objective)
        return
    recipe = {name: value for options in parsed for name, value in asdict(options).items()}
    tracker = None if arguments.report_to == "none" else arguments.report_to
    tracking = {"log_with": tracker, "project_dir": arguments.output_dir}
    accelerator = build_accelerator(arguments.device, mixed_precision=arguments.mixed_precision, **tracking)
    require_whole_weights(accelerator)
    folder, is_main = Path(arguments.output_dir), accelerator.is_main_process
    if arguments.push_to_hub:
        check_push(folder, arguments.hub_model_id)
    with locked_by_main_process(folder):
        finished = distil(accelerator, arguments, objective, data_arguments, recipe)
    if finished and arguments.push_to_hub and is_main:
        push_folder(folder, arguments.hub_model_id)


if __name__ == "__main__":
    run(main)
