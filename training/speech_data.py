"""Speech for training: from a Hub dataset or parquet files to padded batches.

Audio columns stay encoded (`Audio(decode=False)`) until a recording is needed, so nothing here requires torchcodec.
"""

import io
import itertools
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from datasets import Audio, Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import SequenceFeatureExtractor


logger = logging.getLogger("speech_data")
UNREADABLE = (soundfile.LibsndfileError, OSError, ValueError)
"""What reading a broken recording raises."""


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
    """Decoded recordings: item i is a waveform, shape (num_samples)."""

    def __init__(self, dataset: Dataset, audio_column_name: str, sampling_rate: int):
        self.audio = dataset.select_columns([audio_column_name])
        self.audio_column_name = audio_column_name
        self.sampling_rate = sampling_rate

    def __len__(self) -> int:
        return len(self.audio)

    def __getitem__(self, index: int) -> np.ndarray:
        return load_waveform(self.audio[index][self.audio_column_name], self.sampling_rate)

    def name(self, index: int) -> str:
        """What a message calls recording `index`: its path, where it has one."""
        audio = self.audio[index][self.audio_column_name]
        path = audio.get("path") if isinstance(audio, Mapping) else audio
        return str(path or f"recording {index}")

    def lengths(self) -> list[int]:
        """Samples of each recording, of which only the header is read."""
        lengths = []
        for row in tqdm(self.audio, desc="lengths", disable=len(self) < 10_000):
            audio = row[self.audio_column_name]
            try:
                info = soundfile.info(io.BytesIO(audio["bytes"]) if audio.get("bytes") else audio["path"])
                lengths.append(int(info.frames * self.sampling_rate / info.samplerate))
            except UNREADABLE:
                lengths.append(0)
        return lengths


class Unreadable:
    """Recordings that were left out because they cannot be read; a few are logged, too many stop the run.

    Args:
        max_share: of all recordings.
    """

    def __init__(self, speech: SpeechDataset, max_share: float):
        self.speech, self.max_share = speech, max_share
        self.indices: set[int] = set()

    def add(self, index: int, reason: str) -> None:
        """
        Raises:
            ValueError: with this one they are more than `max_share`.
        """
        if index in self.indices:
            return
        self.indices.add(index)
        logger.warning(f"left out, because it cannot be read: {self.speech.name(index)} ({reason})")
        if len(self.indices) > self.max_share * len(self.speech):
            raise ValueError(
                f"{len(self.indices)} of {len(self.speech)} recordings cannot be read, more than a share of"
                f" {self.max_share}; the last was {self.speech.name(index)} ({reason})"
            )


Visit = tuple[int, int]
"""A recording as it is met in training: the epoch, and its index in the data. Crop and mask depend on it alone."""


class Visits(torch.utils.data.Dataset):
    """Recordings cropped at random to at most `max_seconds`: item (epoch, index) is the visit and its waveform, or the
    reason why there is none."""

    def __init__(self, speech: SpeechDataset, max_seconds: float, seed: int):
        self.speech = speech
        self.max_samples = int(max_seconds * speech.sampling_rate)
        self.seed = seed

    def __getitem__(self, visit: Visit) -> tuple[Visit, np.ndarray | str]:
        try:
            waveform = self.speech[visit[1]]
        except UNREADABLE as error:
            return visit, str(error)
        if len(waveform) > self.max_samples:
            rng = random.Random(visit_seed(self.seed, visit))
            start = rng.randrange(len(waveform) - self.max_samples + 1)
            waveform = waveform[start : start + self.max_samples]
        return visit, waveform


def visit_seed(seed: int, visit: Sequence[int]) -> str:
    """Seed of everything random about a visit: the same on any number of processes, and after a resumption."""
    return f"{seed}-{visit[0]}-{visit[1]}"


class BatchSampler(torch.utils.data.Sampler[list[Visit]]):
    """Batches of recordings of similar length, epoch after epoch without end.

    The batches of a step are one list of recordings, dealt in turn to `num_shares` processes and accumulated
    batches: how many there are changes nothing in what a step sees. The order depends on the seed only.

    Args:
        lengths: of the recordings in samples, after cropping. Those of no length are left out.
        batch_size: recordings in a batch.
        max_batch_samples: no more padded samples in a batch than this, but at least one recording.
        shares: which of `num_shares` this process takes.
        start: steps to skip.
    """

    NUM_BATCHES_SORTED = 50
    """Among the recordings of so many batches, in random order, those of similar length are put together."""

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        max_batch_samples: int | None,
        seed: int,
        shares: Sequence[int] = (0,),
        num_shares: int = 1,
        start: int = 0,
    ):
        self.lengths, self.seed, self.start = lengths, seed, start
        self.batch_size, self.max_batch_samples = batch_size, max_batch_samples
        self.shares, self.num_shares = shares, num_shares

    def __iter__(self) -> Iterator[list[Visit]]:
        steps = (step for epoch in itertools.count() for step in self._steps(epoch))
        for visits in itertools.islice(steps, self.start, None):
            for share in self.shares:
                yield visits[share :: self.num_shares]

    def _steps(self, epoch: int) -> list[list[Visit]]:
        """The recordings of each step of an epoch. What is left over at its end waits for another epoch."""
        rng = random.Random(f"{self.seed}-{epoch}")
        order = [index for index, length in enumerate(self.lengths) if length > 0]
        rng.shuffle(order)
        pool = self.NUM_BATCHES_SORTED * self.batch_size * self.num_shares
        steps = []
        for at in range(0, len(order), pool):
            step: list[Visit] = []
            for index in sorted(order[at : at + pool], key=lambda index: self.lengths[index]):
                # sorted upwards: the newest recording is the longest, and so the length of the padded batch
                per_share = math.ceil((len(step) + 1) / self.num_shares)
                too_long = self.max_batch_samples and per_share * self.lengths[index] > self.max_batch_samples
                if len(step) >= self.num_shares and (per_share > self.batch_size or too_long):
                    steps.append(step)
                    step = []
                step.append((epoch, index))
            if len(step) >= self.num_shares:
                steps.append(step)
        rng.shuffle(steps)
        if not steps:
            raise ValueError(
                f"{len(order)} recordings are too few for {self.num_shares} batches a step: give more speech, or fewer"
                " processes and accumulated batches"
            )
        return steps


@dataclass
class DistillationCollator:
    """Pads a batch for student and teacher, each as its own feature extractor says (normalised or raw).

    Recordings shorter than `min_samples`, less than one frame, are repeated until they are long enough.
    """

    student_feature_extractor: SequenceFeatureExtractor
    teacher_feature_extractor: SequenceFeatureExtractor
    min_samples: int

    def __call__(self, items: Sequence[tuple[Visit, np.ndarray | str]]) -> dict[str, Any]:
        """Tensors `input_values`, `teacher_input_values` and `attention_mask`, each (batch_size, num_samples), and
        `visits`, (batch_size, 2); and `unreadable`, index and reason of each recording that is left out."""
        unreadable = [(index, waveform) for (_, index), waveform in items if isinstance(waveform, str)]
        if len(unreadable) == len(items):
            raise ValueError(f"no recording of a batch of {len(items)} can be read: {unreadable[0][1]}")
        readable = [(visit, waveform) for visit, waveform in items if not isinstance(waveform, str)]
        visits = [visit for visit, _ in readable]
        waveforms = [np.resize(waveform, max(len(waveform), self.min_samples)) for _, waveform in readable]
        student = _padded(self.student_feature_extractor, waveforms)
        teacher = _padded(self.teacher_feature_extractor, waveforms)
        return {
            "input_values": student["input_values"],
            "teacher_input_values": teacher["input_values"],
            "attention_mask": student["attention_mask"],
            "visits": torch.tensor(visits),
            "unreadable": unreadable,
        }


def _padded(extractor: SequenceFeatureExtractor, waveforms: Sequence[np.ndarray]) -> Mapping[str, torch.Tensor]:
    return extractor(
        list(waveforms),
        sampling_rate=extractor.sampling_rate,
        padding=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
