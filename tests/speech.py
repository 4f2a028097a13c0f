"""Recordings for tests: a tone, in any format, and datasets of recordings."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import soundfile
from datasets import Audio, Dataset

from lighthubert_training.data.recordings import SpeechDataset


RATE = 16_000
TONE = np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE).astype(np.float32) * 0.5
"""Half a second, 8000 samples, at half of full scale."""


def encoded(waveform: np.ndarray, rate: int = RATE, **format: str) -> bytes:
    """A file of audio in memory, in the `format` and `subtype` of soundfile."""
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, **format)
    return file.getvalue()


def undecoded(rows: Sequence[dict[str, Any]]) -> Dataset:
    """A dataset whose column `audio` stays encoded."""
    return Dataset.from_list(list(rows)).cast_column("audio", Audio(decode=False))


def at_hand(rows: Sequence[dict[str, Any]], labels: Sequence[Any] | None = None) -> SpeechDataset:
    """The recordings in `rows`."""
    return SpeechDataset(undecoded(rows), "audio", RATE, labels)


def broken_speech(labels: Sequence[Any] | None = None) -> SpeechDataset:
    """Ten recordings; number 3 is cut off after its header, number 7 has no header."""
    whole = encoded(TONE, format="FLAC")
    rows: list[dict[str, Any]] = [{"audio": {"bytes": whole, "path": f"tone-{index}.flac"}} for index in range(10)]
    rows[3]["audio"]["bytes"], rows[7]["audio"]["bytes"] = whole[: len(whole) // 2], b"no audio"
    return at_hand(rows, labels)
