"""Every form that recordings come in becomes the same waveform, and nothing unreadable passes."""

import io

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset
from transformers import Wav2Vec2FeatureExtractor

from speech_data import DataArguments, DistillationCollator, SpeechDataset, load_speech, load_waveform


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


def test_long_recordings_are_cropped(parquet):
    speech = SpeechDataset(load_speech(DataArguments(train_file=parquet), training=True), "audio", RATE, 0.1)
    assert [len(speech[index]) for index in range(len(speech))] == [1600] * 3


def test_student_and_teacher_get_what_their_feature_extractors_say():
    normalised = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    raw = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    batch = DistillationCollator(normalised, raw, 400)([TONE, TONE[:4000] + 0.25, TONE[:100]])
    np.testing.assert_array_equal(batch["teacher_input_values"][0], TONE)
    assert batch["attention_mask"].sum(-1).tolist() == [8000, 4000, 400]
    for row, length in enumerate((8000, 4000, 400)):
        values = batch["input_values"][row, :length]
        assert abs(float(values.mean())) < 1e-3
        assert float(values.std()) == pytest.approx(1, abs=1e-2)
