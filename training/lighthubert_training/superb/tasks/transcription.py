"""Tasks that write down what is said, with CTC: phones, characters, and characters with slots."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lighthubert_training.decoding import Alphabet, BeamSearch, text_of, words_of
from lighthubert_training.error_rates import word_error_rate
from lighthubert_training.superb.heads import FrameClassifier, RecurrentClassifier
from lighthubert_training.superb.metrics import slot_f1, slot_value_error_rate
from lighthubert_training.superb.tasks.base import Task
from modeling_lighthubert.errors import UserError


class Transcription(Task):
    """Sequences of units, by CTC: the blank is unit 0, followed by `special_units` and those of the training part."""

    columns = ("text",)
    special_units: tuple[str, ...] = ()

    def prepare(self) -> None:
        units = sorted({unit for row in self.parts["train"].rows for unit in self.units_of(row)})
        self.units = ["<pad>", *self.special_units, *(unit for unit in units if unit not in self.special_units)]
        self.unit_ids = {unit: index for index, unit in enumerate(self.units)}
        for part in self.parts.values():
            unknown = {unit for row in part.rows for unit in self.units_of(row)} - self.unit_ids.keys()
            if unknown:
                raise UserError(
                    f"{self.settings.task}: the {part.name} part has what no training recording has:"
                    f" {', '.join(map(repr, sorted(unknown)))}"
                )

    @abstractmethod
    def units_of(self, row: Mapping[str, Any]) -> list[str]:
        """The units of the transcript of a recording."""

    def text_of(self, units: Sequence[str]) -> str:
        """Units as words with spaces between."""
        return " ".join(units)

    def loss(self, head, outputs, lengths, rows) -> torch.Tensor:
        targets = [torch.tensor([self.unit_ids[unit] for unit in self.units_of(row)]) for row in rows]
        sizes = torch.tensor([len(target) for target in targets])
        log_probs = outputs.float().log_softmax(dim=-1).transpose(0, 1)
        return F.ctc_loss(log_probs, torch.cat(targets).to(outputs.device), lengths, sizes, zero_infinity=True)

    def greedy(self, logits: torch.Tensor) -> str:
        """The text of the likeliest unit of each frame."""
        path = logits.argmax(dim=-1).unique_consecutive().tolist()
        return self.text_of([self.units[unit] for unit in path if unit])


class PhoneRecognition(Transcription):
    """Phones of the words by a lexicon: `lexicon.txt` beside the data, with a word and its phones on each line."""

    higher_is_better = {"per": False}

    def prepare(self) -> None:
        lexicon = self.data.file("lexicon.txt").read_text(encoding="utf-8")
        lines = [line.split() for line in lexicon.splitlines() if line.strip()]
        self.phones = {word.lower(): phones for word, *phones in reversed(lines)}  # the first pronunciation counts
        super().prepare()

    def units_of(self, row) -> list[str]:
        try:
            return [phone for word in row["text"].lower().split() for phone in self.phones[word]]
        except KeyError as error:
            raise UserError(f"{self.settings.task}: the word {error} is not in lexicon.txt") from error

    def build_head(self) -> nn.Module:
        return FrameClassifier(self.upstream.hidden_size, len(self.units), self.settings.projector_size)

    def scores(self, outputs, part) -> dict[str, float]:
        references = [self.text_of(self.units_of(row)) for row in part.rows]
        return {"per": word_error_rate(references, list(map(self.greedy, outputs)))}


class CharacterRecognition(Transcription):
    """Characters, with `|` between words, from two bidirectional LSTM layers."""

    special_units = ("<unk>", "|")

    def units_of(self, row) -> list[str]:
        return list("|".join(row["text"].split()))

    def text_of(self, units) -> str:
        return " ".join("".join(units).replace("|", " ").split())

    def build_head(self) -> nn.Module:
        return RecurrentClassifier(
            self.upstream.hidden_size, len(self.units), self.settings.lstm_size, num_layers=2, bidirectional=True,
            projector_size=self.settings.projector_size, dropout=self.settings.dropout,
        )  # fmt: skip


class SpeechRecognition(CharacterRecognition):
    """Greedy decoding, and on the test part beam search with a language model, if `lm.arpa` lies beside the data."""

    higher_is_better = {"wer": False, "wer_lm": False}

    def prepare(self) -> None:
        super().prepare()
        lm_path, delimiter = self.data.folder / "lm.arpa", self.unit_ids["|"]
        letters = {index: unit for index, unit in enumerate(self.units) if index > delimiter}
        self.search = BeamSearch(Alphabet(0, delimiter, letters), lm_path) if lm_path.exists() else None

    def with_language_model(self, logits: torch.Tensor) -> str:
        """The text that beam search finds."""
        assert self.search is not None
        log_probs = logits.float().log_softmax(dim=-1).numpy()
        return text_of(words_of(self.search(log_probs), log_probs, self.search.alphabet, 1.0))

    def scores(self, outputs, part) -> dict[str, float]:
        references = [" ".join(row["text"].split()) for row in part.rows]
        decoders = {"wer": self.greedy}
        if part.name == "test" and self.search is not None:
            decoders["wer_lm"] = self.with_language_model
        return {name: word_error_rate(references, list(map(decode, outputs))) for name, decode in decoders.items()}


class SlotFilling(CharacterRecognition):
    """Characters, and a unit for the beginning and the end of each slot: `play B-artist the beatles E-artist`."""

    higher_is_better = {"slot_f1": True, "slot_value_cer": False}

    def units_of(self, row) -> list[str]:
        words = [[word] if word.startswith(("B-", "E-")) else list(word) for word in row["text"].split()]
        return [unit for number, word in enumerate(words) for unit in (["|", *word] if number else word)]

    def scores(self, outputs, part) -> dict[str, float]:
        texts = [" ".join(row["text"].split()) for row in part.rows], list(map(self.greedy, outputs))
        return {"slot_f1": slot_f1(*texts), "slot_value_cer": slot_value_error_rate(*texts)}
