"""SUPERB's recipes, and where the data of its tasks comes from: the Hub, or files that a user puts into place.

A recipe is a YAML file in `training/configs/superb/`. Data lie in `DATA_DIR/TASK/PART` as .parquet, .jsonl or .csv:
rows with the column `audio` (a path relative to the file, or an encoded recording) and the labels of the task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset

from lighthubert_training.data.sources import DataArguments, load_speech


RECIPES = Path(__file__).parents[1] / "configs/superb"
SUFFIXES = (".parquet", ".jsonl", ".csv")


@dataclass(frozen=True)
class Recipe:
    """How a task is learnt and measured.

    Attributes:
        data: what to get, and what its files have to be.
        hub: where the Hub has it in files that need no script: `dataset`, `config`, and the split of each part.
        eval_steps: steps between measurements of the dev part; the best head is kept.
        max_seconds: longer training recordings are cut at random.
        projector_size, lstm_size, embedding_size, pooled_size: of the head, where it has such a layer.
        spec_augment: whether spans of features are masked in training.
    """

    task: str
    data: str
    hub: Mapping[str, Any] | None = None
    learning_rate: float = 1e-4
    max_steps: int = 200_000
    batch_size: int = 32
    eval_steps: int = 2000
    max_seconds: float | None = None
    projector_size: int = 256
    lstm_size: int = 1024
    embedding_size: int = 512
    pooled_size: int = 1500
    dropout: float = 0.2
    spec_augment: bool = False


def read_recipe(task: str, variant: str | None = None, **changes: Any) -> Recipe:
    """The recipe of a task, with the values of one of its variants, where it has it, and with `changes` that are not
    `None`.

    Raises:
        ValueError: no such task, or a variant that no task has.
    """
    known = task_names()
    if task not in known:
        raise ValueError(f"there is no task {task!r}: choose from {', '.join(known)}, or all")
    values = yaml.safe_load((RECIPES / f"{task}.yaml").read_text(encoding="utf-8"))
    variants = values.pop("variants", {})
    if variant is not None:
        everywhere = {name for each in known for name in _variants(each)}
        if variant not in everywhere:
            raise ValueError(f"no task has a variant {variant!r}: choose from {', '.join(sorted(everywhere))}")
        values |= variants.get(variant, {})
    values |= {name: value for name, value in changes.items() if value is not None}
    unknown = values.keys() - {field.name for field in fields(Recipe)}
    if unknown:
        raise ValueError(f"{RECIPES / task}.yaml has values that no recipe has: {', '.join(sorted(unknown))}")
    return Recipe(task=task, **values)


def task_names() -> list[str]:
    """In the order of the files' names."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def _variants(task: str) -> Mapping[str, Any]:
    return yaml.safe_load((RECIPES / f"{task}.yaml").read_text(encoding="utf-8")).get("variants", {})


@dataclass
class Part:
    """A part of the data of a task.

    Attributes:
        rows: labels of each recording.
        audio: the encoded recordings, in the column `audio`.
    """

    name: str
    rows: list[dict[str, Any]]
    audio: Dataset

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> "Part":
        return Part(self.name, [self.rows[index] for index in indices], self.audio.select(indices))


def load_part(recipe: Recipe, data_dir: Path | None, name: str, columns: Sequence[str]) -> Part:
    """A part as it lies in `data_dir`, or as the Hub has it where no part lies there.

    Raises:
        ValueError: there is none; the message says what to get, and where to put it.
    """
    folder = (data_dir or Path("DATA_DIR")) / recipe.task
    there = sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES)
    found = [file for file in there if file.stem == name]
    if found:
        arguments = DataArguments(validation_file=[str(found[0])])
    elif recipe.hub is not None and not there:
        arguments = DataArguments(
            dataset_name=[recipe.hub["dataset"]],
            dataset_config_name=[recipe.hub["config"]],
            eval_split_name=[recipe.hub[name]],
        )
    else:
        asked = " or ".join(f"{folder / name}{suffix}" for suffix in SUFFIXES)
        raise ValueError(f"{recipe.task}: there is no {asked}. {recipe.data}")
    speech = load_speech(arguments, training=False, other_columns=columns)
    labels = speech.select_columns(list(columns)).to_list() if columns else [{} for _ in range(len(speech))]
    return Part(name, labels, speech)


def load_table(recipe: Recipe, data_dir: Path | None, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a CSV file.

    Raises:
        ValueError: there is none, or it has other columns.
    """
    file = (data_dir or Path("DATA_DIR")) / recipe.task / f"{name}.csv"
    if not file.exists():
        raise ValueError(f"{recipe.task}: there is no {file}. {recipe.data}")
    rows = load_dataset("csv", data_files=str(file), split="train")
    if missing := set(columns) - set(rows.column_names):
        raise ValueError(f"{file} has the columns {rows.column_names}, and lacks {', '.join(sorted(missing))}")
    return rows.to_list()
