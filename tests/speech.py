"""Recordings for tests: a tone, in any format, and datasets of recordings."""

import io
import random
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


def with_flac_length(flac: bytes, num_samples: int) -> bytes:
    """A FLAC file whose header claims another length, without a checksum, as encoders write it to a pipe."""
    total = (flac[21] & 0xF0 | num_samples >> 32).to_bytes(1, "big") + (num_samples & 0xFFFFFFFF).to_bytes(4, "big")
    return flac[:21] + total + bytes(16) + flac[42:]


FORMATS = (
    {"format": "WAV"},
    {"format": "WAV", "subtype": "FLOAT"},
    {"format": "FLAC"},
    {"format": "OGG", "subtype": "VORBIS"},
    {"format": "OGG", "subtype": "OPUS"},
    {"format": "MP3"},
)


def damaged(audio: bytes, rng: random.Random) -> bytes:
    """A file of audio with flipped bytes, cut, spliced, or with a header that lies."""
    data = bytearray(audio)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[start : start + 1] = rng.randbytes(1)
            case 1:
                del data[start:]
            case 2:
                del data[start : start + rng.randrange(200)]
            case 3:
                data[start:start] = data[rng.randrange(len(data) + 1) :][: rng.randrange(2000)]
            case 4:
                at = rng.randrange(min(len(data), 64) + 1)
                size = rng.choice((1, 2, 4, 8))
                data[at : at + size] = rng.choice((b"\x00", b"\xff", b"\x7f", b"\x01")) * size
    return bytes(data)


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
