"""Batches put similar lengths together, follow from the seed, and go on where they stopped, streamed or not."""

import io
import itertools
import json
import random
from collections.abc import Sequence

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, IterableDataset, concatenate_datasets
from test_speech_data import RATE, TONE, encoded
from torch.utils.data import DataLoader
from transformers import Wav2Vec2FeatureExtractor

from lighthubert_training.data.batches import (
    BatchSampler,
    DistillationCollator,
    RandomAccessSampler,
    StreamSampler,
    Unreadable,
    Visit,
    Visits,
    durations,
)
from lighthubert_training.data.sources import DataArguments, SpeechDataset, load_speech


SECONDS = [random.Random(0).uniform(1, 35) for _ in range(2000)]  # as in LibriSpeech
EXTRACTOR = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)


def sampler(seconds=SECONDS, **settings) -> BatchSampler:
    defaults = {"batch_size": 8, "max_batch_seconds": None, "crop_seconds": 40.0, "seed": 0}
    return RandomAccessSampler(seconds, **(defaults | settings))


def batches(count: int, seconds=SECONDS, **settings) -> list[list[Visit]]:
    return list(itertools.islice(sampler(seconds, **settings), count))


def test_an_epoch_visits_nearly_every_recording_once():
    visits = [visit for batch in batches(250) for visit in batch]
    assert len(set(visits)) == 2000
    assert [visit.epoch for visit in batches(260)[255]] == [1] * 8


def padded_seconds(batch: Sequence[Visit], crop: float = 40.0) -> float:
    return len(batch) * max(min(SECONDS[visit.index], crop) for visit in batch)


def test_batches_put_similar_lengths_together_and_keep_below_their_seconds():
    drawn = batches(200, batch_size=64, max_batch_seconds=100)
    assert max(map(padded_seconds, drawn)) <= 100
    spoken = sum(SECONDS[visit.index] for batch in drawn for visit in batch)
    assert spoken > 0.9 * sum(map(padded_seconds, drawn))


def test_long_recordings_count_as_cropped():
    drawn = batches(100, batch_size=64, max_batch_seconds=100, crop_seconds=10.0)
    assert max(padded_seconds(batch, crop=10.0) for batch in drawn) <= 100
    assert max(map(len, drawn)) >= 10


def test_a_resumed_sampler_goes_on_where_it_stopped():
    assert batches(20, start=280) == batches(300)[280:]


def test_processes_and_accumulated_batches_share_the_recordings_of_a_step():
    together = batches(10, batch_size=8)
    shares = [batches(10, batch_size=2, shares=[share], num_shares=4) for share in range(4)]
    accumulated = batches(40, batch_size=2, shares=range(4), num_shares=4)
    for step, batch in enumerate(together):
        assert sorted(batch) == sorted(visit for share in shares for visit in share[step])
        assert sorted(batch) == sorted(visit for part in accumulated[4 * step : 4 * step + 4] for visit in part)


def test_recordings_of_no_length_are_left_out_and_too_few_are_refused():
    assert {visit.index for batch in batches(4, [0, 5, 0, 7, 6], batch_size=1) for visit in batch} == {1, 3, 4}
    with pytest.raises(ValueError, match="2 recordings are too few for 4 batches a step"):
        batches(1, [1, 2], num_shares=4)


def stream(num_sources: int = 2, broken: Sequence[int] = ()):
    """Recordings of 20 lengths, in shards of several sources; those numbered `broken` have no header."""
    sources = []
    for source in range(num_sources):
        rows = []
        for number in range(20 * source, 20 * source + 20):
            audio = encoded(TONE[: 1000 + 200 * (number % 20)], format="WAV") if number not in broken else b"no audio"
            rows.append({"audio": {"bytes": audio, "path": f"{number}.wav"}})
        dataset = Dataset.from_list(rows).cast_column("audio", Audio(decode=False))
        sources.append(dataset.to_iterable_dataset(num_shards=2))
    return concatenate_datasets(sources)


def stream_sampler(source=None, pool: int = 14, unreadable: Unreadable | None = None, **settings) -> StreamSampler:
    defaults = {"batch_size": 3, "max_batch_seconds": None, "crop_seconds": 40.0, "seed": 0}
    drawn = StreamSampler(
        stream() if source is None else source, "audio", unreadable or Unreadable(1.0), **defaults | settings
    )
    drawn.pool_size = pool
    return drawn


def names(batch: Sequence[Visit]) -> list[str]:
    return [visit.audio["path"] for visit in batch]


def test_a_streamed_epoch_visits_every_recording_once_and_the_next_in_another_order():
    visits = [visit for batch in itertools.islice(stream_sampler(batch_size=1), 80) for visit in batch]
    first, second = ([visit.audio["path"] for visit in visits if visit.epoch == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == sorted(f"{number}.wav" for number in range(40))
    assert first != second
    assert len({(visit.epoch, visit.index) for visit in visits}) == 80


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


def test_a_stream_of_parquet_files_goes_on_where_it_stopped(tmp_path):
    for number, row in enumerate(stream()):
        file = Dataset.from_list([row]).cast_column("audio", Audio(decode=False))
        file.to_parquet(tmp_path / f"{number}.parquet")
    arguments = DataArguments(train_file=[str(path) for path in tmp_path.glob("*.parquet")], streaming=True)
    stopped = stream_sampler(load_speech(arguments, training=True))
    expected = list(itertools.islice(stopped, 10))
    state = json.loads(json.dumps(stopped.state_dict(7)))
    assert state["stream"] is not None
    resumed = stream_sampler(load_speech(arguments, training=True), state=state, start=7)
    assert list(itertools.islice(resumed, 3)) == expected[7:]


def test_processes_share_the_recordings_of_a_streamed_step():
    together = list(itertools.islice(stream_sampler(batch_size=4), 8))
    shares = [
        list(itertools.islice(stream_sampler(batch_size=2, shares=[share], num_shares=2), 8)) for share in (0, 1)
    ]
    for step, batch in enumerate(together):
        assert sorted(names(batch)) == sorted(names(shares[0][step]) + names(shares[1][step]))


def test_streamed_recordings_without_a_header_are_named_and_too_many_stop_the_run(caplog):
    few = stream_sampler(stream(broken=[7]), unreadable=Unreadable(0.1))
    read = {name for batch in itertools.islice(few, 14) for name in names(batch)}
    assert "7.wav" not in read
    assert "left out, because it cannot be read: 7.wav" in caplog.text
    many = stream_sampler(stream(broken=range(12)), unreadable=Unreadable(0.1))
    with pytest.raises(ValueError, match="recordings cannot be read, more than a share of 0.1"):
        list(itertools.islice(many, 14))


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="no recordings in the streamed data"):
        next(iter(stream_sampler(stream().filter(lambda row: False))))


def at_hand(rows: Sequence[dict]) -> SpeechDataset:
    return SpeechDataset(Dataset.from_list(list(rows)).cast_column("audio", Audio(decode=False)), "audio", RATE)


def broken_speech() -> SpeechDataset:
    """Ten recordings; number 3 is cut after its header, number 7 has no header."""
    whole = encoded(TONE, format="FLAC")
    rows = [{"audio": {"bytes": whole, "path": f"tone-{index}.flac"}} for index in range(10)]
    rows[3]["audio"]["bytes"], rows[7]["audio"]["bytes"] = whole[: len(whole) // 2], b"no audio"
    return at_hand(rows)


def test_long_recordings_are_cropped_alike_at_every_visit_of_an_epoch():
    visits = Visits(broken_speech(), RATE, crop_seconds=0.1, seed=0)
    recording = visits[Visit(3, 1)]
    assert (recording.visit, recording.name, len(recording.waveform)) == ((3, 1), "tone-1.flac", 1600)
    np.testing.assert_array_equal(recording.waveform, visits[Visit(3, 1)].waveform)
    assert not np.array_equal(recording.waveform, visits[Visit(4, 1)].waveform)


def test_a_visit_may_bring_its_audio():
    file = io.BytesIO()
    soundfile.write(file, TONE, RATE, format="WAV")
    recording = Visits(None, RATE, 1.0, seed=0)[Visit(0, 5, {"bytes": file.getvalue(), "path": None})]
    assert recording.name == "recording 5"
    np.testing.assert_allclose(recording.waveform, TONE, atol=1e-4)


def test_recordings_that_cannot_be_read_are_left_out_and_named():
    speech = broken_speech()
    assert [index for index, seconds in enumerate(durations(speech)) if seconds == 0] == [7]
    visits, collator = Visits(speech, RATE, 1.0, seed=0), DistillationCollator(EXTRACTOR, EXTRACTOR, 400)
    batch = collator([visits[Visit(0, index)] for index in (2, 7, 5)])
    assert batch["visits"].tolist() == [[0, 2], [0, 5]]
    assert batch["names"] == ["tone-2.flac", "tone-5.flac"]
    assert [name for name, _ in batch["unreadable"]] == ["tone-7.flac"]
    assert set(collator([visits[Visit(0, 3)]])) == {"unreadable"}


@pytest.mark.parametrize("streamed", [False, True], ids=["at-hand", "streamed"])
def test_workers_change_nothing_in_the_batches(streamed):
    def drawn(num_workers: int) -> list[list[str]]:
        rows = list(stream())
        loader = DataLoader(
            Visits(None if streamed else at_hand(rows), RATE, 1.0, seed=0),
            batch_sampler=stream_sampler() if streamed else sampler(list(range(1, 41)), batch_size=4),
            collate_fn=DistillationCollator(EXTRACTOR, EXTRACTOR, 400),
            num_workers=num_workers,
        )
        return [batch["names"] for batch in itertools.islice(loader, 12)]

    assert drawn(2) == drawn(0)


def test_a_few_unreadable_recordings_are_logged_and_too_many_stop_the_run(caplog):
    unreadable = Unreadable(max_share=0.1, num_recordings=10)
    unreadable.add("tone-7.flac", "no header")
    unreadable.add("tone-7.flac", "no header")
    assert caplog.text.count("tone-7.flac (no header)") == 1
    with pytest.raises(ValueError, match=r"2 of 10 recordings cannot be read.*tone-3.flac \(cut off\)"):
        unreadable.add("tone-3.flac", "cut off")


def test_student_and_teacher_get_what_their_feature_extractors_say():
    raw = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    rows = [
        {"audio": {"bytes": encoded(wave, format="WAV", subtype="FLOAT"), "path": None}}
        for wave in (TONE, TONE[:4000] + 0.25, TONE[:100])
    ]
    visits = Visits(at_hand(rows), RATE, 1.0, seed=0)
    batch = DistillationCollator(EXTRACTOR, raw, 400)([visits[Visit(0, index)] for index in range(3)])
    np.testing.assert_array_equal(batch["teacher_input_values"][0], TONE)
    assert batch["attention_mask"].sum(-1).tolist() == [8000, 4000, 400]
    for row, length in enumerate((8000, 4000, 400)):
        values = batch["input_values"][row, :length]
        assert abs(float(values.mean())) < 1e-3
        assert float(values.std()) == pytest.approx(1, abs=1e-2)
