"""Every form that a recording comes in becomes the same waveform, and nothing unreadable passes."""

import numpy as np
import pytest
import soundfile
import torch
from speech import RATE, TONE, encoded

from lighthubert_training.data.audio import duration, level, load_waveform


class Decoder:
    """What a decoded torchcodec column gives: samples as (channels, time)."""

    def get_all_samples(self):
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


def test_durations_come_from_headers():
    assert duration(encoded(TONE, format="FLAC")) == 0.5
    assert duration({"bytes": encoded(TONE, rate=8000, format="WAV"), "path": None}) == 1.0
    assert duration(b"no audio") == 0.0


def test_a_sine_of_half_of_full_scale_has_minus_nine_decibels():
    assert level(TONE) == pytest.approx(-9.03, abs=0.01)
