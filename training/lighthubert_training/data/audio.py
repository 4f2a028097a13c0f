"""Encoded audio to samples: any file that libsndfile reads is decoded, mixed down to mono and resampled.

Audio columns are never decoded by datasets (`Audio(decode=False)`), so nothing here requires torchcodec: soundfile
decodes, and soxr resamples. What a header says is not trusted: files are read in blocks, forwards, to their end.
"""

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr


UNREADABLE = (soundfile.LibsndfileError, OSError, ValueError, TypeError)
"""What reading a broken recording raises. `TypeError` is soundfile's for a file without a header."""
LEAST_BITS_PER_SECOND = 6000
"""What the thriftiest codec of speech, Opus, makes of a second, unless it is silent."""
MOST_SECONDS_OF_SILENCE = 600
"""A file may have so much more than `LEAST_BITS_PER_SECOND` allow: digital silence takes next to no bytes."""
SAMPLING_RATES = (1000, 768_000)
"""Lowest and highest in Hz. A header with another one lies, and resampling takes minutes and gigabytes."""
LOUDEST = 2.0**31
"""Samples are 1 at full scale, or integers as floats; larger ones overflow where squares are added up in float32."""
MOST_CHANNELS = 8


class AudioFile(soundfile.SoundFile):
    """A file that is read from its beginning to its end, whatever its header says.

    Args:
        audio: see `encoded_source`.

    Raises:
        ValueError: it has no format that libsndfile reads, or a rate beyond `SAMPLING_RATES`.
        LibsndfileError, OSError: it cannot be opened.
    """

    def __init__(self, audio: Any):
        source = encoded_source(audio)
        self.num_bytes = len(source.getbuffer()) if isinstance(source, io.BytesIO) else os.path.getsize(source)
        try:
            super().__init__(source)
        except (soundfile.LibsndfileError, TypeError) as error:
            if getattr(error, "code", 1) != 1:  # 1: of no format that it knows
                raise
            remedy = "convert it, such as with: ffmpeg -i talk.m4a talk.flac"
            raise ValueError(f"not in a format that libsndfile reads: {remedy}") from error
        if not SAMPLING_RATES[0] <= self.samplerate <= SAMPLING_RATES[1]:
            raise ValueError(f"its rate is {self.samplerate} Hz, not {SAMPLING_RATES[0]} to {SAMPLING_RATES[1]}")

    def seekable(self) -> bool:
        """No: soundfile would seek behind every block, which fails at the end of a file whose header has no length."""
        return False

    @property
    def has_length(self) -> bool:
        """Whether the length in the header is one that the bytes can hold. FLAC from a pipe says 0 or 2^36 samples."""
        return 0 < self.frames * LEAST_BITS_PER_SECOND <= 8 * self.num_bytes * self.samplerate

    def mono_blocks(self) -> Iterator[np.ndarray]:
        """Mono samples, float32, in blocks.

        Raises:
            ValueError: they are more than the bytes can hold, or less than the header of a FLAC file says.
            LibsndfileError: they cannot be decoded.
        """
        most = self.samplerate * (MOST_SECONDS_OF_SILENCE + 8 * self.num_bytes / LEAST_BITS_PER_SECOND)
        num_samples, block_size = 0, max(1, 2**16 // self.channels)
        while len(block := self.read(block_size, dtype="float32", always_2d=True)):
            num_samples += len(block)
            if num_samples > most:
                raise ValueError(f"more than {most / self.samplerate:.0f} s of audio in {self.num_bytes} bytes")
            with np.errstate(over="ignore", invalid="ignore"):  # `resample` refuses what comes of it
                samples = block.mean(axis=1)
            yield samples
        if self.format == "FLAC" and self.has_length and num_samples < self.frames:
            raise ValueError(f"cut off: {num_samples} of {self.frames} samples are there")


def load_waveform(audio: Any, sampling_rate: int) -> np.ndarray:
    """A recording as mono samples, float32 (num_samples), at `sampling_rate` Hz. Full scale is 1.

    Args:
        audio: a path, the bytes of a file (WAV, FLAC, OGG, MP3 and what else libsndfile reads), or a row of an `Audio`
            column: a dictionary with `bytes` or `path`; one with `sampling_rate` and `array`, see `mono`; or a
            torchcodec decoder.

    Raises:
        ValueError: `audio` is nothing of that kind, or is empty, or has NaN, infinite or huge samples.
        LibsndfileError, OSError, TypeError: the file cannot be read; with the above these are `UNREADABLE`.
    """
    if hasattr(audio, "get_all_samples"):
        samples = audio.get_all_samples()
        return resample([samples.data.numpy().mean(axis=0)], samples.sample_rate, sampling_rate)
    if isinstance(audio, Mapping) and audio.get("array") is not None:
        return resample([mono(audio["array"])], audio.get("sampling_rate"), sampling_rate)
    with AudioFile(audio) as file:
        return resample(file.mono_blocks(), file.samplerate, sampling_rate)


def mono(array: Any) -> np.ndarray:
    """The mean of the channels, (num_samples), of decoded audio. Full scale is 1.

    Args:
        array: floats, or integers of 8 to 32 bits, whose full scale is that of their type; unsigned ones are silent in
            the middle. Shape (num_samples), or channels by samples or samples by channels: channels are at most 8.

    Raises:
        ValueError: it is another array, or which axis has the channels is not clear.
    """
    samples = np.asarray(array)
    kind, bits = samples.dtype.kind, 8 * samples.dtype.itemsize
    if kind not in "iuf" or (kind in "iu" and bits > 32):
        advice = "give floats with a full scale of 1, or a NumPy array of int16"
        raise ValueError(f"an array of {samples.dtype} has no scale: {advice}")
    if kind in "iu":
        samples = samples / 2.0 ** (bits - 1) - (1.0 if kind == "u" else 0.0)
    if samples.ndim == 1 or not samples.size:
        return samples.ravel()
    channel_axes = [axis for axis, length in enumerate(samples.shape) if length <= MOST_CHANNELS]
    if samples.ndim != 2 or len(channel_axes) != 1:
        raise ValueError(
            f"an array of shape {samples.shape} is no recording: give (num_samples), or two axes of which one, the"
            f" channels, has at most {MOST_CHANNELS}"
        )
    return samples.mean(axis=channel_axes[0])


def resample(blocks: Iterable[np.ndarray], rate: Any, sampling_rate: int) -> np.ndarray:
    """Samples, float32 (num_samples), at `sampling_rate` Hz of blocks of a recording at `rate` Hz.

    Raises:
        ValueError: there are none, or NaN, infinite or huge ones, or `rate` is none of `SAMPLING_RATES`.
    """
    if not isinstance(rate, int | float | np.number) or not SAMPLING_RATES[0] <= rate <= SAMPLING_RATES[1]:
        raise ValueError(f"sampling_rate is {rate!r} Hz, not {SAMPLING_RATES[0]} to {SAMPLING_RATES[1]}")
    stream = None if rate == sampling_rate else soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32")
    waveform, num_samples = np.empty(0, dtype=np.float32), 0

    def append(samples: np.ndarray) -> None:
        nonlocal num_samples
        if num_samples + len(samples) > len(waveform):  # grows in place: a list of blocks would be there twice
            waveform.resize((num_samples + len(samples)) * 5 // 4, refcheck=False)
        waveform[num_samples : num_samples + len(samples)] = samples
        num_samples += len(samples)

    for block in blocks:
        loudest = np.abs(block).max(initial=0.0)
        if not np.isfinite(loudest):
            raise ValueError("audio is empty, or has NaN or infinite samples")
        if loudest > LOUDEST:
            raise ValueError(f"audio has samples of {loudest:.0e}, full scale is 1")
        block = block.astype(np.float32, copy=False)
        append(block if stream is None else stream.resample_chunk(block))
    if stream is not None:
        append(stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    if not num_samples:
        raise ValueError("audio is empty, or has NaN or infinite samples")
    waveform.resize(num_samples, refcheck=False)
    return waveform


def duration(audio: Any) -> float:
    """Seconds of a recording, see `encoded_source`; 0 of one that cannot be read.

    Its header is all that is read, but for a length that its bytes cannot hold: then it is decoded.
    """
    try:
        with AudioFile(audio) as file:
            num_samples = file.frames if file.has_length else sum(map(len, file.mono_blocks()))
            return num_samples / file.samplerate
    except UNREADABLE:
        return 0.0


def encoded_source(audio: Any) -> io.BytesIO | str | Path:
    """What soundfile can open.

    Args:
        audio: a path, bytes, or a row of an undecoded `Audio` column.

    Raises:
        ValueError: nothing of that kind.
        FileNotFoundError: no file is there.
    """
    source = (audio.get("bytes") or audio.get("path")) if isinstance(audio, Mapping) else audio
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, str | Path):
        raise ValueError(f"audio has to be a path, bytes, or a row of an Audio column, not {audio!r:.80}")
    if not os.path.isfile(source):  # a pipe would wait for someone to write to it
        raise FileNotFoundError(f"there is no file {source}")
    return source


def level(waveform: np.ndarray) -> float:
    """Root mean square of samples in decibels relative to full scale, at least -200."""
    return float(10 * np.log10(np.mean(np.square(waveform, dtype=np.float64)) + 1e-20))
