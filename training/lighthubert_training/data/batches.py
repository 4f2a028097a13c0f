"""Samplers: which recordings make up a training step, and in which order.

A step is one list of items, which is cut into slices, a batch each, for processes and for accumulation: how many there
are of either changes nothing. Of a stream, every process reads a part of its own, and cuts its steps for accumulation.
What is random about an item follows from its epoch and index (see `Item`); the order of items follows from the seed
and, in a stream, from the position at which reading went on.
"""

import itertools
import logging
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from lighthubert_training.data.audio import duration
from lighthubert_training.data.recordings import Item, Unreadable
from modeling_lighthubert.errors import UserError


def _is_no_shuffle_warning(record: logging.LogRecord) -> bool:
    """datasets warns that the content of a shuffle buffer is lost. Ours has one row, and nothing is lost."""
    return "shuffle buffer" not in record.getMessage()


class BatchSampler(ABC, torch.utils.data.Sampler[list[Item]]):
    """Batches of recordings of similar length, epoch after epoch without end.

    Args:
        batch_size: largest number of recordings in a batch.
        max_batch_seconds: longest audio in a batch, with its padding; a batch of one recording may be longer.
        crop_seconds: length to which longer recordings are cropped.
        seed: of the order.
        slices: numbers of the batches of a step that this process takes.
        num_slices: number of batches in a step, of all processes.
        start: step to begin with.
    """

    NUM_BATCHES_SORTED = 50
    """Recordings are drawn at random, about this many batches at a time, and those are sorted by length."""

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
        return (batch for step in self.steps() for batch in self.own_batches(step))

    def own_batches(self, step: list[Item]) -> list[list[Item]]:
        """This process's batches of a step. Each has every length: `step` is sorted by it. One may be empty."""
        return [step[number :: self.num_slices] for number in self.slices]

    @abstractmethod
    def steps(self) -> Iterator[list[Item]]:
        """The items of each step from `start` on."""

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a sampler that starts with `step` has to be given besides, as JSON."""
        return {}

    def group(self, items: Sequence[Item], seconds: Sequence[float]) -> list[list[Item]]:
        """Steps of items of similar length, the shortest first. The last may have fewer items than slices.

        Args:
            seconds: length of each item.
        """
        steps: list[list[Item]] = []
        step: list[Item] = []
        for at in sorted(range(len(items)), key=lambda at: seconds[at]):
            # in this order an item is longer than those before it, and so the length of its padded batch
            longest = min(seconds[at], self.crop_seconds)
            per_slice = math.ceil((len(step) + 1) / self.num_slices)
            too_long = self.max_batch_seconds and per_slice * longest > self.max_batch_seconds
            if len(step) >= self.num_slices and (per_slice > self.batch_size or too_long):
                steps.append(step)
                step = []
            step.append(items[at])
        return [*steps, step] if step else steps

    def require(self, steps: Sequence[list[Item]], num_recordings: int) -> None:
        """Raises a `UserError` if recordings are too few for one step, or none can be read."""
        if not steps or num_recordings < self.num_slices:
            advice = "give more speech, or fewer processes and accumulated batches"
            raise UserError(f"{num_recordings} recordings are too few for {self.num_slices} batches a step: {advice}")


class RandomAccessSampler(BatchSampler):
    """Batches of recordings that are all at hand, put together anew in every epoch.

    Args:
        seconds: length of each recording. Those of length 0 are left out.
        options: of `BatchSampler`.
    """

    def __init__(self, seconds: Sequence[float], **options: Any):
        super().__init__(**options)
        self.seconds = seconds

    def steps(self) -> Iterator[list[Item]]:
        steps = (step for epoch in itertools.count() for step in self.steps_of_epoch(epoch))
        return itertools.islice(steps, self.start, None)

    def steps_of_epoch(self, epoch: int) -> list[list[Item]]:
        """All steps of an epoch, in order.

        Raises:
            UserError: the recordings are too few for one step.
        """
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


@dataclass
class Pool:
    """Recordings that are read from a stream together, to be sorted by length and put into batches.

    Attributes:
        position: where they begin, as JSON: `epoch`, the number of rows of that epoch before them, `num_read`, and
            `stream`, the state of the dataset there, `None` at the beginning of an epoch.
        audio: the rows, still encoded.
        seconds: of each; 0 where there is no header. Whoever decodes it finds out why.
    """

    position: dict[str, Any]
    audio: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class StreamSampler(BatchSampler):
    """Batches of a streamed dataset: its shards are read in random order, a pool of recordings at a time, and the next
    pool while the batches of one are used. Every process reads recordings of its own, in epochs of its own.

    Args:
        stream: rows with undecoded audio in the column `audio_column_name`.
        unreadable: is told how many recordings were read.
        state: what `state_dict` returned for `start`.
        process_index, num_processes: which part of the stream is read. With as many shards as processes, or more,
            each reads shards of its own; with fewer, all read everything and take every so many-th row.
        options: of `BatchSampler`; slices are those of this process.
    """

    POOL_BYTES = 2**28
    """Of the encoded recordings of a pool, at most, but for the last. Two pools are held at a time."""

    def __init__(
        self,
        stream: IterableDataset,
        audio_column_name: str,
        unreadable: Unreadable,
        state: Mapping[str, Any] | None = None,
        process_index: int = 0,
        num_processes: int = 1,
        **options: Any,
    ):
        super().__init__(**options)
        logging.getLogger("datasets.iterable_dataset").addFilter(_is_no_shuffle_warning)
        if stream.num_shards >= num_processes:
            stream = stream.shard(num_processes, process_index)
        else:
            stream = split_dataset_by_node(stream, process_index, num_processes)
        # with a buffer of one row only shards are shuffled, and the state of the dataset is all there is to keep
        self.stream = stream.shuffle(seed=self.seed, buffer_size=1)
        self.audio_column_name, self.unreadable = audio_column_name, unreadable
        self.process_index, self.num_processes = process_index, num_processes
        self.positions = [dict(state or {"first_step": 0, "epoch": 0, "num_read": 0, "stream": None})]

    def state_dict(self, step: int) -> dict[str, Any]:
        """The position of the pool that `step` belongs to, and the number of the pool's `first_step`."""
        while len(self.positions) > 1 and self.positions[1]["first_step"] <= step:
            self.positions.pop(0)
        return self.positions[0]

    def steps(self) -> Iterator[list[Item]]:
        at = self.positions[0]["first_step"]
        for pool in read_ahead(self._pools(**self.positions[0])):
            position, steps = pool.position, self._steps_of_pool(pool)
            if position["num_read"] == 0:
                self.require(steps, len(pool.audio))
            if any(position[name] != self.positions[-1][name] for name in ("epoch", "num_read")):
                self.positions.append({"first_step": at, **position})
            yield from steps[max(0, self.start - at) :]
            at += len(steps)

    def _pools(self, epoch: int, num_read: int, stream: dict[str, Any] | None, **_: Any) -> Iterator[Pool]:
        """Pools from a position on, without end."""
        while True:
            self.stream.set_epoch(epoch)
            if stream is not None:
                self.stream.load_state_dict(stream)
            rows = (row[self.audio_column_name] or {} for row in self.stream)
            while (pool := self._fill(Pool({"epoch": epoch, "num_read": num_read, "stream": stream}), rows)).audio:
                yield pool
                num_read, stream = num_read + len(pool.audio), self.stream.state_dict()
            if not num_read:
                raise UserError("no recordings in the streamed data, or none that the filters leave")
            epoch, num_read, stream = epoch + 1, 0, None

    def _fill(self, pool: Pool, rows: Iterator[dict[str, Any]]) -> Pool:
        """Takes rows until there are enough for so many batches, or bytes."""
        num_batches, num_bytes, seconds = self.NUM_BATCHES_SORTED * self.num_slices, 0, 0.0
        for audio in rows:
            pool.audio.append(audio)
            pool.seconds.append(duration(audio))
            num_bytes += len(audio.get("bytes") or b"")
            seconds += min(pool.seconds[-1], self.crop_seconds)
            enough = self.max_batch_seconds and seconds >= num_batches * self.max_batch_seconds
            if enough or len(pool.audio) >= self.pool_size or num_bytes >= self.POOL_BYTES:
                break
        return pool

    def _steps_of_pool(self, pool: Pool) -> list[list[Item]]:
        epoch, first = pool.position["epoch"], pool.position["num_read"]
        num_read = self.num_processes * (first + len(pool.audio))
        self.unreadable.num_recordings = max(self.unreadable.num_recordings, num_read)
        items = [
            Item(epoch, self.process_index + self.num_processes * index, audio)
            for index, audio in enumerate(pool.audio, start=first)
        ]
        steps = self.group(items, pool.seconds)
        random.Random(f"{self.seed}-{epoch}-{first}").shuffle(steps)
        return steps


def read_ahead(pools: Iterator[Pool]) -> Iterator[Pool]:
    """Prefetches the next pool in a background thread, for which the end of the process does not wait."""

    def read(coming: Future[Pool]) -> None:
        try:
            coming.set_result(next(pools))
        except BaseException as error:
            coming.set_exception(error)

    def begin() -> Future[Pool]:
        coming: Future[Pool] = Future()
        Thread(target=read, args=(coming,), daemon=True).start()
        return coming

    coming = begin()
    while True:
        pool = coming.result()
        coming = begin()
        yield pool


class EpochSampler(torch.utils.data.Sampler[list[int]]):
    """Batches of indices of recordings of similar length: the same batches in every epoch, as Trainer counts on, in
    another order.

    Args:
        seconds, options: of `RandomAccessSampler`.

    Raises:
        UserError: the recordings are too few for one step.
    """

    def __init__(self, seconds: Sequence[float], **options: Any):
        self.sampler = RandomAccessSampler(seconds, **options)
        self.epoch, self.steps = 0, self.sampler.steps_of_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the steps."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.steps) * len(self.sampler.slices)

    def __iter__(self) -> Iterator[list[int]]:
        steps = list(self.steps)
        random.Random(f"{self.sampler.seed}-{self.epoch}").shuffle(steps)
        for step in steps:
            for batch in self.sampler.own_batches(step):
                yield [item.index for item in batch]
