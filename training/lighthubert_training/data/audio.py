"""Encoded audio to samples: any file that libsndfile reads is decoded, mixed down to mono and resampled.

Audio columns are never decoded by datasets (`Audio(decode=False)`), so nothing here requires torchcodec: soundfile
decodes, and soxr resamples.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr


UNREADABLE = (soundfile.LibsndfileError, OSError, ValueError, TypeError)
"""What reading a broken recording raises. `TypeError` is soundfile's for a file without a header."""


def load_waveform(audio: Any, sampling_rate: int) -> np.ndarray:
    """A recording as mono samples, float32 (num_samples), at `sampling_rate` Hz. Full scale is 1.

    Args:
        audio: a path, the bytes of a file (WAV, FLAC, OGG, MP3), or a row of an `Audio` column: a dictionary with
            `bytes` or `path`; one with `sampling_rate` and `array`, (num_samples) or (num_samples, num_channels), of
            integers or floats; or a torchcodec decoder.

    Raises:
        ValueError: `audio` is nothing of that kind, or is empty, or has NaN or infinite samples.
        LibsndfileError, OSError, TypeError: the file cannot be read; with the above these are `UNREADABLE`.
    """
    if hasattr(audio, "get_all_samples"):
        samples = audio.get_all_samples()
        waveform, rate = samples.data.numpy().T, samples.sample_rate
    elif isinstance(audio, Mapping) and audio.get("array") is not None:
        waveform, rate = np.asarray(audio["array"]), audio["sampling_rate"]
    else:
        waveform, rate = soundfile.read(encoded_source(audio), dtype="float32")
    if np.issubdtype(waveform.dtype, np.integer):
        waveform = waveform / np.iinfo(waveform.dtype).max
    waveform = waveform.mean(axis=1) if waveform.ndim == 2 else waveform
    if not len(waveform) or not np.isfinite(waveform).all():
        raise ValueError("audio is empty, or has NaN or infinite samples")
    return soxr.resample(waveform.astype(np.float32), rate, sampling_rate)


def duration(audio: Any) -> float:
    """Seconds of a recording, see `encoded_source`, by its header, which is all that is read; 0 if it has none."""
    try:
        return soundfile.info(encoded_source(audio)).duration
    except UNREADABLE:
        return 0.0


def encoded_source(audio: Any) -> io.BytesIO | str | Path:
    """What soundfile can open.

    Args:
        audio: a path, bytes, or a row of an undecoded `Audio` column.

    Raises:
        ValueError: nothing of that kind.
    """
    source = (audio.get("bytes") or audio.get("path")) if isinstance(audio, Mapping) else audio
    if not isinstance(source, bytes | str | Path):
        raise ValueError(f"audio has to be a path, bytes, or a row of an Audio column, not {audio!r:.80}")
    return io.BytesIO(source) if isinstance(source, bytes) else source


def level(waveform: np.ndarray) -> float:
    """Root mean square of samples in decibels relative to full scale, at least -200."""
    return float(10 * np.log10(np.mean(np.square(waveform, dtype=np.float64)) + 1e-20))
