"""From an item of data to a `Recording`: its waveform, or the reason why there is none; and the one policy, for all
jobs, for recordings that cannot be read.
"""

import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from lighthubert_training.data.audio import UNREADABLE, duration, load_waveform
from modeling_lighthubert.errors import UserError


logger = logging.getLogger(__name__)
NO_HEADER = "no header of audio, or no samples"


class Item(NamedTuple):
    """A recording as it is met in training. Crop and mask depend on epoch and index alone.

    Attributes:
        epoch: how often all of the data was gone through before.
        index: of the recording in the data, or in the epoch's stream.
        audio: the encoded recording, of a stream.
    """

    epoch: int
    index: int
    audio: dict[str, Any] | None = None


def item_seed(seed: int, epoch: int, index: int) -> str:
    """Seed of everything random about an item: the same on any number of processes, and after a resumption."""
    return f"{seed}-{epoch}-{index}"


class Recording(NamedTuple):
    """A recording, or why it cannot be read.

    Attributes:
        name: what messages and transcripts call it.
        waveform: mono float32 samples, shape (num_samples); `None` if it cannot be read.
        problem: why not.
        labels: what a job has to say of it: token ids, a row of labels.
        item: epoch and index of a recording that is drawn in training.
    """

    name: str
    waveform: np.ndarray | None
    problem: str = ""
    labels: Any = None
    item: tuple[int, int] = (0, 0)


def recording_name(audio: Mapping[str, Any], index: int) -> str:
    """What a message calls a recording: its path, where it has one."""
    return str(audio.get("path") or f"recording {index}")


def read_recording(audio: Any, sampling_rate: int, name: str, labels: Any = None) -> Recording:
    """Decodes a recording (see `load_waveform`). What cannot be decoded is a `problem`, no exception."""
    try:
        return Recording(name, load_waveform(audio, sampling_rate), "", labels)
    except UNREADABLE as error:
        # that of soundfile says where in memory the bytes are, but for its `error_string`
        problem = getattr(error, "error_string", str(error)) or type(error).__name__
        return Recording(name, None, problem, labels)


class Unreadable:
    """Recordings that are left out because they cannot be read: each is named once, and too many end the run.

    Args:
        max_share: of all recordings; of a stream, of those read so far.
        num_recordings: how many there are.
    """

    def __init__(self, max_share: float, num_recordings: int = 0):
        self.max_share, self.num_recordings = max_share, num_recordings
        self.names: set[str] = set()

    def add(self, name: str, reason: str) -> None:
        """
        Raises:
            UserError: with this one they are more than `max_share`.
        """
        if name in self.names:
            return
        self.names.add(name)
        logger.warning(f"left out, because it cannot be read: {name} ({reason})")
        if len(self.names) > self.max_share * self.num_recordings:
            raise UserError(
                f"{len(self.names)} of {self.num_recordings} recordings cannot be read, more than a share of"
                f" {self.max_share}; the last was {name} ({reason})"
            )

    def readable(self, recordings: Iterable[Recording]) -> Iterator[Recording]:
        """Those of `recordings` that have a waveform; the others are added."""
        for recording in recordings:
            if recording.waveform is None:
                self.add(recording.name, recording.problem)
            else:
                yield recording


class SpeechDataset(torch.utils.data.Dataset):
    """Recordings by number: item i is a `Recording`.

    Args:
        dataset: rows with undecoded audio.
        labels: of each recording.
    """

    def __init__(
        self, dataset: Dataset, audio_column_name: str, sampling_rate: int, labels: Sequence[Any] | None = None
    ):
        self.audio, self.audio_column_name = dataset.select_columns([audio_column_name]), audio_column_name
        self.sampling_rate, self.labels = sampling_rate, labels

    def __len__(self) -> int:
        return len(self.audio)

    def encoded(self, index: int) -> dict[str, Any]:
        """Recording `index` as it is stored: `bytes` or `path`."""
        return self.audio[index][self.audio_column_name]

    def name(self, index: int) -> str:
        """What a message calls recording `index`."""
        return recording_name(self.encoded(index), index)

    def __getitem__(self, index: int) -> Recording:
        audio = self.encoded(index)
        labels = None if self.labels is None else self.labels[index]
        return read_recording(audio, self.sampling_rate, recording_name(audio, index), labels)


class CroppedRecordings(torch.utils.data.Dataset):
    """Recordings cropped at random to at most `crop_seconds`: item `Item` is a `Recording`.

    Args:
        speech: has the audio of an item that does not bring its own; `None` for a stream.
    """

    def __init__(self, speech: SpeechDataset | None, sampling_rate: int, crop_seconds: float, seed: int):
        self.speech, self.sampling_rate, self.seed = speech, sampling_rate, seed
        self.max_samples = int(crop_seconds * sampling_rate)

    def __getitem__(self, item: Item) -> Recording:
        audio = item.audio
        if audio is None:
            assert self.speech is not None
            audio = self.speech.encoded(item.index)
        epoch, index, _ = item
        recording = read_recording(audio, self.sampling_rate, recording_name(audio, index))._replace(
            item=(epoch, index)
        )
        waveform = recording.waveform
        if waveform is None or len(waveform) <= self.max_samples:
            return recording
        start = random.Random(item_seed(self.seed, epoch, index)).randrange(len(waveform) - self.max_samples + 1)
        return recording._replace(waveform=waveform[start : start + self.max_samples])


def durations(speech: SpeechDataset) -> list[float]:
    """Seconds of each recording, from its header."""
    rows = tqdm(speech.audio, desc="reading headers", disable=len(speech) < 10_000)
    return [duration(row[speech.audio_column_name]) for row in rows]
