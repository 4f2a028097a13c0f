"""The base class of tasks that train a head, and the tasks that classify a recording as a whole."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from lighthubert_training.superb.data import Part, TaskData
from lighthubert_training.superb.features import Upstream
from lighthubert_training.superb.heads import UtteranceClassifier
from lighthubert_training.superb.metrics import accuracy
from modeling_lighthubert.errors import UserError


class Task(ABC):
    """A task on the features of `upstream`.

    Attributes:
        columns: labels of the training part.
        eval_columns: labels of the other parts, where these differ.
        higher_is_better: of each metric; the first one decides which head is the best on the dev part.

    Raises:
        UserError: labels that contradict each other, or files that are missing.
    """

    columns: tuple[str, ...]
    eval_columns: tuple[str, ...] | None = None
    higher_is_better: Mapping[str, bool]

    def __init__(self, data: TaskData, parts: Mapping[str, Part], upstream: Upstream):
        self.data, self.settings, self.parts, self.upstream = data, data.settings, parts, upstream
        self.prepare()

    @classmethod
    def load_folds(cls, data: TaskData, upstream: Upstream) -> list[Self]:
        """The task once, or once for each fold of a cross-validation."""
        others = cls.columns if cls.eval_columns is None else cls.eval_columns
        columns = {"train": cls.columns, "dev": others, "test": others}
        return [cls(data, {name: data.part(name, of_part) for name, of_part in columns.items()}, upstream)]

    def selection_score(self, scores: Mapping[str, float]) -> float:
        """The first metric, negated if it is an error: higher is better."""
        metric, higher_is_better = next(iter(self.higher_is_better.items()))
        return scores[metric] if higher_is_better else -scores[metric]

    @abstractmethod
    def prepare(self) -> None:
        """Reads the labels, and checks them."""

    @abstractmethod
    def build_head(self) -> nn.Module:
        """A new head, called with features (batch_size, num_frames, hidden_size) and lengths (batch_size)."""

    @abstractmethod
    def loss(
        self, head: nn.Module, outputs: torch.Tensor, lengths: torch.Tensor, rows: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        """Mean over recordings of the loss of the head's `outputs`, a scalar; `rows` are labels of each recording."""

    @abstractmethod
    def scores(self, outputs: Sequence[torch.Tensor], part: Part) -> dict[str, float]:
        """Each metric, as a fraction, of the head's `outputs` for each recording of `part`, without padding."""


def label_ids(labels: Iterable[str]) -> dict[str, int]:
    """An id for each label, in alphabetical order."""
    return {label: index for index, label in enumerate(sorted(labels))}


class Classification(Task):
    """One or more labels of a recording; a prediction is right if all of them are."""

    higher_is_better = {"accuracy": True}

    def prepare(self) -> None:
        self.ids = {name: label_ids({str(row[name]) for row in self.parts["train"].rows}) for name in self.columns}
        for part in self.parts.values():
            for number, row in enumerate(part.rows):
                for name, ids in self.ids.items():
                    if str(row[name]) not in ids:
                        raise UserError(
                            f"{self.settings.task}: recording {number} of the {part.name} part has the {name}"
                            f" {row[name]!r}, which no training recording has"
                        )

    def build_head(self) -> nn.Module:
        num_labels = sum(map(len, self.ids.values()))
        return UtteranceClassifier(self.upstream.hidden_size, num_labels, self.settings.projector_size)

    def loss(self, head, outputs, lengths, rows) -> torch.Tensor:
        losses = []
        for (name, ids), logits in zip(self.ids.items(), self._by_label(outputs), strict=True):
            targets = torch.tensor([ids[str(row[name])] for row in rows], device=outputs.device)
            losses.append(F.cross_entropy(logits, targets))
        return torch.stack(losses).sum()

    def scores(self, outputs, part) -> dict[str, float]:
        chosen = [logits.argmax(dim=-1).tolist() for logits in self._by_label(torch.stack(list(outputs)))]
        expected = [tuple(ids[str(row[name])] for name, ids in self.ids.items()) for row in part.rows]
        return {"accuracy": accuracy(expected, zip(*chosen))}

    def _by_label(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return logits.split(list(map(len, self.ids.values())), dim=-1)


class KeywordSpotting(Classification):
    columns = ("label",)


class SpeakerIdentification(Classification):
    columns = ("speaker",)


class IntentClassification(Classification):
    columns = ("action", "object", "location")


class EmotionRecognition(Classification):
    """Each fold is tested once by a head that is trained on four fifths of the others; the rest is its dev part."""

    columns = ("emotion",)
    DEV_FRACTION = 0.2

    @classmethod
    def load_folds(cls, data: TaskData, upstream: Upstream) -> list[Self]:
        everything = data.part("train", ("emotion", "fold"))
        folds = sorted({row["fold"] for row in everything.rows})
        if len(folds) < 2:
            raise UserError(f"{data.settings.task}: the column fold has one value, {folds[0]}: give two or more")
        tasks = []
        for fold in folds:
            test = [at for at, row in enumerate(everything.rows) if row["fold"] == fold]
            others = [at for at, row in enumerate(everything.rows) if row["fold"] != fold]
            random.Random(0).shuffle(others)
            num_dev = max(1, int(cls.DEV_FRACTION * len(others)))
            indices = {"train": others[num_dev:], "dev": others[:num_dev], "test": test}
            parts = {name: everything.select(chosen, name) for name, chosen in indices.items()}
            tasks.append(cls(data, parts, upstream))
        return tasks
