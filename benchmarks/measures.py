"""What models of one teacher are measured by: how well the target can be predicted from their features, what linear
probes read from frozen features, and speech recognition that is fine-tuned with few labels.

Measures of a speaker and of a language that are held out of distillation are apart.
"""

import copy
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from ctc import Alphabet, phonemize, train_ctc, transcribe, whiten
from recordings import HELD_LANGUAGE, HELD_SPEAKER, KNOWN, FolderArguments, Recording, Speech, draw, read_speech
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor, set_seed

from lighthubert_training.distillation.teacher import Teacher
from lighthubert_training.error_rates import character_error_rate, word_error_rate
from lighthubert_training.models import computed_once, draw_time_mask, frame_mask, true_lengths
from lighthubert_training.probing import linear_probe, probe_accuracy
from lighthubert_training.recognition.text import TextArguments
from lighthubert_training.recognition.trainer import begin_with_blanks
from lighthubert_training.runs.distributed import DEVICE_HELP
from lighthubert_training.runs.options import option
from modeling_lighthubert import LightHubertForCTC
from modeling_lighthubert.loading import parse_device


TEXT = TextArguments(text_case="lower", chars_to_ignore=list(".,;:!?¿¡\"'’()«»-–—…/|"))
SECONDS_OF_GROUP = {"r2": 20, "probes": 20, "phones": 40, "recognition": 600, "superb": 600, "stand_ins": 600}
"""About what each group of measures takes of a model, on one of two cores; of the last two it is a guess."""
GROUPS = tuple(SECONDS_OF_GROUP)


@dataclass
class MeasureArguments(FolderArguments):
    """What models are measured on, and by what."""

    measures: list[str] = option(list(GROUPS), f"Groups of measures: {', '.join(GROUPS)}.")
    label_minutes: list[float] = option([1.0, 10.0], "Minutes of labels that recognition is fine-tuned with.")
    steps_of_minutes: list[int] = option([300, 1000], "Steps of fine-tuning, for each.")
    ctc_learning_rate: float = option(1e-3, "Peak learning rate of fine-tuning.")
    max_recordings: int = option(200, "Recordings of training, and of each held-out part, that R2 is measured on.")
    max_probe_recordings: int = option(400, "Training recordings of a probe.")
    phone_steps: int = option(600, "Steps of the phone probe.")
    device: str = option("cpu", DEVICE_HELP.replace("a GPU if there is one", "cpu"))

    def __post_init__(self) -> None:
        if unknown := set(self.measures) - set(GROUPS):
            raise ValueError(f"measures={' '.join(sorted(unknown))}: choose from {', '.join(GROUPS)}")
        if len(self.label_minutes) != len(self.steps_of_minutes):
            raise ValueError("label_minutes and steps_of_minutes: give as many of one as of the other")


class Features(ABC):
    """Frozen features of recordings."""

    def __init__(self, speech: Speech):
        self.speech = speech
        self.means: dict[int, torch.Tensor] = {}

    @abstractmethod
    def __call__(self, batch: Sequence[int], mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (batch_size, num_frames, hidden_size), and the number of frames of each recording.

        Args:
            mask: frames that are hidden, bool (batch_size, num_frames).
        """

    @torch.no_grad()
    def frames(self, batch: Sequence[int], mask: torch.Tensor | None = None) -> torch.Tensor:
        """Features of all true, or of all masked frames, (num_frames, hidden_size)."""
        mask = mask if mask is None else mask.to(self.speech.device)
        states, lengths = self(batch, mask)
        return states[frame_mask(lengths.to(states.device), states.shape[1]) if mask is None else mask]

    @torch.no_grad()
    def states(self, numbers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Features of each recording, float16 (num_frames, hidden_size)."""
        states: dict[int, torch.Tensor] = {}
        for batch in self.speech.batches(numbers):
            padded, lengths = self(batch)
            for number, state, length in zip(batch, padded, lengths.tolist(), strict=True):
                states[number] = state[:length].half()
                self.means[number] = state[:length].mean(dim=0).cpu()
        return states

    def pooled(self, numbers: Sequence[int]) -> np.ndarray:
        """Mean over the frames of each recording, (num_recordings, hidden_size)."""
        self.states([number for number in numbers if number not in self.means])
        return torch.stack([self.means[number] for number in numbers]).numpy()


class ModelFeatures(Features):
    """What a model in evaluation mode puts out first: last hidden states, or logits. A feature encoder that is the
    teacher's is not computed again."""

    def __init__(self, model: PreTrainedModel, speech: Speech):
        super().__init__(speech)
        self.model: Any = model.eval().to(speech.device)
        self.shares_encoder = has_encoder_of(self.model, speech.teacher)

    def __call__(self, batch: Sequence[int], mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        audio, masks = self.speech.audio(batch), {} if mask is None else {"mask_time_indices": mask.clone()}
        features = self.speech.encoded(batch) if self.shares_encoder else None
        with computed_once(self.model.base_model.feature_extractor, features):
            outputs = self.model(audio["input_values"], attention_mask=audio["attention_mask"], **masks)
        return outputs[0], true_lengths(self.model.base_model, audio["attention_mask"])


def has_encoder_of(model: Any, teacher: Teacher) -> bool:
    """Whether a model has the weights of the teacher's feature encoder."""
    ours, theirs = (each.feature_extractor.state_dict() for each in (model.base_model, teacher.model))
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == theirs[name].shape
        and torch.equal(ours[name].float(), theirs[name].to(ours[name].device).float())
        for name in ours
    )


class Measures:
    """Data that models are compared on.

    Args:
        teacher: gives the targets of R2, and the feature encoder that is computed once.
        recordings: default: those of `arguments`, which are read.
    """

    MASK = {"mask_time_prob": 0.3, "mask_time_length": 10}

    def __init__(
        self,
        arguments: MeasureArguments,
        teacher: Teacher,
        extractor: Wav2Vec2FeatureExtractor,
        recordings: Sequence[Recording] | None = None,
    ):
        self.arguments = arguments
        teacher.to(parse_device(arguments.device))
        self.speech = Speech(recordings or read_speech(arguments), teacher, extractor)
        rng, most = random.Random(0), arguments.max_recordings
        self.train_frames = draw(self.speech.select("train"), most, rng)
        self.test_frames = {
            name: draw(found, most, rng)
            for name in (KNOWN, HELD_SPEAKER, HELD_LANGUAGE)
            if (found := self.speech.select("test", held_out=[name]))
        }

    def __call__(self, model: PreTrainedModel, seed: int) -> dict[str, float]:
        """All measures of a cut model. Names that begin with `wer`, `cer` or `per` are error rates.

        Args:
            seed: of what is trained on top: output layers, order of recordings, which of them are labelled.
        """
        row = self.of_features(ModelFeatures(model, self.speech), seed)
        return row | (self.recognition(model, seed) if "recognition" in self.arguments.measures else {})

    def of_features(self, features: Features, seed: int) -> dict[str, float]:
        """All measures of features that stay as they are."""
        row, groups = {}, self.arguments.measures
        if "r2" in groups:
            row |= self.explained_variance(features)
        if "phones" in groups and self.phones:
            row |= self.phone_probe(features, seed)
        if "probes" in groups:
            row |= self.probes(features)
        return row

    @cached_property
    def targets(self) -> dict[int, torch.Tensor]:
        """Of each recording that R2 is measured on, float16 (num_frames, hidden_size of the teacher)."""
        targets = {}
        for number in [*self.train_frames, *sum(self.test_frames.values(), [])]:
            audio = self.speech.audio([number])
            outputs = self.speech.teacher(audio["input_values"], audio["attention_mask"])
            targets[number] = outputs.targets[0][0].half().cpu()
        return targets

    def _frames(self, model: Features, numbers: Sequence[int], masked: bool) -> tuple[np.ndarray, np.ndarray]:
        """Features and targets of true frames; of the masked ones only if `masked`. A mask follows from the number of
        its recording, so that models are compared on the same input."""
        features, targets = [], []
        for batch in self.speech.batches(numbers):
            mask, kept = None, [self.targets[number].float() for number in batch]
            if masked:
                mask = draw_time_mask([len(each) for each in kept], **self.MASK, seeds=batch)
                kept = [each[row[: len(each)]] for each, row in zip(kept, mask, strict=True)]
            features.append(model.frames(batch, mask))
            targets += kept
        return torch.cat(features).double().cpu().numpy(), torch.cat(targets).double().numpy()

    def explained_variance(self, model: Features) -> dict[str, float]:
        """R2: the share of the target's variance that a ridge regression, fitted to frames of training recordings,
        explains on held-out ones; and on masked frames, with a regression of their own."""
        row = {}
        for masked in (False, True):
            regression = make_pipeline(StandardScaler(), Ridge())
            regression.fit(*self._frames(model, self.train_frames, masked))
            for name, numbers in self.test_frames.items() if not masked else [(KNOWN, self.test_frames[KNOWN])]:
                features, targets = self._frames(model, numbers, masked)
                score = r2_score(targets, regression.predict(features), multioutput="variance_weighted")
                row[f"r2{' of masked frames' if masked else ''}{name}"] = float(score)
        return row

    def probes(self, model: Features) -> dict[str, float]:
        """Accuracies of linear probes on the mean of a recording's frames."""
        select, row, rng = self.speech.select, {}, random.Random(0)
        every = (KNOWN, HELD_SPEAKER, HELD_LANGUAGE)
        for column in ("digit", "keyword"):
            train = draw(select("train", column), self.arguments.max_probe_recordings, rng)
            for name in (KNOWN, HELD_SPEAKER):
                if test := select("test", column, held_out=[name]):
                    row[column + name] = self._probe(model, train, test, column)
        for column, other in (("speaker", "language"), ("language", None)):  # one speaker a language is no task
            train, test = (select(part, column, without=other, held_out=every) for part in ("train", "test"))
            if test:
                row[column] = self._probe(model, draw(train, self.arguments.max_probe_recordings, rng), test, column)
        if test := select("test", "slots"):
            train = draw(select("train", "slots"), self.arguments.max_probe_recordings, rng)
            row["slots"] = self._slot_probe(model, train, test)
        return row

    def _probe(self, model: Features, train: Sequence[int], test: Sequence[int], column: str) -> float:
        """Accuracy on test recordings; over five folds of them where training recordings have other classes."""
        train_labels, test_labels = self.speech.labels(train, column), self.speech.labels(test, column)
        if not set(test_labels) <= set(train_labels):
            folds = StratifiedKFold(5, shuffle=True, random_state=0)
            return float(cross_val_score(linear_probe(), model.pooled(test), test_labels, cv=folds).mean())
        return probe_accuracy(model.pooled(train), train_labels, model.pooled(test), test_labels)

    def _slot_probe(self, model: Features, train: Sequence[int], test: Sequence[int]) -> float:
        """Accuracy of the value of a slot, or that there is none, in the mean over the slots."""
        values = [[json.loads(slots) for slots in self.speech.labels(numbers, "slots")] for numbers in (train, test)]
        features = [model.pooled(numbers) for numbers in (train, test)]
        accuracies = []
        for name in sorted({name for slots in values[0] for name in slots}):
            labels = [[slots.get(name, "") for slots in each] for each in values]
            accuracies.append(probe_accuracy(features[0], labels[0], features[1], labels[1]))
        return float(np.mean(accuracies))

    def transcribed(self, part: str, *held_out: str) -> list[int]:
        """Numbers of the recordings of a part whose text and language are known; of all languages by default."""
        return self.speech.select(part, "text", "language", held_out=held_out or (KNOWN, HELD_LANGUAGE))

    def transcribed_tests(self) -> dict[str, list[int]]:
        """Test recordings whose text is known, of the languages that are held out and of the others."""
        parts = {name: self.transcribed("test", name) for name in (KNOWN, HELD_LANGUAGE)}
        return {name: numbers for name, numbers in parts.items() if numbers}

    @cached_property
    def phones(self) -> dict[int, list[str]]:
        """Phones of all recordings that are transcribed, by espeak-ng."""
        numbers = self.transcribed("train") + self.transcribed("test")
        texts, languages = (self.speech.labels(numbers, name) for name in ("text", "language"))
        return dict(zip(numbers, phonemize(texts, languages), strict=True))

    @cached_property
    def characters(self) -> dict[int, list[str]]:
        """Characters of all recordings that are transcribed, in lower case and without punctuation."""
        numbers = self.transcribed("train") + self.transcribed("test")
        return {number: list(TEXT.normalize(self.speech.labels([number], "text")[0])) for number in numbers}

    @torch.no_grad()
    def phone_probe(self, model: Features, seed: int) -> dict[str, float]:
        """Phone error rates of a linear layer on frozen features, trained with CTC on all that is transcribed."""
        train, test = self.transcribed("train"), self.transcribed("test")
        states = model.states(train + test)
        mean, whitening = whiten(torch.cat([states[number] for number in train[::4]]).float())
        set_seed(seed)
        alphabet = Alphabet(self.phones.values())
        layer = nn.Linear(whitening.shape[1], len(alphabet))
        begin_with_blanks(layer, 0)
        layer.to(self.speech.device)

        def logits(batch: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            kept = [(states[number].float() - mean) @ whitening for number in batch]
            return layer(nn.utils.rnn.pad_sequence(kept, batch_first=True)), torch.tensor(list(map(len, kept)))

        batches = self.speech.batches(train, 60.0)
        train_ctc(logits, layer, batches, self.phones, alphabet, self.arguments.phone_steps, 0.1, seed)
        found, row = transcribe(logits, self.speech.batches(test), alphabet), {}
        for name, numbers in self.transcribed_tests().items():
            texts = [" ".join(self.phones[n]) for n in numbers], [" ".join(found[n]) for n in numbers]
            row[f"per{name}"] = word_error_rate(*texts)
        return row

    def recognition(self, model: PreTrainedModel, seed: int) -> dict[str, float]:
        """Word and character error rates of the model, fine-tuned with CTC on some minutes of labelled recordings of
        all languages; of all test recordings, of the English ones among them, and of those that are held out."""
        row = {}
        train, test, parts = self.transcribed("train"), self.transcribed("test"), self.transcribed_tests()
        languages = self.speech.labels(test, "language")
        if english := [number for number, language in zip(test, languages, strict=True) if language == "en"]:
            parts[", en"] = english
        for minutes, steps in zip(self.arguments.label_minutes, self.arguments.steps_of_minutes, strict=True):
            labelled = self.minutes_of(train, minutes, seed)
            if labelled is None or not test:
                continue
            found = self.fine_tune(model, labelled, test, steps, seed)
            for name, numbers in parts.items():
                texts = ["".join(self.characters[n]) for n in numbers], ["".join(found[n]) for n in numbers]
                title = f", {minutes:g} min{name}"
                row |= {f"wer{title}": word_error_rate(*texts), f"cer{title}": character_error_rate(*texts)}
        return row

    def minutes_of(self, numbers: Sequence[int], minutes: float, seed: int) -> list[int] | None:
        """Recordings that take so many minutes, at random; `None` if there are not so many."""
        drawn, left = [], 60 * minutes
        for number in random.Random(seed).sample(list(numbers), len(numbers)):
            if left <= 0:
                break
            drawn.append(number)
            left -= self.speech.recordings[number].seconds
        return None if left > 0 else drawn

    def fine_tune(
        self, model: PreTrainedModel, train: Sequence[int], test: Sequence[int], steps: int, seed: int
    ) -> dict[int, list[str]]:
        """What the model, fine-tuned with CTC, writes. A feature encoder that is the teacher's stays frozen, as is
        common with few labels; another one, which knows nothing, learns."""
        set_seed(seed)
        alphabet = Alphabet(self.characters.values())
        options = {"vocab_size": len(alphabet), "pad_token_id": 0, "final_dropout": 0.0, "layerdrop": 0.0}
        config = copy.deepcopy(model.config)
        config.update(options)
        recogniser = LightHubertForCTC(config)
        recogniser.hubert.load_state_dict(model.state_dict())
        begin_with_blanks(recogniser.lm_head, 0)
        frozen = ModelFeatures(recogniser, self.speech)
        if frozen.shares_encoder:
            recogniser.freeze_feature_encoder()
        recogniser.train()
        rate = self.arguments.ctc_learning_rate
        train_ctc(frozen, recogniser, self.speech.batches(train, 30.0), self.characters, alphabet, steps, rate, seed)
        recogniser.eval()
        return transcribe(frozen, self.speech.batches(test), alphabet)
