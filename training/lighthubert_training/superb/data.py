"""The data of SUPERB's tasks: files that a user puts into place, or the Hub.

Data lie in `DATA_DIR/TASK/PART` as .parquet, .jsonl or .csv: rows with the column `audio` (a path relative to the
file, or an encoded recording) and the labels of the task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from lighthubert_training.data.recordings import SpeechDataset, Unreadable
from lighthubert_training.data.sources import DataArguments, load_speech
from lighthubert_training.data.strings import SAMPLING_RATE
from lighthubert_training.superb.recipes import TaskSettings
from modeling_lighthubert.errors import UserError


SUFFIXES = (".parquet", ".jsonl", ".csv")
TEXTS = ("text", "id")
"""Columns that are read as text: 007 is no number."""


@dataclass(frozen=True)
class Part:
    """A part of the data of a task: train, dev, test.

    Attributes:
        rows: labels of each recording.
        audio: the encoded recordings, in the column `audio`.
        left_out: ids of recordings that cannot be read.
    """

    name: str
    rows: list[dict[str, Any]]
    audio: Dataset
    left_out: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int], name: str | None = None) -> "Part":
        """The recordings at `indices`, as a part of that name."""
        return Part(name or self.name, [self.rows[index] for index in indices], self.audio.select(indices))

    def readable(self, max_unreadable_share: float) -> "Part":
        """The recordings that can be decoded, all of which are. More than the share given end the run."""
        speech = SpeechDataset(self.audio, "audio", SAMPLING_RATE, labels=range(len(self)))
        recordings = map(speech.__getitem__, range(len(self)))
        kept = [each.labels for each in Unreadable(max_unreadable_share, len(self)).readable(recordings)]
        others = set(range(len(self))) - set(kept)
        return replace(self.select(kept), left_out=frozenset(str(self.rows[index].get("id")) for index in others))


@dataclass(frozen=True)
class TaskData:
    """Where the data of a task are.

    Attributes:
        data_dir: folder with a folder for each task.
        max_unreadable_share: recordings that cannot be read are left out of each part, up to this share of it. 0 does
            not read them in advance: the first one ends the run when its features are computed.
    """

    settings: TaskSettings
    data_dir: Path | None = None
    max_unreadable_share: float = 0.0

    @property
    def folder(self) -> Path:
        return (self.data_dir or Path("DATA_DIR")) / self.settings.task

    def file(self, name: str) -> Path:
        """A file beside the parts.

        Raises:
            UserError: it is not there; the message says what to get, and where to put it.
        """
        if not (self.folder / name).exists():
            raise UserError(f"{self.settings.task}: there is no {self.folder / name}. {self.settings.data}")
        return self.folder / name

    def part(self, name: str, columns: Sequence[str]) -> Part:
        """A part as it lies in the folder, or as the Hub has it if no part lies there.

        Raises:
            UserError: there is none; the message says what to get, and where to put it.
        """
        hub = self.settings.hub
        there = sorted(file for file in self.folder.glob("*") if file.suffix.lower() in SUFFIXES)
        found = [file for file in there if file.stem == name]
        if found:
            arguments = DataArguments(validation_file=[str(found[0])])
        elif hub is not None and not there:
            arguments = DataArguments(
                dataset_name=[hub["dataset"]], dataset_config_name=[hub["config"]], eval_split_name=[hub[name]]
            )
        else:
            asked = " or ".join(f"{self.folder / name}{suffix}" for suffix in SUFFIXES)
            raise UserError(f"{self.settings.task}: there is no {asked}. {self.settings.data}")
        texts, others = ([each for each in columns if (each in TEXTS) == is_text] for is_text in (True, False))
        speech: Any = load_speech(arguments, training=False, other_columns=others, text_columns=texts)
        rows = speech.select_columns(list(columns)).to_list() if columns else [{} for _ in range(len(speech))]
        part = Part(name, rows, speech)
        return part.readable(self.max_unreadable_share) if self.max_unreadable_share else part

    def pairs(self, name: str, parts: Mapping[str, Part], labels: Sequence[str] = ()) -> list[tuple[int, ...]]:
        """Pairs of recordings in the file `name`.csv, without those that are left out of the parts.

        Args:
            parts: where the ids in a column are from, by the name of the column.
            labels: other columns, of integers.

        Returns:
            The positions of both recordings in their parts, and the labels.

        Raises:
            UserError: no such file, it has other columns, or it names a recording that its part lacks.
        """
        file = self.file(f"{name}.csv")
        as_text = {"converters": dict.fromkeys(parts, str), "keep_default_na": False}
        rows = load_dataset("csv", data_files=str(file), split="train", **as_text)
        if missing := {*parts, *labels} - set(rows.column_names):
            raise UserError(f"{file} has the columns {rows.column_names}, and lacks {', '.join(sorted(missing))}")
        known = {
            column: dict.fromkeys(part.left_out, -1) | {str(row["id"]): at for at, row in enumerate(part.rows)}
            for column, part in parts.items()
        }
        pairs = []
        for row in rows.to_list():
            try:
                positions = [known[column][str(row[column])] for column in parts]
            except KeyError as error:
                raise UserError(f"{self.settings.task}: {file.name} names {error}, which its part lacks") from error
            if -1 not in positions:
                pairs.append((*positions, *(int(row[label]) for label in labels)))
        return pairs
