"""Options of fine-tuning with CTC, besides those of the data and of transformers' `TrainingArguments`, and what
follows from them."""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from lighthubert_training.data.sources import DataArguments
from lighthubert_training.runs.checkpoints import checkpoints, newest_checkpoint, require_whole
from lighthubert_training.runs.distributed import DEVICE_HELP, hide_gpus_from_processes
from lighthubert_training.runs.options import option
from lighthubert_training.sampling import SAMPLING_STRATEGIES
from modeling_lighthubert.errors import UserError


class ChooseDevice(argparse.Action):
    """`--device`, for Trainer, which takes the CPU only for `use_cpu` and otherwise the first GPU that it sees."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is None:
            namespace.device, namespace.use_cpu = None, False
            return
        try:
            device = torch.device(values)
        except RuntimeError:
            parser.error(f"--device {values} is no device: give cpu, cuda, or a GPU by its number, such as cuda:1")
        namespace.device, namespace.use_cpu = values, device.type == "cpu"
        if namespace.use_cpu:
            hide_gpus_from_processes()
        if device.type == "cuda" and device.index is not None:
            every = ",".join(map(str, range(device.index + 1)))
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
            # the others are hidden, or all if there is none of this number
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[device.index : device.index + 1])
        if device.type == "cuda" and not torch.cuda.is_available():
            parser.error(f"--device {values}: no such GPU can be used here")


@dataclass
class ModelArguments:
    """What is fine-tuned, and where."""

    model_name_or_path: str = option(help="Supernet, cut model, stock HuBERT or wav2vec 2.0.")
    subnet: str | None = option(None, "Subnet to cut out of a supernet: a name or a JSON file. Default: the selected.")
    device: str | None = field(default=None, metadata={"help": DEVICE_HELP, "action": ChooseDevice})
    ignore_mismatched_sizes: bool = option(False, "Replace an output layer that is for other tokens by a new one.")
    freeze_feature_encoder: bool = option(True, "Do not train the convolutions of the feature encoder.")
    mask_time_prob: float = option(0.05, "Fraction of frames that SpecAugment masks in training.")
    mask_time_length: int = option(10, "Length of a masked span in frames.")
    mask_feature_prob: float = option(0.0, "Fraction of features that SpecAugment masks.")
    mask_feature_length: int = option(10, "Length of a masked span of features.")
    attention_dropout: float = option(0.0, "Dropout of attention weights.")
    activation_dropout: float = option(0.0, "Dropout inside the feed-forward layers.")
    hidden_dropout: float = option(0.0, "Dropout in the encoder.")
    final_dropout: float = option(0.0, "Dropout before the output layer.")
    layerdrop: float = option(0.0, "Fraction of layers that a training step leaves out.")

    @property
    def config_options(self) -> dict[str, Any]:
        """The regularisation, as options of the model's configuration."""
        return {name: value for name, value in vars(self).items() if name.startswith("mask_") or "drop" in name}


@dataclass
class CTCArguments:
    """How the model is fine-tuned, besides what Trainer asks for."""

    once_for_all: bool = option(False, "Fine-tune the supernet itself: every subnet transcribes. Default: cut one.")
    sampling: str = option(
        "sandwich",
        "Subnets of each step of once_for_all: largest, uniform, uniform_size (sizes as likely as each other), or"
        " sandwich (smallest, random ones, largest).",
        SAMPLING_STRATEGIES,
    )
    num_random_subnets: int = option(4, "Random subnets of each step of once_for_all.")
    distillation_weight: float = option(0.0, "Weight of in-place distillation, of posteriors of the largest subnet.")
    num_eval_subnets: int = option(0, "Random subnets to evaluate besides the named ones, always the same.")
    freeze_encoder_steps: int = option(0, "First steps in which the output layer alone is trained.")
    per_device_train_batch_seconds: float | None = option(None, "Most seconds of audio in a batch, with its padding.")
    early_stopping_patience: int | None = option(None, "Evaluations without a better WER after which training stops.")

    def __post_init__(self) -> None:
        if self.distillation_weight < 0:
            raise ValueError(f"distillation_weight={self.distillation_weight} has to be 0 or more")
        if self.distillation_weight and not self.once_for_all:
            raise ValueError("distillation_weight is for --once_for_all: one size has nothing to learn from")
        if self.sampling != "largest" and self.num_random_subnets < (0 if self.sampling == "sandwich" else 1):
            raise ValueError(f"num_random_subnets={self.num_random_subnets} leaves nothing to train")


def configure(training_arguments: TrainingArguments, ctc: CTCArguments, data: DataArguments) -> None:
    """Sets the options of Trainer that follow from others.

    Raises:
        UserError: options that contradict each other, or several GPUs for one process.
    """
    training_arguments.remove_unused_columns = False  # the columns are made when a recording is read
    training_arguments.push_to_hub = False  # once, at the end, and whatever happens to it the run is saved
    if training_arguments.n_gpu > 1:
        raise UserError(
            f"{training_arguments.n_gpu} GPUs are seen by one process: start one for each, with `accelerate launch` or"
            " `python -m torch.distributed.run --nproc_per_node`, or choose one with --device cuda:0"
        )
    if data.streaming:
        loading: Any = training_arguments.accelerator_config
        loading.dispatch_batches = False  # names cannot be sent from process to process
        if ctc.per_device_train_batch_seconds is not None:
            raise UserError("--per_device_train_batch_seconds: lengths in a stream are not known before it is read")
    if ctc.early_stopping_patience is not None:
        if training_arguments.eval_strategy == "no":
            raise UserError("--early_stopping_patience needs evaluations: give --eval_strategy steps and --eval_steps")
        training_arguments.save_strategy = training_arguments.eval_strategy
        training_arguments.save_steps = training_arguments.eval_steps or training_arguments.save_steps
        training_arguments.load_best_model_at_end = True
        training_arguments.metric_for_best_model = training_arguments.metric_for_best_model or "wer"
        training_arguments.greater_is_better = training_arguments.greater_is_better or False


def find_start(folder: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to go on from: the newest whole one in `folder` for "latest", the one named, or `None`.

    Raises:
        UserError: the output folder is in use by an earlier run, or there is no whole checkpoint to go on from.
    """
    if resume_from_checkpoint not in (None, "latest", "True"):
        return require_whole(Path(str(resume_from_checkpoint)))
    if resume_from_checkpoint and (found := newest_checkpoint(folder)):
        return found
    used = [path.name for path in (*checkpoints(folder), folder / "model.safetensors") if path.exists()]
    if used:
        raise UserError(
            f"--output_dir {folder} has {used[-1]} of an earlier run: go on from its newest checkpoint with"
            " --resume_from_checkpoint latest if it has one, delete the folder, or choose another"
        )
    return None
