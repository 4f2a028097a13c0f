"""Batches put similar lengths together, follow from the seed, and go on where they stopped, streamed or not."""

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence

import datasets
import pytest
from datasets import Dataset, IterableDataset, concatenate_datasets
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from speech import RATE, TONE, at_hand, encoded, undecoded
from torch.utils.data import DataLoader
from transformers import Wav2Vec2FeatureExtractor

from lighthubert_training.data import batches as batches_module
from lighthubert_training.data.batches import BatchSampler, EpochSampler, RandomAccessSampler, StreamSampler
from lighthubert_training.data.collators import DistillationCollator
from lighthubert_training.data.recordings import CroppedRecordings, Item, Unreadable
from lighthubert_training.data.sources import DataArguments, load_speech
from modeling_lighthubert import LightHubertConfig


SECONDS = [random.Random(0).uniform(1, 35) for _ in range(2000)]  # as in LibriSpeech


def sampler(seconds=SECONDS, **settings) -> BatchSampler:
    defaults = {"batch_size": 8, "max_batch_seconds": None, "crop_seconds": 40.0, "seed": 0}
    return RandomAccessSampler(seconds, **(defaults | settings))


def batches(count: int, seconds=SECONDS, **settings) -> list[list[Item]]:
    return list(itertools.islice(sampler(seconds, **settings), count))


def test_an_epoch_has_nearly_every_recording_once():
    items = [item for batch in batches(250) for item in batch]
    assert len(set(items)) == 2000
    assert [item.epoch for item in batches(260)[255]] == [1] * 8


def padded_seconds(batch: Sequence[Item], crop: float = 40.0) -> float:
    return len(batch) * max(min(SECONDS[item.index], crop) for item in batch)


def test_batches_put_similar_lengths_together_and_keep_below_their_seconds():
    drawn = batches(200, batch_size=64, max_batch_seconds=100)
    assert max(map(padded_seconds, drawn)) <= 100
    spoken = sum(SECONDS[item.index] for batch in drawn for item in batch)
    assert spoken > 0.9 * sum(map(padded_seconds, drawn))


def test_long_recordings_count_as_cropped():
    drawn = batches(100, batch_size=64, max_batch_seconds=100, crop_seconds=10.0)
    assert max(padded_seconds(batch, crop=10.0) for batch in drawn) <= 100
    assert max(map(len, drawn)) >= 10


def test_a_resumed_sampler_goes_on_where_it_stopped():
    assert batches(20, start=280) == batches(300)[280:]


def test_processes_and_accumulated_batches_share_the_recordings_of_a_step():
    together = batches(10, batch_size=8)
    slices = [batches(10, batch_size=2, slices=[number], num_slices=4) for number in range(4)]
    accumulated = batches(40, batch_size=2, slices=range(4), num_slices=4)
    for step, batch in enumerate(together):
        assert sorted(batch) == sorted(item for each in slices for item in each[step])
        assert sorted(batch) == sorted(item for each in accumulated[4 * step : 4 * step + 4] for item in each)


def test_recordings_of_no_length_are_left_out_and_too_few_are_refused():
    assert {item.index for batch in batches(4, [0, 5, 0, 7, 6], batch_size=1) for item in batch} == {1, 3, 4}
    with pytest.raises(ValueError, match="2 recordings are too few for 4 batches a step"):
        batches(1, [1, 2], num_slices=4)


def stream(num_sources: int = 2, broken: Sequence[int] = ()):
    """Recordings of 20 lengths, in shards of several sources; those numbered `broken` have no header."""
    sources = []
    for source in range(num_sources):
        rows = []
        for number in range(20 * source, 20 * source + 20):
            audio = encoded(TONE[: 1000 + 200 * (number % 20)], format="WAV") if number not in broken else b"no audio"
            rows.append({"audio": {"bytes": audio, "path": f"{number}.wav"}})
        sources.append(undecoded(rows).to_iterable_dataset(num_shards=2))
    return concatenate_datasets(sources)


def stream_sampler(
    source=None, pool: int = 14, unreadable: Unreadable | None = None, kind=StreamSampler, **settings
) -> StreamSampler:
    defaults = {"batch_size": 3, "max_batch_seconds": None, "crop_seconds": 40.0, "seed": 0}
    drawn = kind(stream() if source is None else source, "audio", unreadable or Unreadable(1.0), **defaults | settings)
    drawn.pool_size = pool
    return drawn


def names(batch: Sequence[Item]) -> list[str]:
    return [item.audio["path"] for item in batch]


def test_a_streamed_epoch_has_every_recording_once_and_the_next_in_another_order():
    items = [item for batch in itertools.islice(stream_sampler(batch_size=1), 80) for item in batch]
    first, second = ([item.audio["path"] for item in items if item.epoch == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == sorted(f"{number}.wav" for number in range(40))
    assert first != second
    assert len({(item.epoch, item.index) for item in items}) == 80


@pytest.mark.parametrize("ahead", [0, 7])
@pytest.mark.parametrize("stopped_after", [1, 4, 5, 9, 13, 14, 15, 27, 28, 29, 40])
def test_a_resumed_stream_goes_on_where_it_stopped(stopped_after, ahead):
    """However far ahead it was read by then."""
    expected = list(itertools.islice(stream_sampler(), 50))
    stopped = stream_sampler()
    reader = iter(stopped)
    for _ in range(stopped_after + ahead):
        next(reader)
    state = json.loads(json.dumps(stopped.state_dict(stopped_after)))
    resumed = stream_sampler(state=state, start=stopped_after)
    assert list(itertools.islice(resumed, 50 - stopped_after)) == expected[stopped_after:]


def test_a_filtered_stream_goes_on_where_it_stopped():
    def odd() -> IterableDataset:
        return stream().filter(lambda audio: int(audio["path"].partition(".")[0]) % 2, input_columns="audio")

    stopped = stream_sampler(odd(), pool=7)
    expected = list(itertools.islice(stopped, 20))
    state = json.loads(json.dumps(stopped.state_dict(12)))
    resumed = stream_sampler(odd(), pool=7, state=state, start=12)
    assert list(itertools.islice(resumed, 8)) == expected[12:]


def test_a_stream_of_parquet_files_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # seconds at the end of every epoch
    for number, row in enumerate(stream(num_sources=1)):
        undecoded([row]).to_parquet(tmp_path / f"{number}.parquet")
    arguments = DataArguments(train_file=[str(path) for path in tmp_path.glob("*.parquet")], streaming=True)
    stopped = stream_sampler(load_speech(arguments, training=True))
    expected = list(itertools.islice(stopped, 10))
    state = json.loads(json.dumps(stopped.state_dict(5)))
    assert state["stream"] is not None
    resumed = stream_sampler(load_speech(arguments, training=True), state=state, start=5)
    assert list(itertools.islice(resumed, 5)) == expected[5:]


@pytest.mark.parametrize("num_processes", [2, 3, 4, 8], ids=lambda number: f"{number}-processes-4-shards")
def test_a_streamed_recording_is_read_by_one_process(num_processes):
    epochs = []
    for process in range(num_processes):
        part = stream_sampler(batch_size=1, process_index=process, num_processes=num_processes)
        own = itertools.takewhile(lambda batch: not batch[0].epoch, part)
        epochs.append([item for batch in own for item in batch])
    assert sorted(names(sum(epochs, []))) == sorted(f"{number}.wav" for number in range(40))
    assert all(epochs)
    assert len({item.index for epoch in epochs for item in epoch}) == 40, "crops and masks follow from it"


@pytest.mark.parametrize(
    ("options", "most"),
    [({"pool": 3}, 3), ({"max_batch_seconds": 1.0}, 9), ({"POOL_BYTES": 20_000}, 5)],
    ids=["recordings", "seconds", "bytes"],
)
def test_a_pool_of_a_stream_is_bounded(options, most):
    """Recordings are of 0.06 to 0.3 s, and of 2 to 9.6 KB."""

    class Small(StreamSampler):
        NUM_BATCHES_SORTED = 2
        POOL_BYTES = options.pop("POOL_BYTES", StreamSampler.POOL_BYTES)

    sampler = stream_sampler(kind=Small, **{"pool": 100} | options)
    pools = list(itertools.takewhile(lambda pool: not pool.position["epoch"], sampler._pools(**sampler.positions[0])))
    assert sum(len(pool.audio) for pool in pools) == 40
    assert most / 2 < max(len(pool.audio) for pool in pools) <= 2 * most


def test_a_process_ends_while_a_stream_is_read():
    """The next pool, which takes minutes, is not waited for, but for the row that datasets is reading."""
    program = """
import time
from datasets import IterableDataset
from lighthubert_training.data.batches import StreamSampler
from lighthubert_training.data.recordings import Unreadable
from speech import TONE, encoded

def rows():
    audio = encoded(TONE, format="WAV")
    for number in range(800):
        time.sleep(0.0 if number < 200 else 1.0)
        yield {"audio": {"bytes": audio, "path": f"{number}.wav"}}

options = {"batch_size": 2, "max_batch_seconds": None, "crop_seconds": 10.0, "seed": 0}
sampler = StreamSampler(IterableDataset.from_generator(rows), "audio", Unreadable(0.1), **options)
sampler.pool_size = 200
print(len(next(iter(sampler))))
"""
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | paths, capture_output=True, timeout=60)
    assert done.stdout.split() == [b"2"], done.stderr


def test_streamed_recordings_without_a_header_reach_the_batch_which_names_them():
    read = {name for batch in itertools.islice(stream_sampler(stream(broken=[7])), 14) for name in names(batch)}
    assert "7.wav" in read
    unreadable = Unreadable(0.1)
    parts = stream_sampler(unreadable=unreadable, process_index=1, num_processes=2)
    next(iter(parts))
    assert unreadable.num_recordings == 28, "a pool of each process"


def test_a_streamed_row_without_audio_reaches_the_batch_as_one_that_cannot_be_read():
    rows = Dataset.from_list([{"audio": {"bytes": encoded(TONE, format="WAV"), "path": "0.wav"}}, {"audio": None}])
    batch = next(iter(stream_sampler(rows.to_iterable_dataset(), batch_size=2)))
    recordings = [CroppedRecordings(None, RATE, 1.0, seed=0)[item] for item in batch]
    assert sorted(each.waveform is None for each in recordings) == [False, True]


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="no recordings in the streamed data"):
        next(iter(stream_sampler(stream().filter(lambda row: False))))


@pytest.mark.parametrize("streamed", [False, True], ids=["at-hand", "streamed"])
def test_workers_change_nothing_in_the_batches(streamed):
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)

    def drawn(num_workers: int) -> list[list[str]]:
        rows = list(stream())
        loader = DataLoader(
            CroppedRecordings(None if streamed else at_hand(rows), RATE, 1.0, seed=0),
            batch_sampler=stream_sampler() if streamed else sampler(list(range(1, 41)), batch_size=4),
            collate_fn=DistillationCollator(extractor, extractor, LightHubertConfig()),
            num_workers=num_workers,
        )
        return [batch["names"] for batch in itertools.islice(loader, 12)]

    assert drawn(2) == drawn(0)


def test_a_last_batch_may_be_empty():
    """Of three recordings on two processes, one has none of the second step."""
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    drawn = [
        DataLoader(
            CroppedRecordings(at_hand(list(stream())[:3]), RATE, 1.0, seed=0),
            batch_sampler=sampler([1, 1, 1], batch_size=1, slices=[number], num_slices=2),
            collate_fn=DistillationCollator(extractor, extractor, LightHubertConfig()),
        )
        for number in (0, 1)
    ]
    sizes = [[len(batch.get("names", ())) for batch in itertools.islice(loader, 2)] for loader in drawn]
    assert sorted(map(sum, sizes)) == [1, 2]


def epoch_sampler(**settings) -> EpochSampler:
    defaults = {"batch_size": 8, "max_batch_seconds": 100, "crop_seconds": 40.0, "seed": 0}
    return EpochSampler(SECONDS, **(defaults | settings))


def test_an_epoch_of_indices_has_every_recording_once_in_batches_of_similar_length():
    seconds = [1.0 + 0.1 * (index * 7 % 40) for index in range(40)]
    batches = list(EpochSampler(seconds, batch_size=4, max_batch_seconds=None, crop_seconds=float("inf"), seed=3))
    assert sorted(index for batch in batches for index in batch) == list(range(40))
    for batch in batches:
        assert max(seconds[index] for index in batch) - min(seconds[index] for index in batch) < 0.5


def test_a_batch_of_indices_holds_no_more_seconds_than_allowed():
    batches = list(epoch_sampler(batch_size=40))
    assert max(len(batch) * max(SECONDS[index] for index in batch) for batch in batches) <= 100


def test_an_epoch_of_numbered_steps_has_the_same_batches_as_the_one_before_in_another_order():
    numbered = epoch_sampler()
    first = list(numbered)
    numbered.set_epoch(1)
    second = list(numbered)
    assert len(first) == len(second) == len(numbered)
    assert first != second
    assert sorted(map(sorted, first)) == sorted(map(sorted, second))
    assert len({index for batch in first for index in batch}) > 0.99 * len(SECONDS)
    numbered.set_epoch(0)
    assert list(numbered) == first


def test_processes_share_the_steps_of_an_epoch():
    together = list(epoch_sampler(max_batch_seconds=None))
    slices = [
        list(epoch_sampler(max_batch_seconds=None, batch_size=4, slices=[number], num_slices=2)) for number in (0, 1)
    ]
    assert [sorted(batch) for batch in together] == [sorted(one + two) for one, two in zip(*slices, strict=True)]


# Whatever the lengths are


@st.composite
def splits(draw) -> dict:
    """Lengths of recordings, 0 of those without a header, and how a step is split over processes and accumulation."""
    seconds = draw(st.lists(st.just(0.0) | st.floats(0.1, 60), max_size=40))
    processes, accumulated = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "seconds": seconds,
        "used": {index for index, length in enumerate(seconds) if length},
        "slices": [range(each * accumulated, (each + 1) * accumulated) for each in range(processes)],
        "stop": draw(st.integers(0, 40)),
        "options": {
            "batch_size": draw(st.integers(1, 5)),
            "max_batch_seconds": draw(st.none() | st.floats(1, 100)),
            "crop_seconds": draw(st.floats(1, 60)),
            "seed": draw(st.integers(0, 9)),
            "num_slices": processes * accumulated,
        },
    }


def check_batches(drawn: list[list[int]], seconds: Sequence[float], used: set[int], options: dict) -> None:
    """Asserts that the batches of all processes hold the `used` recordings once, and no more than they may."""
    assert sorted(index for batch in drawn for index in batch) == sorted(used)
    for batch in drawn:
        longest = max((min(seconds[index], options["crop_seconds"]) for index in batch), default=0.0)
        assert len(batch) <= options["batch_size"]
        assert len(batch) < 2 or len(batch) * longest <= (options["max_batch_seconds"] or 1e9)


@given(splits())
def test_any_recordings_are_each_in_one_batch_of_an_epoch_however_it_is_split_and_wherever_it_is_resumed(split):
    class SmallPools(RandomAccessSampler):
        NUM_BATCHES_SORTED = 2

    seconds, used, options = split["seconds"], split["used"], split["options"]
    samplers = [SmallPools(seconds, slices=slices, **options) for slices in split["slices"]]
    if len(used) < options["num_slices"]:
        with pytest.raises(ValueError, match="too few"):
            next(iter(samplers[0]))
        return
    num_steps, accumulated = len(samplers[0].steps_of_epoch(0)), len(split["slices"][0])
    start = min(split["stop"], num_steps)
    drawn = []
    for sampler, slices in zip(samplers, split["slices"], strict=True):
        own = list(itertools.islice(sampler, num_steps * accumulated))
        resumed = SmallPools(seconds, slices=slices, start=start, **options)
        assert list(itertools.islice(resumed, (num_steps - start) * accumulated)) == own[start * accumulated :]
        drawn += own
    check_batches([[item.index for item in batch] for batch in drawn], seconds, used, options)
    numbered = [EpochSampler(seconds, slices=slices, **options) for slices in split["slices"]]
    check_batches([batch for sampler in numbered for batch in sampler], seconds, used, options)
    assert [len(list(sampler)) for sampler in numbered] == list(map(len, numbered))


@settings(max_examples=25)
@given(splits())
def test_any_streamed_recordings_are_each_in_one_batch_of_an_epoch_however_it_is_split_and_resumed(split):
    seconds, processes = [length for length in split["seconds"] if length], len(split["slices"])
    accumulated, drawn = len(split["slices"][0]), list[list[Item]]()
    options = split["options"] | {"slices": range(accumulated), "num_slices": accumulated}
    assume(len(seconds) >= processes * accumulated)

    def sampler(process: int, **start) -> StreamSampler:
        rows = [{"audio": {"path": str(number)}} for number in range(len(seconds))]
        drawn = StreamSampler(
            Dataset.from_list(rows).to_iterable_dataset(),
            *("audio", Unreadable(1.0)),
            **{"process_index": process, "num_processes": processes} | options | start,
        )
        drawn.pool_size = 2 * options["batch_size"] * accumulated
        return drawn

    def first_epoch(sampler: StreamSampler) -> Iterator[list[Item]]:
        batches = iter(sampler)
        while (step := list(itertools.islice(batches, accumulated))) and not any(
            item.epoch for batch in step for item in batch
        ):
            yield from step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "duration", lambda audio: seconds[int(audio["path"])])
        for process in range(processes):
            own = list(first_epoch(sampler(process)))
            stopped = sampler(process)
            start = min(split["stop"], len(own) // accumulated)
            list(itertools.islice(stopped, start * accumulated))
            state = json.loads(json.dumps(stopped.state_dict(start)))
            assert list(first_epoch(sampler(process, state=state, start=start))) == own[start * accumulated :]
            drawn += own
    check_batches(
        [[int(name) for name in names(batch)] for batch in drawn], seconds, set(range(len(seconds))), options
    )
