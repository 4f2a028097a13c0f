"""The speech that models are distilled and measured on: a folder of Parquet files, in pairs NAME-train and NAME-test,
whose columns say what they are good for. `digit`, `keyword`, `speaker`, `language` and `slots` (JSON) are probed for,
and what has `text` and `language` is transcribed. One speaker and one language may be held out of distillation.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Audio, Dataset
from torch import nn
from transformers import Wav2Vec2FeatureExtractor

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.collators import Batch, masks_and_counts, pad
from lighthubert_training.data.strings import SAMPLING_RATE, encode_flac, read_parquet
from lighthubert_training.distillation.arguments import ObjectiveArguments
from lighthubert_training.distillation.teacher import Teacher
from lighthubert_training.runs.options import option
from modeling_lighthubert import LightHubertConfig
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import whole_file


LABELS = ("digit", "keyword", "speaker", "language", "slots", "text")
KNOWN, HELD_SPEAKER, HELD_LANGUAGE = "", ", held-out speaker", ", held-out language"
SPOKEN_ORDER = ("numberOfShots", "size", "roast", "coffeeDrink", "milkAmount", "sugarAmount")
"""Of the slots of a command. Its words were not written down, so slot filling is given the values in this order."""


@dataclass
class FolderArguments:
    """Speech, and what of it is held out of distillation."""

    speech_dir: str = option(help="Folder of Parquet files NAME-train and NAME-test.")
    held_out_speaker: str | None = option(None, "Speaker whose recordings are left out of distillation.")
    held_out_language: str | None = option(None, "Language whose recordings are left out of distillation.")

    def held_out(self, labels: Mapping[str, Any]) -> str:
        """Why a recording is held out of distillation: `KNOWN` if it is not."""
        if self.held_out_speaker is not None and labels.get("speaker") == self.held_out_speaker:
            return HELD_SPEAKER
        if self.held_out_language is not None and labels.get("language") == self.held_out_language:
            return HELD_LANGUAGE
        return KNOWN

    @property
    def files(self) -> dict[tuple[str, str], Path]:
        """Parquet files by corpus and part; one without a part in its name is to train on, without labels.

        Raises:
            UserError: there are none.
        """
        files = {}
        for file in sorted(Path(self.speech_dir).glob("*.parquet")):
            corpus, _, part = file.stem.rpartition("-")
            files[(corpus, part) if part in ("train", "test") else (file.stem, "train")] = file
        if not files:
            raise UserError(f"--speech_dir {self.speech_dir} has no Parquet files such as digits-train.parquet")
        return files


@dataclass(frozen=True)
class Recording:
    """A recording of the speech.

    Attributes:
        corpus, part: of the file that it is in.
        waveform: float16 (num_samples), to save memory.
        labels: those of `LABELS` that it has.
        held_out: `KNOWN`, `HELD_SPEAKER` or `HELD_LANGUAGE`.
    """

    corpus: str
    part: str
    waveform: np.ndarray
    labels: Mapping[str, Any]
    held_out: str

    @property
    def seconds(self) -> float:
        return len(self.waveform) / SAMPLING_RATE


def read_speech(arguments: FolderArguments) -> list[Recording]:
    """All recordings."""
    recordings = []
    for (corpus, part), file in arguments.files.items():
        rows = read_parquet(file, ["audio"])
        columns = [name for name in LABELS if name in rows.column_names]
        for row in rows:
            labels = {name: row[name] for name in columns if row[name] not in (None, "", -1)}
            waveform = load_waveform(row["audio"], SAMPLING_RATE).astype(np.float16)
            recordings.append(Recording(corpus, part, waveform, labels, arguments.held_out(labels)))
    return recordings


def distillation_files(arguments: FolderArguments, folder: Path) -> list[Path]:
    """Parquet files to distil on. Those of which recordings are held out are written to a folder in `folder`."""
    folder = folder / f"without-{arguments.held_out_speaker}-{arguments.held_out_language}"
    files = []
    for (_, part), file in arguments.files.items():
        rows = read_parquet(file, ["audio"])
        columns = [name for name in ("speaker", "language") if name in rows.column_names]
        labels = rows.select_columns(columns).to_list() if columns else [{}] * len(rows)
        known = [at for at, row in enumerate(labels) if arguments.held_out(row) == KNOWN]
        if part != "train" or not known:
            continue
        if len(known) < len(rows):
            kept = folder / file.name
            if not kept.exists():
                folder.mkdir(parents=True, exist_ok=True)
                with whole_file(kept) as unfinished:
                    rows.select(known).to_parquet(unfinished)
            file = kept
        files.append(file)
    return files


class Speech:
    """Recordings as padded batches on the teacher's device, and the output of its feature encoder for each, computed
    once."""

    BATCH_SECONDS = 40.0

    def __init__(self, recordings: Sequence[Recording], teacher: Teacher, extractor: Wav2Vec2FeatureExtractor):
        self.recordings, self.teacher, self.extractor = recordings, teacher, extractor
        self.device = teacher.model.device
        self.conv_features: dict[int, torch.Tensor] = {}

    def select(
        self, part: str, *labels: str, without: str | None = None, held_out: Sequence[str] = (KNOWN,)
    ) -> list[int]:
        """Numbers of the recordings of a part that have `labels`, and have no label `without`."""
        return [
            number
            for number, each in enumerate(self.recordings)
            if each.part == part and each.held_out in held_out
            if each.labels.keys() >= set(labels) and (without is None or without not in each.labels)
        ]

    def labels(self, numbers: Sequence[int], name: str) -> list[Any]:
        return [self.recordings[number].labels[name] for number in numbers]

    def batches(self, numbers: Iterable[int], batch_seconds: float = BATCH_SECONDS) -> list[list[int]]:
        """Batches of recordings, the shortest first, of at most so many seconds with their padding."""
        batches: list[list[int]] = []
        for number in sorted(numbers, key=lambda number: len(self.recordings[number].waveform)):
            if not batches or (len(batches[-1]) + 1) * self.recordings[number].seconds > batch_seconds:
                batches.append([])
            batches[-1].append(number)
        return batches

    def audio(self, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """`input_values` and `attention_mask`, (batch_size, num_samples)."""
        waveforms = [self.recordings[number].waveform.astype(np.float32) for number in batch]
        return {name: tensor.to(self.device) for name, tensor in pad(self.extractor, waveforms).items()}

    @torch.no_grad()
    def encoded(self, batch: Sequence[int]) -> torch.Tensor:
        """Output of the teacher's feature encoder, (batch_size, conv_dim, num_frames), zeros on padding."""
        for number in batch:
            if number not in self.conv_features:
                features = self.teacher.model.feature_extractor(self.audio([number])["input_values"])
                self.conv_features[number] = features[0].T.half()
        frames = [self.conv_features[number].float() for number in batch]
        return nn.utils.rnn.pad_sequence(frames, batch_first=True).transpose(1, 2)


def write_superb_data(recordings: Sequence[Recording], folder: Path) -> None:
    """Writes data of keyword spotting and slot filling for `run_superb.py`, of recordings with `keyword` and `slots`,
    if there are any. A tenth of the training recordings is the dev part."""

    def keyword(labels: Mapping[str, Any]) -> dict[str, str]:
        return {"label": labels["keyword"]}

    def slots(labels: Mapping[str, Any]) -> dict[str, str]:
        values = json.loads(labels["slots"])
        order = [*SPOKEN_ORDER, *sorted(values.keys() - set(SPOKEN_ORDER))]
        return {"text": " ".join(f"B-{name} {values[name]} E-{name}" for name in order if name in values)}

    for task, label, row_of in (("ks", "keyword", keyword), ("sf", "slots", slots)):
        labelled = [each for each in recordings if label in each.labels]
        parts = {part: [each for each in labelled if each.part == part] for part in ("train", "test")}
        if not all(parts.values()):
            continue
        random.Random(0).shuffle(parts["train"])
        at = len(parts["train"]) // 10 + 1
        parts |= {"dev": parts["train"][:at], "train": parts["train"][at:]}
        (folder / task).mkdir(parents=True, exist_ok=True)
        for part, chosen in parts.items():
            rows = [{"audio": encode_flac(each.waveform.astype(np.float32)), **row_of(each.labels)} for each in chosen]
            with whole_file(folder / task / f"{part}.parquet") as unfinished:
                Dataset.from_list(rows).cast_column("audio", Audio(decode=False)).to_parquet(unfinished)


def draw(numbers: Sequence[int], most: int, rng: random.Random) -> list[int]:
    """At most so many of `numbers`, at random."""
    return rng.sample(list(numbers), min(most, len(numbers)))


def to_distil(
    batches: Sequence[Batch], config: LightHubertConfig, objective: ObjectiveArguments
) -> list[dict[str, Any]]:
    """Batches with what a distillation loss needs besides (see `DistillationCollator`). The input of the teacher is
    that of the student.

    Args:
        config: of the student.
    """

    def complete(batch: Batch) -> dict[str, Any]:
        num_samples = batch["attention_mask"].sum(-1).tolist()
        masking = objective.mask_time_prob, objective.mask_time_length
        completed = masks_and_counts(num_samples, config, *masking, seeds=range(len(num_samples)))
        completed["mask"] = completed["mask"].to(batch["input_values"].device)
        return {**batch, "teacher_input_values": batch["input_values"], **completed}

    return list(map(complete, batches))


def noise(batch_size: int, seconds: float) -> np.ndarray:
    """Audio that is always the same, float32, (batch_size, num_samples)."""
    return np.random.default_rng(0).standard_normal((batch_size, int(seconds * SAMPLING_RATE)), dtype=np.float32)


def librispeech_like(count: int) -> Iterator[np.ndarray]:
    """Noise of 1.5 to 16 s, float32 (num_samples), as long as LibriSpeech's recordings are: most near the top."""
    rng = np.random.default_rng(0)
    for share in rng.beta(4, 1.5, count):
        samples = np.cumsum(rng.standard_normal(int((1.5 + 14.5 * share) * SAMPLING_RATE)))
        yield (0.1 * samples / np.abs(samples).max()).astype(np.float32)
