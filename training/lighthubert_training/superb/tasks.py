"""What each task of SUPERB asks of features: its labels, its head, its loss, and what its outputs are worth."""

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import median_filter
from torch import nn
from transformers.models.wav2vec2.modeling_wav2vec2 import AMSoftmaxLoss

from lighthubert_training.decoding import Alphabet, BeamSearch, text_of, words_of
from lighthubert_training.error_rates import word_error_rate
from lighthubert_training.masks import frame_mask
from lighthubert_training.superb.data import Part, Recipe, load_part, load_table
from lighthubert_training.superb.features import Upstream
from lighthubert_training.superb.heads import (
    FrameClassifier,
    RecurrentClassifier,
    SpeakerEmbedder,
    UtteranceClassifier,
)
from lighthubert_training.superb.metrics import (
    Turn,
    accuracy,
    diarization_error_rate,
    equal_error_rate,
    slot_f1,
    slot_value_error_rate,
)


class Task(ABC):
    """A task whose head learns.

    Attributes:
        columns: labels of the training part.
        eval_columns: of the other parts, where these differ.
        higher_is_better: of each metric; the first decides which head is the best on the dev part.
    """

    columns: tuple[str, ...]
    eval_columns: tuple[str, ...] | None = None
    higher_is_better: Mapping[str, bool]

    def __init__(self, recipe: Recipe, parts: Mapping[str, Part], data_dir: Path | None):
        self.recipe, self.parts, self.data_dir = recipe, parts, data_dir
        self.prepare()

    @classmethod
    def load_folds(cls, recipe: Recipe, data_dir: Path | None) -> "list[Task]":
        """The task once, or once for each fold."""
        others = cls.columns if cls.eval_columns is None else cls.eval_columns
        parts = {"train": load_part(recipe, data_dir, "train", cls.columns)}
        parts |= {name: load_part(recipe, data_dir, name, others) for name in ("dev", "test")}
        return [cls(recipe, parts, data_dir)]

    @abstractmethod
    def prepare(self) -> None:
        """Reads the labels, and checks them."""

    @abstractmethod
    def build_head(self, upstream: Upstream) -> nn.Module:
        """What learns."""

    @abstractmethod
    def loss(
        self, head: nn.Module, outputs: torch.Tensor, lengths: torch.Tensor, rows: Sequence[dict[str, Any]]
    ) -> torch.Tensor:
        """Mean over recordings."""

    @abstractmethod
    def scores(self, outputs: Sequence[torch.Tensor], part: Part) -> dict[str, float]:
        """Each metric, as a fraction, of the head's `outputs` for each recording of `part`, without padding."""


def numbered(labels: Iterable[str]) -> dict[str, int]:
    """A number for each label, in their order."""
    return {label: number for number, label in enumerate(sorted(labels))}


class Classification(Task):
    """One or more labels of a recording as a whole; all have to be right."""

    higher_is_better = {"accuracy": True}

    def prepare(self) -> None:
        self.numbers = [numbered({str(row[column]) for row in self.parts["train"].rows}) for column in self.columns]
        for part in self.parts.values():
            for number, row in enumerate(part.rows):
                for column, numbers in zip(self.columns, self.numbers, strict=True):
                    if str(row[column]) not in numbers:
                        raise ValueError(
                            f"{self.recipe.task}: recording {number} of the {part.name} part has the {column}"
                            f" {row[column]!r}, which no training recording has"
                        )

    def build_head(self, upstream: Upstream) -> nn.Module:
        return UtteranceClassifier(upstream.hidden_size, sum(map(len, self.numbers)), self.recipe.projector_size)

    def loss(self, head, outputs, lengths, rows) -> torch.Tensor:
        losses = []
        for column, numbers, logits in zip(self.columns, self.numbers, self._by_label(outputs), strict=True):
            targets = torch.tensor([numbers[str(row[column])] for row in rows], device=outputs.device)
            losses.append(F.cross_entropy(logits, targets))
        return torch.stack(losses).sum()

    def scores(self, outputs, part) -> dict[str, float]:
        chosen = [logits.argmax(dim=-1).tolist() for logits in self._by_label(torch.stack(list(outputs)))]
        labels = list(zip(self.columns, self.numbers, strict=True))
        expected = [tuple(numbers[str(row[column])] for column, numbers in labels) for row in part.rows]
        return {"accuracy": accuracy(expected, zip(*chosen))}

    def _by_label(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return logits.split(list(map(len, self.numbers)), dim=-1)


class KeywordSpotting(Classification):
    columns = ("label",)


class SpeakerIdentification(Classification):
    columns = ("speaker",)


class IntentClassification(Classification):
    columns = ("action", "object", "location")


class EmotionRecognition(Classification):
    """Five folds: each is tested once by a head that learnt of four fifths of the others; the rest is its dev part."""

    columns = ("emotion",)
    DEV_SHARE = 0.2

    @classmethod
    def load_folds(cls, recipe: Recipe, data_dir: Path | None) -> list[Task]:
        everything = load_part(recipe, data_dir, "train", ("emotion", "fold"))
        folds = sorted({row["fold"] for row in everything.rows})
        if len(folds) < 2:
            raise ValueError(f"{recipe.task}: the column fold has one value, {folds[0]}: folds are tested in turn")
        return [cls(recipe, cls._parts(everything, fold), data_dir) for fold in folds]

    @classmethod
    def _parts(cls, everything: Part, fold: Any) -> dict[str, Part]:
        of_fold = [at for at, row in enumerate(everything.rows) if row["fold"] == fold]
        others = [at for at, row in enumerate(everything.rows) if row["fold"] != fold]
        random.Random(0).shuffle(others)
        num_dev = max(1, int(cls.DEV_SHARE * len(others)))
        indices = {"train": others[num_dev:], "dev": others[:num_dev], "test": of_fold}
        parts = {name: everything.select(chosen) for name, chosen in indices.items()}
        for name, part in parts.items():
            part.name = name
        return parts


class Transcription(Task):
    """Units in order, by CTC; the blank is unit 0, `special_units` come next."""

    special_units: tuple[str, ...] = ()

    def prepare(self) -> None:
        units = sorted({unit for row in self.parts["train"].rows for unit in self.units_of(row)})
        self.units = ["<pad>", *self.special_units, *(unit for unit in units if unit not in self.special_units)]
        self.index = {unit: number for number, unit in enumerate(self.units)}
        for part in self.parts.values():
            unknown = {unit for row in part.rows for unit in self.units_of(row)} - self.index.keys()
            if unknown:
                raise ValueError(
                    f"{self.recipe.task}: the {part.name} part has what no training recording has:"
                    f" {', '.join(map(repr, sorted(unknown)))}"
                )

    @abstractmethod
    def units_of(self, row: Mapping[str, Any]) -> list[str]:
        """What is written of a recording."""

    @abstractmethod
    def text_of(self, units: Sequence[str]) -> str:
        """Units as words with spaces between."""

    def loss(self, head, outputs, lengths, rows) -> torch.Tensor:
        targets = [torch.tensor([self.index[unit] for unit in self.units_of(row)]) for row in rows]
        sizes = torch.tensor([len(target) for target in targets])
        log_probs = outputs.float().log_softmax(dim=-1).transpose(0, 1)
        return F.ctc_loss(log_probs, torch.cat(targets).to(outputs.device), lengths, sizes, zero_infinity=True)

    def greedy(self, logits: torch.Tensor) -> str:
        path = logits.argmax(dim=-1).unique_consecutive().tolist()
        return self.text_of([self.units[unit] for unit in path if unit])


class PhoneRecognition(Transcription):
    """Phones of the words by a lexicon: `lexicon.txt` beside the data, a word and its phones on each line."""

    columns = ("text",)
    higher_is_better = {"per": False}

    def prepare(self) -> None:
        file = (self.data_dir or Path("DATA_DIR")) / self.recipe.task / "lexicon.txt"
        if not file.exists():
            raise ValueError(f"{self.recipe.task}: there is no {file}. {self.recipe.data}")
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        self.phones = {word.lower(): phones for word, *phones in reversed(lines)}  # the first pronunciation counts
        super().prepare()

    def units_of(self, row) -> list[str]:
        try:
            return [phone for word in row["text"].lower().split() for phone in self.phones[word]]
        except KeyError as error:
            raise ValueError(f"{self.recipe.task}: the word {error} is not in lexicon.txt") from error

    def text_of(self, units) -> str:
        return " ".join(units)

    def build_head(self, upstream: Upstream) -> nn.Module:
        return FrameClassifier(upstream.hidden_size, len(self.units), self.recipe.projector_size)

    def scores(self, outputs, part) -> dict[str, float]:
        references = [self.text_of(self.units_of(row)) for row in part.rows]
        return {"per": word_error_rate(references, list(map(self.greedy, outputs)))}


class Recurrent(Transcription):
    """Characters, with `|` between words, from two layers of LSTM."""

    columns = ("text",)
    special_units = ("<unk>", "|")

    def units_of(self, row) -> list[str]:
        return list("|".join(row["text"].split()))

    def text_of(self, units) -> str:
        return " ".join("".join(units).replace("|", " ").split())

    def build_head(self, upstream: Upstream) -> nn.Module:
        recipe = self.recipe
        return RecurrentClassifier(
            upstream.hidden_size,
            len(self.units),
            recipe.lstm_size,
            num_layers=2,
            bidirectional=True,
            projector_size=recipe.projector_size,
            dropout=recipe.dropout,
        )


class SpeechRecognition(Recurrent):
    """Greedy, and with a language model where `lm.arpa` lies beside the data."""

    higher_is_better = {"wer": False, "wer_lm": False}

    def scores(self, outputs, part) -> dict[str, float]:
        references = [" ".join(row["text"].split()) for row in part.rows]
        found = {"wer": word_error_rate(references, list(map(self.greedy, outputs)))}
        if part.name == "test" and self.decoder is not None:
            found["wer_lm"] = word_error_rate(references, list(map(self.decoder, outputs)))
        return found

    def prepare(self) -> None:
        super().prepare()
        self.decoder: Callable[[torch.Tensor], str] | None = None
        lm_path = self.data_dir and self.data_dir / self.recipe.task / "lm.arpa"
        if lm_path and lm_path.exists():
            delimiter = self.index["|"]
            letters = {number: unit for number, unit in enumerate(self.units) if number > delimiter}
            search = BeamSearch(Alphabet(blank=0, delimiter=delimiter, letters=letters), lm_path)

            def decode(logits: torch.Tensor) -> str:
                log_probs = logits.float().log_softmax(dim=-1).numpy()
                return text_of(words_of(search(log_probs), log_probs, search.alphabet, 1.0))

            self.decoder = decode


class SlotFilling(Recurrent):
    """Characters, and units of their own for the ends of slots: `play B-artist the beatles E-artist`."""

    higher_is_better = {"slot_f1": True, "slot_value_cer": False}

    def units_of(self, row) -> list[str]:
        words = [[word] if word.startswith(("B-", "E-")) else list(word) for word in row["text"].split()]
        return [unit for number, word in enumerate(words) for unit in (["|", *word] if number else word)]

    def scores(self, outputs, part) -> dict[str, float]:
        references = [" ".join(row["text"].split()) for row in part.rows]
        hypotheses = list(map(self.greedy, outputs))
        return {
            "slot_f1": slot_f1(references, hypotheses),
            "slot_value_cer": slot_value_error_rate(references, hypotheses),
        }


class SpeakerVerification(Task):
    """Embeddings that tell training speakers apart; trials are scored by their cosine."""

    columns, eval_columns = ("speaker",), ("id",)
    higher_is_better = {"eer": False}

    def prepare(self) -> None:
        self.numbers = numbered({str(row["speaker"]) for row in self.parts["train"].rows})
        self.trials = {}
        for name in ("dev", "test"):
            rows = load_table(self.recipe, self.data_dir, f"{name}_trials", ("enrolment", "trial", "same"))
            known = {str(row["id"]): number for number, row in enumerate(self.parts[name].rows)}
            for row in rows:
                for column in ("enrolment", "trial"):
                    if str(row[column]) not in known:
                        raise ValueError(
                            f"{self.recipe.task}: {name}_trials.csv names {row[column]}, which the {name} part lacks"
                        )
            self.trials[name] = [
                (known[str(row["enrolment"])], known[str(row["trial"])], bool(int(row["same"]))) for row in rows
            ]

    def build_head(self, upstream: Upstream) -> nn.Module:
        head = SpeakerEmbedder(upstream.hidden_size, self.recipe.embedding_size, self.recipe.pooled_size)
        head.objective = AMSoftmaxLoss(self.recipe.embedding_size, len(self.numbers), scale=30.0, margin=0.4)
        return head

    def loss(self, head, outputs, lengths, rows) -> torch.Tensor:
        targets = torch.tensor([self.numbers[str(row["speaker"])] for row in rows], device=outputs.device)
        return head.objective(outputs, targets)

    def scores(self, outputs, part) -> dict[str, float]:
        embeddings = F.normalize(torch.stack(list(outputs)), dim=-1)
        first, second, same = zip(*self.trials[part.name])
        cosines = (embeddings[list(first)] * embeddings[list(second)]).sum(dim=-1)
        return {"eer": equal_error_rate(same, cosines.tolist())}


class Diarization(Task):
    """Who speaks when, of as many speakers as a training recording has at most; in any order."""

    columns = ("segments",)
    higher_is_better = {"der": False}
    THRESHOLD, MEDIAN_FRAMES = 0.5, 11

    def prepare(self) -> None:
        speakers = [{segment["speaker"] for segment in row["segments"]} for row in self.parts["train"].rows]
        self.num_speakers = max(map(len, speakers))
        if self.num_speakers < 2:
            raise ValueError(f"{self.recipe.task}: no training recording has more than one speaker")

    def build_head(self, upstream: Upstream) -> nn.Module:
        self.seconds_per_frame = upstream.samples_per_frame / upstream.sampling_rate  # of targets and turns
        return RecurrentClassifier(
            upstream.hidden_size, self.num_speakers, self.recipe.lstm_size, num_layers=1, bidirectional=False
        )

    def targets(self, row: Mapping[str, Any], num_frames: int) -> torch.Tensor:
        """Who speaks in each frame, (num_frames, num_speakers); `first_frame` of a row is where the clip begins."""
        target = torch.zeros(num_frames, self.num_speakers)
        names = sorted({segment["speaker"] for segment in row["segments"]})
        for segment in row["segments"]:
            start, end = (
                round(segment[at] / self.seconds_per_frame) - row.get("first_frame", 0) for at in ("start", "end")
            )
            if end > 0:
                target[max(0, start) : end, names.index(segment["speaker"])] = 1.0
        return target

    def loss(self, head, outputs, lengths, rows) -> torch.Tensor:
        targets = torch.stack([self.targets(row, outputs.shape[1]) for row in rows]).to(outputs.device)
        mask = frame_mask(lengths, outputs.shape[1]).unsqueeze(-1)
        losses = []
        for order in itertools.permutations(range(self.num_speakers)):
            loss = F.binary_cross_entropy_with_logits(outputs, targets[..., list(order)], reduction="none")
            losses.append((loss * mask).sum(dim=(1, 2)) / (lengths * self.num_speakers))
        return torch.stack(losses).min(dim=0).values.mean()

    def scores(self, outputs, part) -> dict[str, float]:
        references, hypotheses, seconds = [], [], []
        for row, logits in zip(part.rows, outputs, strict=True):
            references.append([Turn(str(each["speaker"]), each["start"], each["end"]) for each in row["segments"]])
            speaking = median_filter(
                (logits.sigmoid() > self.THRESHOLD).numpy().astype(np.uint8), size=(self.MEDIAN_FRAMES, 1)
            )
            hypotheses.append(turns_of(speaking, self.seconds_per_frame))
            seconds.append(max([len(logits) * self.seconds_per_frame, *(turn.end for turn in references[-1])]))
        return {"der": diarization_error_rate(references, hypotheses, seconds)}


def turns_of(speaking: np.ndarray, seconds_per_frame: float) -> list[Turn]:
    """Turns of frames (num_frames, num_speakers) of 0 and 1."""
    turns = []
    for speaker, frames in enumerate(speaking.T):
        edges = np.flatnonzero(np.diff(frames.astype(int), prepend=0, append=0)) * seconds_per_frame
        turns += [Turn(str(speaker), start, end) for start, end in zip(edges[::2], edges[1::2])]
    return turns


TASKS: dict[str, type[Task]] = {
    "asr": SpeechRecognition,
    "asv": SpeakerVerification,
    "er": EmotionRecognition,
    "ic": IntentClassification,
    "ks": KeywordSpotting,
    "pr": PhoneRecognition,
    "sd": Diarization,
    "sf": SlotFilling,
    "sid": SpeakerIdentification,
}
"""Tasks that learn, by the names of their recipes. Query by example does not, and is in `superb_qbe`."""
