"""Recordings of single words, and strings of them: what small models are probed and fine-tuned on."""

import io
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from datasets import Audio, Dataset, load_dataset
from datasets.exceptions import DatasetsError

from lighthubert_training.data.audio import load_waveform
from modeling_lighthubert.errors import UserError


SAMPLING_RATE = 16_000


def read_parquet(file: str | Path, columns: Sequence[str] = ("audio", "text")) -> Dataset:
    """Rows of a Parquet file with `columns`, of which `audio` stays encoded.

    Raises:
        UserError: no such file, or one without these columns.
    """
    try:
        rows = load_dataset("parquet", data_files=str(file), split="train")
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"{file} is no Parquet file that can be read: {error}") from error
    if missing := set(columns) - set(rows.column_names):
        raise UserError(f"{file} has no column {' and '.join(sorted(missing))}, but {', '.join(rows.column_names)}")
    return rows.cast_column("audio", Audio(decode=False))


def encode_flac(waveform: np.ndarray) -> dict[str, Any]:
    """A row of an undecoded `Audio` column.

    Args:
        waveform: (num_samples) at `SAMPLING_RATE`.
    """
    file = io.BytesIO()
    soundfile.write(file, waveform, SAMPLING_RATE, format="FLAC")
    return {"bytes": file.getvalue(), "path": None}


@dataclass
class Speech:
    """One part, training or held-out, of the recordings.

    Attributes:
        words: recordings of single words; of anything, where there are none.
        file: Parquet file with all recordings.
        strings_file: Parquet file with those of several words, real ones or joined.
    """

    words: Dataset
    file: Path
    strings_file: Path


def prepare_speech(file: str, folder: Path, name: str, num_strings: int, rng: random.Random) -> Speech:
    """Reads recordings, joins words to strings if there are none, and writes both files to `folder`.

    Args:
        num_strings: to join.

    Raises:
        UserError: `file` cannot be read.
    """
    dataset = read_parquet(file)
    folder.mkdir(parents=True, exist_ok=True)
    words = dataset.filter(lambda text: len(text.split()) == 1, input_columns="text")
    strings = dataset.filter(lambda text: len(text.split()) > 1, input_columns="text")
    if not len(strings):
        strings = join_words(words, num_strings, rng)
    everything = Dataset.from_list(
        [*words.select_columns(["audio", "text"]), *strings.select_columns(["audio", "text"])]
    )
    speech = Speech(words if len(words) else strings, folder / f"{name}.parquet", folder / f"{name}-strings.parquet")
    everything.cast_column("audio", Audio(decode=False)).to_parquet(speech.file)
    strings.to_parquet(speech.strings_file)
    return speech


def join_words(
    words: Dataset,
    num_strings: int,
    rng: random.Random,
    num_words: tuple[int, int] = (3, 6),
    pause: tuple[float, float] = (0.05, 0.25),
) -> Dataset:
    """Strings of single-word recordings of one speaker, each with a pause behind it: `audio`, FLAC, `text`, `speaker`.

    Args:
        num_words: of a string, at least and at most.
        pause: seconds, at least and at most.
    """
    by_speaker = defaultdict(list)
    for index, speaker in enumerate(words["speaker"] if "speaker" in words.column_names else [""] * len(words)):
        by_speaker[speaker].append(index)
    rows = []
    for _ in range(num_strings):
        speaker = rng.choice(sorted(by_speaker))
        chosen = words.select(rng.choices(by_speaker[speaker], k=rng.randint(*num_words)))
        parts = []
        for audio in chosen["audio"]:
            silence = np.zeros(int(rng.uniform(*pause) * SAMPLING_RATE), dtype=np.float32)
            parts += [load_waveform(audio, SAMPLING_RATE), silence]
        audio = encode_flac(np.concatenate(parts))
        rows.append({"audio": audio, "text": " ".join(chosen["text"]), "speaker": speaker})
    return Dataset.from_list(rows).cast_column("audio", Audio(decode=False))
