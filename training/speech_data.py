"""Speech for training: from a Hub dataset or parquet files to padded batches.

Audio columns stay encoded (`Audio(decode=False)`) until a recording is needed, so nothing here requires torchcodec.
"""

import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from datasets import Audio, Dataset, load_dataset
from transformers import SequenceFeatureExtractor


@dataclass
class DataArguments:
    """Where the speech comes from: a dataset on the Hub, or parquet files."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub, or a folder of one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split_name: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file to train on, in place of a dataset."})
    validation_file: str | None = field(default=None, metadata={"help": "Parquet file to evaluate on."})
    audio_column_name: str = field(default="audio", metadata={"help": "Column with the audio."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on no more than this many recordings."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on no more recordings than this."})


def load_waveform(audio: Any, sampling_rate: int) -> np.ndarray:
    """A recording as mono float32 samples, shape (num_samples), at `sampling_rate` Hz.

    Args:
        audio: a path, the bytes of a file (WAV, FLAC, OGG, MP3), or a row of an `Audio` column: a dictionary with
            `bytes` or `path`, one with `array` and `sampling_rate`, or a torchcodec decoder.

    Raises:
        ValueError: nothing of that kind, or audio that is empty, NaN or infinite.
    """
    if hasattr(audio, "get_all_samples"):
        samples = audio.get_all_samples()
        waveform, rate = samples.data.numpy().T, samples.sample_rate
    elif isinstance(audio, Mapping) and audio.get("array") is not None:
        waveform, rate = np.asarray(audio["array"]), audio["sampling_rate"]
    else:
        source = (audio.get("bytes") or audio.get("path")) if isinstance(audio, Mapping) else audio
        if not isinstance(source, bytes | str | Path):
            raise ValueError(f"audio has to be a path, bytes, or a row of an Audio column, not {audio!r:.80}")
        waveform, rate = soundfile.read(io.BytesIO(source) if isinstance(source, bytes) else source, dtype="float32")
    if np.issubdtype(waveform.dtype, np.integer):
        waveform = waveform / np.iinfo(waveform.dtype).max
    waveform = waveform.mean(axis=1) if waveform.ndim == 2 else waveform
    if not len(waveform) or not np.isfinite(waveform).all():
        raise ValueError("audio is empty, or has NaN or infinite samples")
    return soxr.resample(waveform.astype(np.float32), rate, sampling_rate)


def load_speech(arguments: DataArguments, training: bool) -> Dataset | None:
    """The training or the evaluation part of what `arguments` name, audio still encoded; `None` if nothing is named.

    Raises:
        ValueError: no data to train on, no audio column, or no recordings.
    """
    file = arguments.train_file if training else arguments.validation_file
    split = arguments.train_split_name if training else arguments.eval_split_name
    if file is not None:
        dataset = load_dataset("parquet", data_files=file, split="train")
    elif arguments.dataset_name is not None and split is not None:
        dataset = load_dataset(arguments.dataset_name, arguments.dataset_config_name, split=split)
    elif training:
        raise ValueError("nothing to train on: give --train_file or --dataset_name")
    else:
        return None
    column = arguments.audio_column_name
    if column not in dataset.column_names:
        raise ValueError(f"the data has no column {column!r}: choose --audio_column_name from {dataset.column_names}")
    if not len(dataset):
        raise ValueError(f"{file or arguments.dataset_name} has no recordings")
    limit = arguments.max_train_samples if training else arguments.max_eval_samples
    dataset = dataset.select(range(min(limit or len(dataset), len(dataset))))
    return dataset.cast_column(column, Audio(decode=False))


class SpeechDataset(torch.utils.data.Dataset):
    """Decoded recordings: item i is a waveform, shape (num_samples), cropped at random to at most `max_seconds`."""

    def __init__(self, dataset: Dataset, audio_column_name: str, sampling_rate: int, max_seconds: float | None = None):
        self.audio = dataset.select_columns([audio_column_name])
        self.audio_column_name = audio_column_name
        self.sampling_rate = sampling_rate
        self.max_samples = None if max_seconds is None else int(max_seconds * sampling_rate)

    def __len__(self) -> int:
        return len(self.audio)

    def __getitem__(self, index: int) -> np.ndarray:
        waveform = load_waveform(self.audio[index][self.audio_column_name], self.sampling_rate)
        if self.max_samples is None or len(waveform) <= self.max_samples:
            return waveform
        start = random.randrange(len(waveform) - self.max_samples + 1)
        return waveform[start : start + self.max_samples]


@dataclass
class DistillationCollator:
    """Pads a batch for student and teacher, each as its own feature extractor says (normalised or raw).

    Recordings shorter than `min_samples`, less than one frame, are repeated until they are long enough.
    """

    student_feature_extractor: SequenceFeatureExtractor
    teacher_feature_extractor: SequenceFeatureExtractor
    min_samples: int

    def __call__(self, waveforms: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Tensors `input_values`, `teacher_input_values` and `attention_mask`, each (batch_size, num_samples)."""
        waveforms = [np.resize(waveform, max(len(waveform), self.min_samples)) for waveform in waveforms]
        student = _padded(self.student_feature_extractor, waveforms)
        teacher = _padded(self.teacher_feature_extractor, waveforms)
        return {
            "input_values": student["input_values"],
            "teacher_input_values": teacher["input_values"],
            "attention_mask": student["attention_mask"],
        }


def _padded(extractor: SequenceFeatureExtractor, waveforms: Sequence[np.ndarray]) -> Mapping[str, torch.Tensor]:
    return extractor(
        list(waveforms),
        sampling_rate=extractor.sampling_rate,
        padding=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
