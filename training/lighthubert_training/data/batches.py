"""Which recordings make up a training step, and in which order.

A step is one list of items, dealt to processes and accumulated batches, so how many there are of these changes
nothing. What is random about an item follows from the seed, the epoch and the recording; the order from the seed and,
of a stream, from the position at which reading went on.
"""

import itertools
import logging
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from datasets import IterableDataset

from lighthubert_training.data.audio import duration
from lighthubert_training.data.recordings import NO_HEADER, Item, Unreadable, recording_name
from modeling_lighthubert.errors import UserError


def _is_no_shuffle_warning(record: logging.LogRecord) -> bool:
    """datasets warns that the content of a shuffle buffer is lost; ours has one row, and nothing is lost."""
    return "shuffle buffer" not in record.getMessage()


class BatchSampler(ABC, torch.utils.data.Sampler[list[Item]]):
    """Batches of recordings of similar length, epoch after epoch without end.

    Args:
        batch_size: recordings in a batch.
        max_batch_seconds: no more audio in a batch than this, with its padding, but at least one recording.
        crop_seconds: longer recordings count as cropped to this.
        slices: which of the `num_slices` batches of a step this process takes.
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
        slices: Sequence[int] = (0,),
        num_slices: int = 1,
        start: int = 0,
    ):
        self.batch_size, self.max_batch_seconds, self.crop_seconds = batch_size, max_batch_seconds, crop_seconds
        self.seed, self.slices, self.num_slices, self.start = seed, slices, num_slices, start
        self.pool_size = self.NUM_BATCHES_SORTED * batch_size * num_slices

    def __iter__(self) -> Iterator[list[Item]]:
        for items in self.steps():
            for number in self.slices:
                yield items[number :: self.num_slices]

    @abstractmethod
    def steps(self) -> Iterator[list[Item]]:
        """The items of each step from `start` on."""

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a sampler that begins with `step` has to know besides, as JSON."""
        return {}

    def group(self, items: Sequence[Item], seconds: Sequence[float]) -> list[list[Item]]:
        """Steps of items of similar length, shortest first. What is left over at the end waits for another epoch."""
        steps: list[list[Item]] = []
        step: list[Item] = []
        for at in sorted(range(len(items)), key=lambda at: seconds[at]):
            # sorted upwards: the newest recording is the longest, and so the length of the padded batch
            longest = min(seconds[at], self.crop_seconds)
            per_slice = math.ceil((len(step) + 1) / self.num_slices)
            too_long = self.max_batch_seconds and per_slice * longest > self.max_batch_seconds
            if len(step) >= self.num_slices and (per_slice > self.batch_size or too_long):
                steps.append(step)
                step = []
            step.append(items[at])
        return [*steps, step] if len(step) >= self.num_slices else steps

    def require(self, steps: Sequence[list[Item]], num_recordings: int) -> None:
        """
        Raises:
            UserError: there is no step.
        """
        if not steps:
            raise UserError(
                f"{num_recordings} recordings are too few for {self.num_slices} batches a step: give more speech, or"
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

    def steps(self) -> Iterator[list[Item]]:
        return itertools.islice(
            (step for epoch in itertools.count() for step in self._of_epoch(epoch)), self.start, None
        )

    def _of_epoch(self, epoch: int) -> list[list[Item]]:
        rng = random.Random(f"{self.seed}-{epoch}")
        order = [index for index, length in enumerate(self.seconds) if length > 0]
        rng.shuffle(order)
        steps = []
        for at in range(0, len(order), self.pool_size):
            pool = order[at : at + self.pool_size]
            steps += self.group([Item(epoch, index) for index in pool], [self.seconds[index] for index in pool])
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
        logging.getLogger("datasets.iterable_dataset").addFilter(_is_no_shuffle_warning)
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

    def steps(self) -> Iterator[list[Item]]:
        at = self.positions[0]["first_step"]
        for pool in read_ahead(self._pools(self.positions[0])):
            steps = self._of_pool(pool)
            if pool.position["num_read"] == 0:
                self.require(steps, len(pool.rows))
            known = self.positions[-1]
            if (pool.position["epoch"], pool.position["num_read"]) != (known["epoch"], known["num_read"]):
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
                raise UserError("no recordings in the streamed data, or none that the filters leave")
            epoch, num_read, state = epoch + 1, 0, None

    def _of_pool(self, pool: Pool) -> list[list[Item]]:
        epoch, first = pool.position["epoch"], pool.position["num_read"]
        self.unreadable.num_recordings = max(self.unreadable.num_recordings, first + len(pool.rows))
        items, seconds = [], []
        for index, audio in enumerate(pool.rows, start=first):
            if length := duration(audio):
                items.append(Item(epoch, index, audio))
                seconds.append(length)
            else:
                self.unreadable.add(recording_name(audio, index), NO_HEADER)
        steps = self.group(items, seconds)
        random.Random(f"{self.seed}-{epoch}-{first}").shuffle(steps)
        return steps


def read_ahead(pools: Iterator[Pool]) -> Iterator[Pool]:
    """Prefetches the next pool in a background thread."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(next, pools)
        while True:
            pool = coming.result()
            coming = reader.submit(next, pools)
            yield pool


class EpochSampler(RandomAccessSampler):
    """Batches of similar length, the same ones in every epoch, as Trainer counts on, each time in another order.

    Args:
        options: of `BatchSampler`.
    """

    def __init__(self, seconds: Sequence[float], **options):
        super().__init__(seconds, **options)
        self.epoch, self.steps_of_epoch = 0, self._of_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.steps_of_epoch) * len(self.slices)

    def __iter__(self) -> Iterator[list[int]]:
        steps = list(self.steps_of_epoch)
        random.Random(f"{self.seed}-{self.epoch}").shuffle(steps)
        for step in steps:
            for number in self.slices:
                yield [item.index for item in step[number :: self.num_slices]]
