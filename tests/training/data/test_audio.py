"""Every form that a recording comes in becomes the same waveform, and nothing unreadable passes."""

import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from speech import FORMATS, RATE, TONE, damaged, encoded, with_flac_length

from lighthubert_training.data import audio as audio_module
from lighthubert_training.data.audio import UNREADABLE, duration, level, load_waveform


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
        {"array": (TONE * 32768).round().astype(np.int16).astype(np.int32) * 2**16, "sampling_rate": RATE},
        {"array": ((TONE + 1) * 32768).round().astype(np.uint16), "sampling_rate": RATE},
        {"array": TONE.tolist(), "sampling_rate": RATE},
        {"array": np.stack([TONE, TONE], axis=1), "sampling_rate": RATE},
        {"array": np.stack([TONE, TONE]), "sampling_rate": RATE},
        {"array": TONE[None], "sampling_rate": RATE},
        Decoder(),
    ],
    ids=[
        *("bytes", "row", "array", "int16", "int32", "uint16", "list", "samples-by-channels"),
        *("channels-by-samples", "one-channel", "decoder"),
    ],
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


def test_bytes_without_a_sign_are_silent_in_the_middle():
    eight_bits = (128 + 127 * 2 * TONE).round().astype(np.uint8)
    waveform = load_waveform({"array": eight_bits, "sampling_rate": RATE}, RATE)
    np.testing.assert_allclose(waveform, 2 * TONE, atol=0.02)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((100, 200)), r"shape \(100, 200\) is no recording: give \(num_samples\), or two axes"),
        (np.zeros((2, 8)), r"shape \(2, 8\) is no recording"),
        (np.zeros((2, 100, 1)), r"shape \(2, 100, 1\) is no recording"),
        ([0, 12000, -32768], "an array of int64 has no scale: give floats with a full scale of 1, or .* int16"),
        (["a", "b"], "an array of <U1 has no scale"),
        ([True, False], "an array of bool has no scale"),
    ],
)
def test_an_array_that_may_mean_several_things_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        load_waveform({"array": array, "sampling_rate": RATE}, RATE)


@pytest.mark.parametrize("rate", [None, "16000", 0, 1, -16000, np.nan, 10**9])
def test_an_array_with_an_impossible_rate_is_refused(rate):
    with pytest.raises(ValueError, match="sampling_rate is .* Hz, not 1000 to 768000"):
        load_waveform({"array": TONE, "sampling_rate": rate}, RATE)


def test_what_is_no_audio_is_refused():
    for nothing in (None, 3, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="audio has to be a path, bytes, or a row of an Audio column"):
            load_waveform(nothing, RATE)


def test_a_file_in_another_format_says_what_to_do(tmp_path):
    (tmp_path / "talk.m4a").write_bytes(b"\0\0\0 ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0" * 10)
    (tmp_path / "talk.raw").write_bytes(bytes(1000))
    for file in ("talk.m4a", "talk.raw"):
        with pytest.raises(ValueError, match="not in a format that libsndfile reads: convert it.* ffmpeg -i"):
            load_waveform(tmp_path / file, RATE)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(FileNotFoundError, match="there is no file .*pipe.wav"):
        load_waveform(tmp_path / "pipe.wav", RATE)


# Headers that lie


@pytest.mark.parametrize("claimed", [0, 2**36 - 1], ids=["unknown", "endless"])
def test_flac_from_a_pipe_has_all_its_samples_and_their_duration(claimed):
    tone = np.tile(TONE, 3)
    piped = with_flac_length(encoded(tone, format="FLAC"), claimed)
    np.testing.assert_allclose(load_waveform(piped, RATE), tone, atol=2**-14)
    assert duration(piped) == 1.5
    with pytest.raises(UNREADABLE):
        load_waveform(piped[: len(piped) // 2], RATE)
    assert duration(piped[: len(piped) // 2]) == 0.0


def test_flac_that_has_fewer_samples_than_it_says_is_cut_off():
    with pytest.raises(ValueError, match="cut off: 8000 of 9000 samples are there"):
        load_waveform(with_flac_length(encoded(TONE, format="FLAC"), 9000), RATE)


def test_mp3_that_claims_to_be_endless_has_the_samples_that_are_there():
    mp3 = bytearray(encoded(np.tile(TONE, 4), format="MP3"))
    frames = mp3.find(b"Info") % len(mp3) + 8
    mp3[frames : frames + 4] = b"\xff" * 4
    assert load_waveform(bytes(mp3), RATE).shape == pytest.approx((32000,), abs=2000)
    assert duration(bytes(mp3)) == pytest.approx(2.0, abs=0.1)


def test_wav_of_unknown_length_has_the_samples_that_are_there():
    wav = bytearray(encoded(TONE, format="WAV"))
    wav[4:8] = wav[40:44] = b"\xff" * 4
    np.testing.assert_allclose(load_waveform(bytes(wav), RATE), TONE, atol=2**-14)
    assert duration(bytes(wav)) == 0.5


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_a_rate_that_no_recording_has_is_refused(rate):
    """At 1 Hz, one second of audio would be resampled to 35 hours."""
    wav = bytearray(encoded(TONE, format="WAV"))
    wav[24:28] = rate.to_bytes(4, "little")
    with pytest.raises(ValueError, match=f"its rate is {rate} Hz, not 1000 to 768000"):
        load_waveform(bytes(wav), RATE)
    assert duration(bytes(wav)) == 0.0


def test_more_audio_than_the_bytes_can_hold_is_refused(monkeypatch):
    """Digital silence takes no bytes to speak of."""
    silence = encoded(np.zeros(60 * RATE, dtype=np.int16), format="FLAC")
    assert len(load_waveform(silence, RATE)) == 60 * RATE
    assert duration(silence) == 60.0
    monkeypatch.setattr(audio_module, "MOST_SECONDS_OF_SILENCE", 30)
    with pytest.raises(ValueError, match=r"more than 3\d s of audio in \d+ bytes"):
        load_waveform(silence, RATE)


@pytest.mark.parametrize("rate", [RATE, 8000])
def test_samples_that_overflow_when_they_are_normalised_are_refused(rate):
    loud = np.where(np.arange(1000) % 2, 1e38, -1e38).astype(np.float32)
    with pytest.raises(ValueError, match=r"samples of 1e\+38, full scale is 1"):
        load_waveform(encoded(loud, rate, format="WAV", subtype="FLOAT"), RATE)
    integers = encoded(TONE * 2**31, rate, format="WAV", subtype="FLOAT")  # as some programs write them
    assert np.isfinite(load_waveform(integers, RATE).std())


def in_a_fork(work: Callable[[], None], seconds: int = 20) -> tuple[int, int]:
    """Exit status, negative that of a signal, and the most bytes that `work` took in a process of its own."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            signal.alarm(seconds)
            resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 2**30,) * 2)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = memory("VmRSS")
            work()
            os.write(writing, str(memory("VmHWM") - before).encode())
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return os.waitstatus_to_exitcode(status), int(pipe.read() or 0)


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


FILES = [encoded(np.tile(TONE, 4), **format) for format in FORMATS]


@settings(max_examples=60)
@example(encoded(np.zeros(9 * 60 * RATE, dtype=np.int16), format="FLAC"))  # in 30 kB
@example(encoded(np.zeros(30 * 60 * RATE, dtype=np.int16), format="FLAC"))
@example(with_flac_length(FILES[2], 0))
@example(with_flac_length(FILES[2], 2**36 - 1))
@example(FILES[0][:24] + bytes([1, 0, 0, 0]) + FILES[0][28:])  # 1 Hz
@given(
    st.binary(max_size=4096)
    | st.builds(damaged, st.sampled_from(FILES), st.builds(random.Random, st.integers(0, 2**32)))
)
def test_any_bytes_are_a_waveform_or_a_problem_and_take_little_memory(data):
    def read() -> None:
        seconds = duration(data)
        try:
            waveform = load_waveform(data, RATE)
        except UNREADABLE:
            return
        assert waveform.dtype == np.float32 and waveform.ndim == 1 and len(waveform)
        assert np.isfinite(waveform.std()) and seconds < 1e5

    status, most = in_a_fork(read)
    assert status == 0
    assert most < 20 * len(data) + 100e6


def test_durations_come_from_headers():
    assert duration(encoded(TONE, format="FLAC")) == 0.5
    assert duration({"bytes": encoded(TONE, rate=8000, format="WAV"), "path": None}) == 1.0
    assert duration(b"no audio") == 0.0


def test_a_sine_of_half_of_full_scale_has_minus_nine_decibels():
    assert level(TONE) == pytest.approx(-9.03, abs=0.01)
