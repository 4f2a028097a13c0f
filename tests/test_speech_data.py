"""Every form that recordings come in becomes the same waveform, and nothing unreadable passes."""

import io
import itertools
import random

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset
from transformers import Wav2Vec2FeatureExtractor

from speech_data import (
    BatchSampler,
    DataArguments,
    DistillationCollator,
    SpeechDataset,
    Unreadable,
    Visits,
    load_speech,
    load_waveform,
)


RATE = 16_000
TONE = np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE).astype(np.float32) * 0.5


def encoded(waveform: np.ndarray, rate: int = RATE, **format) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, **format)
    return file.getvalue()


class Decoder:
    """What a decoded torchcodec column gives: samples as (channels, time)."""

    def get_all_samples(self):
        import torch

        class Samples:
            data, sample_rate = torch.from_numpy(np.stack([TONE, TONE])), RATE

        return Samples()


@pytest.mark.parametrize(
    "audio",
    [
        encoded(TONE, format="WAV"),
        {"bytes": encoded(TONE, format="FLAC"), "path": None},
        {"array": TONE, "sampling_rate": RATE},
        {"array": (TONE * 32767).astype(np.int16), "sampling_rate": RATE},
        {"array": np.stack([TONE, TONE], axis=1), "sampling_rate": RATE},
        Decoder(),
    ],
    ids=["bytes", "row", "array", "int16", "stereo", "decoder"],
)
def test_every_form_of_audio_becomes_the_same_waveform(audio):
    waveform = load_waveform(audio, RATE)
    assert waveform.dtype == np.float32
    np.testing.assert_allclose(waveform, TONE, atol=1e-4)


@pytest.mark.parametrize("format", [{"format": "OGG", "subtype": "OPUS"}, {"format": "MP3"}])
def test_compressed_audio_is_read(format):
    waveform = load_waveform(encoded(TONE, **format), RATE)
    assert abs(np.abs(waveform).max() - 0.5) < 0.1


def test_a_path_is_read_and_resampled(tmp_path):
    path = tmp_path / "tone.wav"
    soundfile.write(path, TONE[::2], RATE // 2)
    waveform = load_waveform(str(path), RATE)
    assert len(waveform) == len(TONE)
    np.testing.assert_allclose(waveform[1000:-1000], TONE[1000:-1000], atol=0.02)


@pytest.mark.parametrize("samples", [[], [np.nan, 0.0], [np.inf]])
def test_empty_and_broken_audio_is_refused(samples):
    with pytest.raises(ValueError, match="empty, or has NaN"):
        load_waveform({"array": np.array(samples), "sampling_rate": RATE}, RATE)


def test_what_is_no_audio_is_refused():
    for nothing in (None, 3, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="audio has to be a path, bytes, or a row of an Audio column"):
            load_waveform(nothing, RATE)


@pytest.fixture
def parquet(tmp_path) -> str:
    rows = [{"audio": {"bytes": encoded(TONE, format="WAV"), "path": None}, "text": "tone"}] * 3
    path = tmp_path / "speech.parquet"
    Dataset.from_list(rows).cast_column("audio", Audio(decode=False)).to_parquet(path)
    return str(path)


def test_parquet_is_loaded_and_limited(parquet):
    dataset = load_speech(DataArguments(train_file=parquet, max_train_samples=2), training=True)
    assert len(dataset) == 2
    assert load_speech(DataArguments(train_file=parquet), training=False) is None


def test_a_missing_column_is_named_with_those_there_are(parquet):
    with pytest.raises(ValueError, match=r"no column 'speech': .*\['audio', 'text'\]"):
        load_speech(DataArguments(train_file=parquet, audio_column_name="speech"), training=True)


def test_no_data_at_all_is_refused():
    with pytest.raises(ValueError, match="--train_file or --dataset_name"):
        load_speech(DataArguments(), training=True)


def test_long_recordings_are_cropped_alike_at_every_visit_of_an_epoch(parquet):
    data = SpeechDataset(load_speech(DataArguments(train_file=parquet), training=True), "audio", RATE)
    visits = Visits(data, max_seconds=0.1, seed=0)
    visit, waveform = visits[3, 1]
    assert visit == (3, 1)
    assert len(waveform) == 1600
    np.testing.assert_array_equal(waveform, visits[3, 1][1])
    assert not np.array_equal(waveform, visits[4, 1][1])


def test_lengths_are_read_from_headers(parquet):
    data = SpeechDataset(load_speech(DataArguments(train_file=parquet), training=True), "audio", 8000)
    assert data.lengths() == [4000] * 3


LENGTHS = [random.Random(0).randint(16_000, 560_000) for _ in range(2000)]  # 1 to 35 s


def steps(count: int, lengths=LENGTHS, **settings) -> list:
    sampler = BatchSampler(lengths, **({"batch_size": 8, "max_batch_samples": None, "seed": 0} | settings))
    return list(itertools.islice(sampler, count))


def test_an_epoch_visits_nearly_every_recording_once():
    visits = [visit for batch in steps(250) for visit in batch]
    assert len(set(visits)) == 2000
    assert [epoch for epoch, _ in steps(260)[255]] == [1] * 8


def test_batches_put_similar_lengths_together_and_keep_below_their_seconds():
    batches = steps(200, batch_size=64, max_batch_samples=100 * RATE)
    padded = [len(batch) * max(LENGTHS[index] for _, index in batch) for batch in batches]
    assert max(padded) <= 100 * RATE
    spoken = sum(LENGTHS[index] for batch in batches for _, index in batch)
    assert spoken > 0.9 * sum(padded)


def test_a_resumed_sampler_goes_on_where_it_stopped():
    assert steps(20, start=280) == steps(300)[280:]


def test_processes_and_accumulated_batches_share_the_recordings_of_a_step():
    together = steps(10, batch_size=8)
    shares = [steps(10, batch_size=2, shares=[share], num_shares=4) for share in range(4)]
    accumulated = steps(40, batch_size=2, shares=range(4), num_shares=4)
    for step, batch in enumerate(together):
        assert sorted(batch) == sorted(visit for share in shares for visit in share[step])
        assert sorted(batch) == sorted(visit for part in accumulated[4 * step : 4 * step + 4] for visit in part)


def test_unreadable_recordings_are_left_out_and_too_few_are_refused():
    assert {index for batch in steps(4, [0, 5, 0, 7, 6], batch_size=1) for _, index in batch} == {1, 3, 4}
    with pytest.raises(ValueError, match="2 recordings are too few for 4 batches a step"):
        steps(1, [1, 2], num_shares=4)


def broken_speech() -> SpeechDataset:
    """Ten recordings; number 3 is cut after its header, number 7 has no header."""
    whole = encoded(TONE, format="FLAC")
    rows = [{"audio": {"bytes": whole, "path": f"tone-{index}.flac"}} for index in range(10)]
    rows[3]["audio"]["bytes"], rows[7]["audio"]["bytes"] = whole[: len(whole) // 2], b"no audio"
    dataset = Dataset.from_list(rows).cast_column("audio", Audio(decode=False))
    return SpeechDataset(dataset, "audio", RATE)


def test_recordings_that_cannot_be_read_are_left_out_and_named():
    speech = broken_speech()
    assert [index for index, length in enumerate(speech.lengths()) if length == 0] == [7]
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    visits, collator = Visits(speech, 1.0, seed=0), DistillationCollator(extractor, extractor, 400)
    batch = collator([visits[0, index] for index in (2, 7, 5)])
    assert batch["visits"].tolist() == [[0, 2], [0, 5]]
    assert [index for index, _ in batch["unreadable"]] == [7]
    with pytest.raises(ValueError, match="no recording of a batch of 1 can be read"):
        collator([visits[0, 7]])


def test_a_few_unreadable_recordings_are_logged_and_too_many_stop_the_run(caplog):
    unreadable = Unreadable(broken_speech(), max_share=0.1)
    unreadable.add(7, "no header")
    unreadable.add(7, "no header")
    assert caplog.text.count("tone-7.flac (no header)") == 1
    with pytest.raises(ValueError, match=r"2 of 10 recordings cannot be read.*tone-3.flac \(cut off\)"):
        unreadable.add(3, "cut off")


def test_student_and_teacher_get_what_their_feature_extractors_say():
    normalised = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    raw = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    batch = DistillationCollator(normalised, raw, 400)(
        [((0, 0), TONE), ((0, 1), TONE[:4000] + 0.25), ((0, 2), TONE[:100])]
    )
    np.testing.assert_array_equal(batch["teacher_input_values"][0], TONE)
    assert batch["attention_mask"].sum(-1).tolist() == [8000, 4000, 400]
    for row, length in enumerate((8000, 4000, 400)):
        values = batch["input_values"][row, :length]
        assert abs(float(values.mean())) < 1e-3
        assert float(values.std()) == pytest.approx(1, abs=1e-2)
