"""Batches for distillation: which recordings a step visits, in order, and their padding.

A step is one list of visits, dealt to processes and accumulated batches, so how many there are changes nothing. What
is random about a visit follows from the seed, the epoch and the recording; the order from the seed and, of a stream,
from where in it reading went on.
"""

import itertools
import logging
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import IterableDataset
from tqdm.auto import tqdm
from transformers import SequenceFeatureExtractor

from lighthubert_training.data.sources import UNREADABLE, SpeechDataset, duration, load_waveform


logger = logging.getLogger(__name__)
# datasets warns that the content of a shuffle buffer is lost; ours has one row, and nothing is lost
logging.getLogger("datasets.iterable_dataset").addFilter(lambda record: "shuffle buffer" not in record.getMessage())


class Visit(NamedTuple):
    """A recording as it is met in training. Crop and mask depend on epoch and index alone.

    Attributes:
        epoch: how often all of the data was gone through before.
        index: of the recording in the data, or in the epoch's stream.
        audio: the encoded recording, of a stream.
    """

    epoch: int
    index: int
    audio: dict[str, Any] | None = None


def visit_seed(seed: int, epoch: int, index: int) -> str:
    """Seed of everything random about a visit: the same on any number of processes, and after a resumption."""
    return f"{seed}-{epoch}-{index}"


def recording_name(audio: Mapping[str, Any], index: int) -> str:
    """What a message calls a recording: its path, where it has one."""
    return str(audio.get("path") or f"recording {index}")


class Unreadable:
    """Recordings that were left out because they cannot be read; each is logged, too many stop the run.

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
            ValueError: with this one they are more than `max_share`.
        """
        if name in self.names:
            return
        self.names.add(name)
        logger.warning(f"left out, because it cannot be read: {name} ({reason})")
        if len(self.names) > self.max_share * self.num_recordings:
            raise ValueError(
                f"{len(self.names)} of {self.num_recordings} recordings cannot be read, more than a share of"
                f" {self.max_share}; the last was {name} ({reason})"
            )


class BatchSampler(ABC, torch.utils.data.Sampler[list[Visit]]):
    """Batches of recordings of similar length, epoch after epoch without end.

    Args:
        batch_size: recordings in a batch.
        max_batch_seconds: no more audio in a batch than this, with its padding, but at least one recording.
        crop_seconds: longer recordings count as cropped to this.
        shares: which of the `num_shares` batches of a step this process takes.
        start: step to begin with.
    """

    NUM_BATCHES_SORTED = 50
    """Among the recordings of so many batches, in random order, those of similar length are put together."""

    def __init__(
        self,
        batch_size: int,
        max_batch_seconds: float | None,
        crop_seconds: float,
        seed: int,
        shares: Sequence[int] = (0,),
        num_shares: int = 1,
        start: int = 0,
    ):
        self.batch_size, self.max_batch_seconds, self.crop_seconds = batch_size, max_batch_seconds, crop_seconds
        self.seed, self.shares, self.num_shares, self.start = seed, shares, num_shares, start
        self.pool_size = self.NUM_BATCHES_SORTED * batch_size * num_shares

    def __iter__(self) -> Iterator[list[Visit]]:
        for visits in self.steps():
            for share in self.shares:
                yield visits[share :: self.num_shares]

    @abstractmethod
    def steps(self) -> Iterator[list[Visit]]:
        """The visits of each step from `start` on."""

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a sampler that begins with `step` has to know besides, as JSON."""
        return {}

    def group(self, visits: Sequence[Visit], seconds: Sequence[float]) -> list[list[Visit]]:
        """Steps of visits of similar length, shortest first. What is left over at the end waits for another epoch."""
        steps: list[list[Visit]] = []
        step: list[Visit] = []
        for at in sorted(range(len(visits)), key=lambda at: seconds[at]):
            # sorted upwards: the newest recording is the longest, and so the length of the padded batch
            longest = min(seconds[at], self.crop_seconds)
            per_share = math.ceil((len(step) + 1) / self.num_shares)
            too_long = self.max_batch_seconds and per_share * longest > self.max_batch_seconds
            if len(step) >= self.num_shares and (per_share > self.batch_size or too_long):
                steps.append(step)
                step = []
            step.append(visits[at])
        return [*steps, step] if len(step) >= self.num_shares else steps

    def require(self, steps: Sequence[list[Visit]], num_recordings: int) -> None:
        """
        Raises:
            ValueError: there is no step.
        """
        if not steps:
            raise ValueError(
                f"{num_recordings} recordings are too few for {self.num_shares} batches a step: give more speech, or"
                " fewer processes and accumulated batches"
            )


class RandomAccessSampler(BatchSampler):
    """Batches of recordings that are all at hand: every epoch in an order of its own, which depends on the seed.

    Args:
        seconds: of each recording. Those of no length are left out.
        options: of `BatchSampler`.
    """

    def __init__(self, seconds: Sequence[float], **options):
        super().__init__(**options)
        self.seconds = seconds

    def steps(self) -> Iterator[list[Visit]]:
        return itertools.islice(
            (step for epoch in itertools.count() for step in self._of_epoch(epoch)), self.start, None
        )

    def _of_epoch(self, epoch: int) -> list[list[Visit]]:
        rng = random.Random(f"{self.seed}-{epoch}")
        order = [index for index, length in enumerate(self.seconds) if length > 0]
        rng.shuffle(order)
        steps = []
        for at in range(0, len(order), self.pool_size):
            pool = order[at : at + self.pool_size]
            steps += self.group([Visit(epoch, index) for index in pool], [self.seconds[index] for index in pool])
        rng.shuffle(steps)
        self.require(steps, len(order))
        return steps


class Pool(NamedTuple):
    """Rows read from a stream together, to be put into batches.

    Attributes:
        position: where it begins, as JSON: `epoch`, `num_read` rows of it before, and `stream`, the state of the
            dataset there (`None` at the beginning).
        rows: encoded recordings.
    """

    position: dict[str, Any]
    rows: list[dict[str, Any]]


class StreamSampler(BatchSampler):
    """Batches of a streamed dataset: its shards in random order, and the recordings of a pool sorted by length, while
    the next pool is read.

    Args:
        stream: undecoded recordings.
        unreadable: told of recordings without a header, and how many have been read.
        state: what `state_dict` gave for `start`.
        options: of `BatchSampler`.
    """

    def __init__(
        self,
        stream: IterableDataset,
        audio_column_name: str,
        unreadable: Unreadable,
        state: Mapping[str, Any] | None = None,
        **options,
    ):
        super().__init__(**options)
        # a buffer of one row: only shards are shuffled, so that the state of the dataset says all
        self.stream = stream.shuffle(seed=self.seed, buffer_size=1)
        self.audio_column_name, self.unreadable = audio_column_name, unreadable
        beginning = {"first_step": 0, "epoch": 0, "num_read": 0, "stream": None}
        self.positions = [dict(state or beginning)]

    def state_dict(self, step: int) -> dict[str, Any]:
        """The position of the pool that `step` belongs to, and its `first_step`."""
        while len(self.positions) > 1 and self.positions[1]["first_step"] <= step:
            self.positions.pop(0)
        return self.positions[0]

    def steps(self) -> Iterator[list[Visit]]:
        at = self.positions[0]["first_step"]
        for pool in read_ahead(self._pools(self.positions[0])):
            steps = self._of_pool(pool)
            if pool.position["num_read"] == 0:
                self.require(steps, len(pool.rows))
            if pool.position != {name: self.positions[-1][name] for name in pool.position}:
                self.positions.append({"first_step": at, **pool.position})
            yield from steps[max(0, self.start - at) :]
            at += len(steps)

    def _pools(self, position: Mapping[str, Any]) -> Iterator[Pool]:
        """Pools from `position` on, without end."""
        epoch, num_read, state = position["epoch"], position["num_read"], position["stream"]
        while True:
            self.stream.set_epoch(epoch)
            if state is not None:
                self.stream.load_state_dict(state)
            rows = iter(self.stream)
            while pool := [row[self.audio_column_name] for row in itertools.islice(rows, self.pool_size)]:
                yield Pool({"epoch": epoch, "num_read": num_read, "stream": state}, pool)
                num_read, state = num_read + len(pool), self.stream.state_dict()
            if not num_read:
                raise ValueError("no recordings in the streamed data, or none that the filters leave")
            epoch, num_read, state = epoch + 1, 0, None

    def _of_pool(self, pool: Pool) -> list[list[Visit]]:
        epoch, first = pool.position["epoch"], pool.position["num_read"]
        self.unreadable.num_recordings = max(self.unreadable.num_recordings, first + len(pool.rows))
        visits, seconds = [], []
        for index, audio in enumerate(pool.rows, start=first):
            if length := duration(audio):
                visits.append(Visit(epoch, index, audio))
                seconds.append(length)
            else:
                self.unreadable.add(recording_name(audio, index), "no header of audio, or no samples")
        steps = self.group(visits, seconds)
        random.Random(f"{self.seed}-{epoch}-{first}").shuffle(steps)
        return steps


def read_ahead(pools: Iterator[Pool]) -> Iterator[Pool]:
    """The same, each read while the one before is used."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(next, pools)
        while True:
            pool = coming.result()
            coming = reader.submit(next, pools)
            yield pool


class Recording(NamedTuple):
    """A visit's audio, or why there is none.

    Attributes:
        waveform: mono samples, shape (num_samples), cropped; `None` if it cannot be read.
    """

    visit: tuple[int, int]
    name: str
    waveform: np.ndarray | None
    problem: str = ""


class Visits(torch.utils.data.Dataset):
    """Recordings cropped at random to at most `crop_seconds`: item `visit` is a `Recording`.

    Args:
        speech: where the audio of a visit is that does not bring its own; `None` of a stream.
    """

    def __init__(self, speech: SpeechDataset | None, sampling_rate: int, crop_seconds: float, seed: int):
        self.speech, self.sampling_rate, self.seed = speech, sampling_rate, seed
        self.max_samples = int(crop_seconds * sampling_rate)

    def __getitem__(self, visit: Visit) -> Recording:
        audio = self.speech.encoded(visit.index) if visit.audio is None else visit.audio
        which, name = (visit.epoch, visit.index), recording_name(audio, visit.index)
        try:
            waveform = load_waveform(audio, self.sampling_rate)
        except UNREADABLE as error:
            return Recording(which, name, None, str(error))
        if len(waveform) > self.max_samples:
            rng = random.Random(visit_seed(self.seed, *which))
            start = rng.randrange(len(waveform) - self.max_samples + 1)
            waveform = waveform[start : start + self.max_samples]
        return Recording(which, name, waveform)


def durations(speech: SpeechDataset) -> list[float]:
    """Seconds of each recording, from its header."""
    rows = tqdm(speech.audio, desc="reading headers", disable=len(speech) < 10_000)
    return [duration(row[speech.audio_column_name]) for row in rows]


@dataclass
class DistillationCollator:
    """Pads a batch for student and teacher, each as its own feature extractor says (normalised or raw).

    Recordings shorter than `min_samples`, less than one frame, are repeated until they are long enough.
    """

    student_feature_extractor: SequenceFeatureExtractor
    teacher_feature_extractor: SequenceFeatureExtractor
    min_samples: int

    def __call__(self, recordings: Sequence[Recording]) -> dict[str, Any]:
        """Tensors `input_values`, `teacher_input_values` and `attention_mask`, each (batch_size, num_samples), and
        `visits`, (batch_size, 2); the `names` of the recordings; and `unreadable`, name and reason of each that is
        left out. If none can be read, there is nothing but `unreadable`."""
        unreadable = [(each.name, each.problem) for each in recordings if each.waveform is None]
        readable = [each for each in recordings if each.waveform is not None]
        if not readable:
            return {"unreadable": unreadable}
        waveforms = [np.resize(each.waveform, max(len(each.waveform), self.min_samples)) for each in readable]
        student = self._padded(self.student_feature_extractor, waveforms)
        same = self.teacher_feature_extractor is self.student_feature_extractor
        teacher = student if same else self._padded(self.teacher_feature_extractor, waveforms)
        return {
            "input_values": student["input_values"],
            "teacher_input_values": teacher["input_values"],
            "attention_mask": student["attention_mask"],
            "visits": torch.tensor([each.visit for each in readable]),
            "names": [each.name for each in readable],
            "unreadable": unreadable,
        }

    @staticmethod
    def _padded(extractor: SequenceFeatureExtractor, waveforms: Sequence[np.ndarray]) -> Mapping[str, torch.Tensor]:
        return extractor(
            list(waveforms),
            sampling_rate=extractor.sampling_rate,
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
