"""SUPERB's recipes: the settings of each task, in a YAML file that says where every value comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import yaml

from lighthubert_training.runs import options
from modeling_lighthubert.errors import UserError


RECIPES = options.RECIPES / "superb"


@dataclass(frozen=True)
class TaskSettings:
    """How a task is trained and measured.

    Attributes:
        data: which corpus to get, and how its files have to look, in words for a user.
        hub: `dataset`, `config`, and the split of each part, if the Hub has the corpus in files that need no script.
        eval_steps: steps between evaluations on the dev part.
        max_seconds: longer training recordings are cropped at random.
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


def task_names() -> list[str]:
    """Names of all tasks, in alphabetical order."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def read_settings(task: str, variant: str | None = None, **changes: Any) -> TaskSettings:
    """The settings of a task, with the values of `variant`, where its recipe has one of that name, and with those
    `changes` that are not `None`.

    Raises:
        UserError: no such task, a variant that no task has, or a recipe with an unknown value.
    """
    known = task_names()
    if task not in known:
        raise UserError(f"there is no task {task!r}: choose from {', '.join(known)}, or all")
    values = _read(task)
    variants = values.pop("variants", {})
    if variant is not None:
        everywhere = {name for each in known for name in _read(each).get("variants", {})}
        if variant not in everywhere:
            raise UserError(f"no task has a variant {variant!r}: choose from {', '.join(sorted(everywhere))}")
        values |= variants.get(variant, {})
    values |= {name: value for name, value in changes.items() if value is not None}
    if unknown := values.keys() - {field.name for field in fields(TaskSettings)}:
        raise UserError(f"{RECIPES / task}.yaml has unknown values: {', '.join(sorted(unknown))}")
    return TaskSettings(task=task, **values)


def _read(task: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / f"{task}.yaml").read_text(encoding="utf-8"))
