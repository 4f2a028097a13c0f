"""Batches of a distillation: of training without end, from any step on, and of held-out speech."""

from typing import Any

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from lighthubert_training.data.batches import BatchSampler, RandomAccessSampler, StreamSampler
from lighthubert_training.data.collators import DistillationCollator
from lighthubert_training.data.recordings import (
    NO_HEADER,
    CroppedRecordings,
    Item,
    SpeechDataset,
    Unreadable,
    durations,
)
from lighthubert_training.distillation.arguments import DistillationArguments


def read_headers(speech: SpeechDataset, unreadable: Unreadable) -> list[float]:
    """Seconds of each recording. `unreadable` is told how many there are, and which of them have no header."""
    seconds, unreadable.num_recordings = durations(speech), len(speech)
    for index in (index for index, length in enumerate(seconds) if length == 0):
        unreadable.add(speech.name(index), NO_HEADER)
    return seconds


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
        "slices": range(first, first + accumulated),
        "num_slices": accelerator.num_processes * accumulated,
        "start": start,
    }
    rate, speech = collator.student_feature_extractor.sampling_rate, None
    if isinstance(data, IterableDataset):
        sampler: BatchSampler = StreamSampler(data, audio_column_name, unreadable, sampler_state or None, **options)
    else:
        speech = SpeechDataset(data, audio_column_name, rate)
        sampler = RandomAccessSampler(read_headers(speech, unreadable), **options)
    return DataLoader(
        CroppedRecordings(speech, rate, arguments.crop_seconds, arguments.seed),
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
    unreadable: Unreadable,
) -> DataLoader:
    """This process's batches of held-out speech, every time the same."""
    speech = SpeechDataset(data, audio_column_name, collator.student_feature_extractor.sampling_rate)
    read_headers(speech, unreadable)
    items, size = [Item(0, index) for index in range(len(speech))], arguments.per_device_train_batch_size
    batches = [items[at : at + size] for at in range(0, len(items), size)]
    return DataLoader(
        CroppedRecordings(speech, speech.sampling_rate, arguments.crop_seconds, seed=0),
        batch_sampler=batches[accelerator.process_index :: accelerator.num_processes],
        collate_fn=collator,
        num_workers=arguments.dataloader_num_workers,
    )
