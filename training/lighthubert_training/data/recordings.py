"""From an item of data to a `Recording`: a waveform, or why there is none; one policy for what cannot be read."""

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from lighthubert_training.data.audio import UNREADABLE, duration, load_waveform
from lighthubert_training.runs.distributed import on_main_process, sum_over_processes
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import write_json


logger = logging.getLogger(__name__)
DURATIONS = Path(datasets.config.HF_DATASETS_CACHE) / "lighthubert-durations"
"""Where durations of recordings are kept, beside what datasets keeps."""


@dataclass(frozen=True, order=True)
class Item:
    """A recording that is drawn for training. What is random about it, crop and mask, follows from the seed, the epoch
    and the index.

    Attributes:
        epoch: how often all of the data was gone through before.
        index: of the recording in the data, or in the epoch of a stream.
        audio: the encoded recording, of a stream.
    """

    epoch: int
    index: int
    audio: dict[str, Any] | None = None


def item_seed(seed: int, epoch: int, index: int) -> str:
    """Seed of everything random about an item: the same on any number of processes, and after a resumption."""
    return f"{seed}-{epoch}-{index}"


class Recording(NamedTuple):
    """A recording, or the reason why it cannot be read.

    Attributes:
        name: what messages and transcripts call it.
        waveform: mono samples, float32 (num_samples); `None` if it cannot be read.
        problem: the reason, in words; empty if it can be read.
        labels: of the recording, whatever a job learns or scores: token ids, a row of a table. `None` without labels.
        item: epoch and index of a recording that was drawn for training.
    """

    name: str
    waveform: np.ndarray | None
    problem: str = ""
    labels: Any = None
    item: tuple[int, int] = (0, 0)


def recording_name(audio: Mapping[str, Any] | None, index: int) -> str:
    """What messages call a recording: its path, where it has one, or its number."""
    return str((audio or {}).get("path") or f"recording {index}")


def read_recording(audio: Any, sampling_rate: int, name: str, labels: Any = None) -> Recording:
    """Decodes a recording (see `load_waveform`). One that cannot be decoded has a `problem`; nothing is raised."""
    try:
        return Recording(name, load_waveform(audio, sampling_rate), "", labels)
    except UNREADABLE as error:
        # the message of soundfile says where in memory the bytes are; its `error_string` does not
        problem = getattr(error, "error_string", str(error)) or type(error).__name__
        return Recording(name, None, problem, labels)


def why_unreadable(audio: Any) -> str:
    """The reason why a recording has no `duration`."""
    return read_recording(audio, 16_000, "").problem or "it could not be read before, and can be now"


class Unreadable:
    """Recordings that are left out because they cannot be read: each is named once, and too many end the run.

    A run counts those of all its processes, and, when it is resumed, those from before.

    Args:
        max_share: largest share of `num_recordings` that may be left out.
        num_recordings: how many recordings there are; of a stream, how many were read so far.
    """

    def __init__(self, max_share: float, num_recordings: int = 0):
        self.max_share, self.num_recordings = max_share, num_recordings
        self.names: set[str] = set()

    def add(self, name: str, reason: str) -> None:
        """Leaves a recording out.

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

    def add_together(self, found: Sequence[tuple[str, str]], accelerator: Accelerator) -> None:
        """Leaves out what all processes found, names with reasons. All call it, and each counts all of it.

        Raises:
            UserError: they are more than `max_share`.
        """
        if accelerator.num_processes > 1:
            (count,) = sum_over_processes([len(found)])  # which waits for no device
            found = gather_object(list(found)) if count else ()
        for name, reason in found:
            self.add(name, reason)

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed has to know, as JSON."""
        return {"names": sorted(self.names), "num_recordings": self.num_recordings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counts what `state_dict` has of an earlier part of the run."""
        self.names |= set(state["names"])
        self.num_recordings = max(self.num_recordings, state["num_recordings"])

    def readable(self, recordings: Iterable[Recording]) -> Iterator[Recording]:
        """Those of `recordings` that have a waveform; the others are added."""
        for recording in recordings:
            if recording.waveform is None:
                self.add(recording.name, recording.problem)
            else:
                yield recording


class SpeechDataset(torch.utils.data.Dataset):
    """Recordings at hand: item i is a `Recording`.

    Args:
        dataset: rows with undecoded audio in the column `audio_column_name`.
        labels: of each recording. Default: none.
    """

    def __init__(
        self, dataset: Dataset, audio_column_name: str, sampling_rate: int, labels: Sequence[Any] | None = None
    ):
        self.audio, self.audio_column_name = dataset.select_columns([audio_column_name]), audio_column_name
        self.sampling_rate, self.labels = sampling_rate, labels

    def __len__(self) -> int:
        return len(self.audio)

    def encoded(self, index: int) -> dict[str, Any] | None:
        """Recording `index` as it is stored: `bytes` or `path`; `None` of a row that has nothing."""
        return self.audio[index][self.audio_column_name]

    def name(self, index: int) -> str:
        """What messages call recording `index`."""
        return recording_name(self.encoded(index), index)

    def __getitem__(self, index: int) -> Recording:
        audio = self.encoded(index)
        labels = None if self.labels is None else self.labels[index]
        return read_recording(audio, self.sampling_rate, recording_name(audio, index), labels)


class CroppedRecordings(torch.utils.data.Dataset):
    """Recordings that are cropped at random to at most `crop_seconds`: element `Item` is a `Recording`.

    Args:
        speech: where items without their own `audio` come from; `None` for a stream.
    """

    def __init__(self, speech: SpeechDataset | None, sampling_rate: int, crop_seconds: float, seed: int):
        self.speech, self.sampling_rate, self.seed = speech, sampling_rate, seed
        self.max_samples = int(crop_seconds * sampling_rate)

    def __getitem__(self, item: Item) -> Recording:
        audio, epoch, index = item.audio, item.epoch, item.index
        if audio is None:
            assert self.speech is not None
            audio = self.speech.encoded(index)
        recording = read_recording(audio, self.sampling_rate, recording_name(audio, index))
        waveform = recording.waveform
        if waveform is not None and len(waveform) > self.max_samples:
            start = random.Random(item_seed(self.seed, epoch, index)).randrange(len(waveform) - self.max_samples + 1)
            waveform = waveform[start : start + self.max_samples]
        return recording._replace(waveform=waveform, item=(epoch, index))


def durations(speech: SpeechDataset, unreadable: Unreadable | None = None) -> list[float]:
    """Seconds of each recording, 0 of one without a header: those are added to `unreadable`, which counts all. The
    main process reads them, and all call it."""
    seconds = on_main_process(lambda: _kept_durations(speech))
    if unreadable is not None:
        unreadable.num_recordings = len(speech)
        for index in (index for index, length in enumerate(seconds) if length == 0):
            unreadable.add(speech.name(index), why_unreadable(speech.encoded(index)))
    return seconds


def _kept_durations(speech: SpeechDataset) -> list[float]:
    """Those of an earlier run if all recordings are files, of which none has another size or time of change."""
    kept = None if (files := _described_files(speech)) is None else DURATIONS / f"{files}.json"
    if kept is not None:
        with suppress(OSError, ValueError):
            return json.loads(kept.read_text())
    rows = tqdm(speech.audio, desc="reading headers", disable=len(speech) < 10_000)
    seconds = [duration(row[speech.audio_column_name]) for row in rows]
    if kept is not None:
        with suppress(OSError):  # they are read again next time
            write_json(kept, seconds)
    return seconds


def _described_files(speech: SpeechDataset) -> str | None:
    """A digest of names, sizes and times of all recordings; `None` if one of them is no file."""
    digest = hashlib.sha256()
    for row in speech.audio:
        audio = row[speech.audio_column_name] or {}
        if audio.get("path") is None or audio.get("bytes") is not None:
            return None
        try:
            file = Path(audio["path"]).resolve(strict=True)
            digest.update(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode(errors="replace"))
        except OSError:
            return None
    return digest.hexdigest()
