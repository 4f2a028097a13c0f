"""What models of one teacher are measured by: how well the target can be predicted from their features, what linear
probes read from frozen features, and speech recognition that is fine-tuned with few labels.

Speech is a folder of Parquet files, in pairs NAME-train and NAME-test, and their columns say what they are good for:
`digit`, `keyword`, `speaker`, `language` and `slots` (JSON) are probed for, and what has `text` and `language` is
transcribed. One speaker and one language may be held out of distillation; measures of them are apart.
"""

import copy
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Audio, Dataset
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor, get_scheduler, set_seed

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.collators import pad
from lighthubert_training.data.strings import SAMPLING_RATE, encode_flac, read_parquet
from lighthubert_training.distillation.teacher import Teacher
from lighthubert_training.error_rates import character_error_rate, word_error_rate
from lighthubert_training.models import computed_once, draw_time_mask, frame_mask, true_lengths
from lighthubert_training.probing import linear_probe, probe_accuracy
from lighthubert_training.recognition.text import TextArguments
from lighthubert_training.recognition.trainer import begin_with_blanks
from lighthubert_training.runs.options import option
from modeling_lighthubert import LightHubertForCTC
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import whole_file


LABELS = ("digit", "keyword", "speaker", "language", "slots", "text")
KNOWN, HELD_SPEAKER, HELD_LANGUAGE = "", ", held-out speaker", ", held-out language"
ESPEAK_VOICES = {"en": "en-us", "es": "es-419", "fr": "fr-fr", "it": "it"}
TEXT = TextArguments(text_case="lower", chars_to_ignore=list(".,;:!?¿¡\"'’()«»-–—…/|"))
GROUPS = ("r2", "probes", "phones", "recognition", "superb", "stand_ins")
SPOKEN_ORDER = ("numberOfShots", "size", "roast", "coffeeDrink", "milkAmount", "sugarAmount")
"""Of the slots of a command. Its words were not written down, so slot filling is given the values in this order."""


@dataclass
class MeasureArguments:
    """What models are measured on, and by what."""

    speech_dir: str = option(help="Folder of Parquet files NAME-train and NAME-test.")
    held_out_speaker: str | None = option(None, "Speaker whose recordings are left out of distillation.")
    held_out_language: str | None = option(None, "Language whose recordings are left out of distillation.")
    measures: list[str] = option(list(GROUPS), f"Groups of measures: {', '.join(GROUPS)}.")
    label_minutes: list[float] = option([1.0, 10.0, 60.0], "Minutes of labels that recognition is fine-tuned with.")
    steps_of_minutes: list[int] = option([200, 600, 1200], "Steps of fine-tuning, for each.")
    ctc_learning_rate: float = option(1e-3, "Peak learning rate of fine-tuning.")
    max_recordings: int = option(300, "Recordings of training, and of each held-out part, that R2 is measured on.")
    max_probe_recordings: int = option(1000, "Training recordings of a probe.")
    phone_steps: int = option(600, "Steps of the phone probe.")

    def __post_init__(self) -> None:
        if unknown := set(self.measures) - set(GROUPS):
            raise ValueError(f"measures={' '.join(sorted(unknown))}: choose from {', '.join(GROUPS)}")
        if len(self.label_minutes) != len(self.steps_of_minutes):
            raise ValueError("label_minutes and steps_of_minutes: give as many of one as of the other")

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


def read_speech(arguments: MeasureArguments) -> list[Recording]:
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


def distillation_files(arguments: MeasureArguments, folder: Path) -> list[Path]:
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
    """Recordings as padded batches, and the output of the teacher's feature encoder for each, computed once."""

    BATCH_SECONDS = 40.0

    def __init__(self, recordings: Sequence[Recording], teacher: Teacher, extractor: Wav2Vec2FeatureExtractor):
        self.recordings, self.teacher, self.extractor = recordings, teacher, extractor
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
        return dict(pad(self.extractor, [self.recordings[number].waveform.astype(np.float32) for number in batch]))

    @torch.no_grad()
    def encoded(self, batch: Sequence[int]) -> torch.Tensor:
        """Output of the teacher's feature encoder, (batch_size, conv_dim, num_frames), zeros on padding."""
        for number in batch:
            if number not in self.conv_features:
                features = self.teacher.model.feature_extractor(self.audio([number])["input_values"])
                self.conv_features[number] = features[0].T.half()
        frames = [self.conv_features[number].float() for number in batch]
        return nn.utils.rnn.pad_sequence(frames, batch_first=True).transpose(1, 2)


class Features(ABC):
    """Frozen features of recordings."""

    def __init__(self, speech: Speech):
        self.speech = speech

    @abstractmethod
    def __call__(self, batch: Sequence[int], mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (batch_size, num_frames, hidden_size), and the number of frames of each recording.

        Args:
            mask: frames that are hidden, bool (batch_size, num_frames).
        """

    @torch.no_grad()
    def frames(self, batch: Sequence[int], mask: torch.Tensor | None = None) -> torch.Tensor:
        """Features of all true, or of all masked frames, (num_frames, hidden_size)."""
        states, lengths = self(batch, mask)
        return states[frame_mask(lengths, states.shape[1]) if mask is None else mask]

    @torch.no_grad()
    def pooled(self, numbers: Sequence[int]) -> np.ndarray:
        """Mean over the frames of each recording, (num_recordings, hidden_size)."""
        means = {}
        for batch in self.speech.batches(numbers):
            states, lengths = self(batch)
            for number, state, length in zip(batch, states, lengths.tolist(), strict=True):
                means[number] = state[:length].mean(dim=0)
        return torch.stack([means[number] for number in numbers]).numpy()


class ModelFeatures(Features):
    """What a model in evaluation mode puts out first: last hidden states, or logits. A feature encoder that is the
    teacher's is not computed again."""

    def __init__(self, model: PreTrainedModel, speech: Speech):
        super().__init__(speech)
        self.model: Any = model.eval()
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
        ours[name].shape == theirs[name].shape and torch.equal(ours[name].float(), theirs[name].float())
        for name in ours
    )


class Alphabet:
    """Units that CTC writes. The blank is unit 0."""

    def __init__(self, texts: Iterable[Sequence[str]]):
        self.units = ["", *sorted({unit for text in texts for unit in text})]
        self.numbers = {unit: number for number, unit in enumerate(self.units)}

    def __len__(self) -> int:
        return len(self.units)

    def loss(self, logits: torch.Tensor, lengths: torch.Tensor, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        """CTC's, the mean over units.

        Args:
            logits: (batch_size, num_frames, num_units).
            lengths: frames of each recording.
        """
        targets = [[self.numbers[unit] for unit in text] for text in texts]
        flat, sizes = torch.tensor(sum(targets, [])), torch.tensor(list(map(len, targets)))
        log_probs = logits.log_softmax(dim=-1).transpose(0, 1)
        return F.ctc_loss(log_probs, flat, lengths, sizes, reduction="sum", zero_infinity=True) / len(flat)

    def decode(self, logits: torch.Tensor) -> list[str]:
        """Units of the likeliest path, of logits (num_frames, num_units)."""
        return [self.units[unit] for unit in logits.argmax(-1).unique_consecutive().tolist() if unit]


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
        if "probes" in groups:
            row |= self.probes(features)
        if "phones" in groups and self.phones:
            row |= self.phone_probe(features, seed)
        return row

    @cached_property
    def targets(self) -> dict[int, torch.Tensor]:
        """Of each recording that R2 is measured on, float16 (num_frames, hidden_size of the teacher)."""
        targets = {}
        for number in [*self.train_frames, *sum(self.test_frames.values(), [])]:
            audio = self.speech.audio([number])
            targets[number] = self.speech.teacher(audio["input_values"], audio["attention_mask"]).targets[0][0].half()
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
        return torch.cat(features).double().numpy(), torch.cat(targets).double().numpy()

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
            row["slots"] = self._slot_probe(model, select("train", "slots"), test)
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

    def transcribed(self, part: str, language: str | None = None) -> list[int]:
        """Numbers of the recordings of a part whose text and language are known."""
        every = self.speech.select(part, "text", "language", held_out=(KNOWN, HELD_LANGUAGE))
        return [n for n in every if language in (None, self.speech.recordings[n].labels["language"])]

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
        states: dict[int, torch.Tensor] = {}
        for batch in self.speech.batches(train + test):
            hidden_states, lengths = model(batch)
            for number, state, length in zip(batch, hidden_states, lengths.tolist(), strict=True):
                states[number] = state[:length].half()
        mean, whitening = whiten(torch.cat([states[number] for number in train[::4]]).float())
        set_seed(seed)
        alphabet = Alphabet(self.phones.values())
        layer = nn.Linear(whitening.shape[1], len(alphabet))
        begin_with_blanks(layer, 0)

        def logits(batch: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            kept = [(states[number].float() - mean) @ whitening for number in batch]
            return layer(nn.utils.rnn.pad_sequence(kept, batch_first=True)), torch.tensor(list(map(len, kept)))

        batches = self.speech.batches(train, 60.0)
        train_ctc(logits, layer, batches, self.phones, alphabet, self.arguments.phone_steps, 0.1, seed)
        found, row = transcribe(logits, self.speech.batches(test), alphabet), {}
        for name in self.test_frames:
            tested = [number for number in test if self.speech.recordings[number].held_out == name]
            if tested:
                texts = [" ".join(self.phones[n]) for n in tested], [" ".join(found[n]) for n in tested]
                row[f"per{name}"] = word_error_rate(*texts)
        return row

    def recognition(self, model: PreTrainedModel, seed: int) -> dict[str, float]:
        """Word and character error rates of the model, fine-tuned with CTC on some minutes of labelled recordings: of
        all languages, of which one that is held out is tested apart, and of English alone, if it is there."""
        row = {}
        budgets = list(zip(self.arguments.label_minutes, self.arguments.steps_of_minutes, strict=True))
        for language, (minutes, steps) in product((None, "en"), budgets):
            train, test = (self.transcribed(part, language) for part in ("train", "test"))
            labelled = self.minutes_of(train, minutes, seed)
            if labelled is None or not test:
                continue
            found = self.fine_tune(model, labelled, test, steps, seed)
            for name in self.test_frames:
                tested = [number for number in test if self.speech.recordings[number].held_out == name]
                if tested:
                    texts = ["".join(self.characters[n]) for n in tested], ["".join(found[n]) for n in tested]
                    title = f"{f', {language}' if language else ''}, {minutes:g} min{name}"
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


def whiten(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of features (num_frames, hidden_size), and a matrix (hidden_size, hidden_size) that makes them, without
    that mean, uncorrelated, of variance one. A linear layer on top can say the same as before, but gradient descent
    finds it in hundreds of steps. On the correlated features of a transformer it is far from it after thousands, and
    MFCCs seem to know more of phones. Directions of next to no variance stay small."""
    mean = features.mean(dim=0)
    variances, directions = torch.linalg.eigh((features - mean).T.cov())
    return mean, directions / variances.clamp(min=1e-4 * variances.max()).sqrt()


Logits = Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]]
"""Of a batch of recordings: logits (batch_size, num_frames, num_units), and frames of each recording."""


@torch.enable_grad()
def train_ctc(
    logits: Logits,
    module: nn.Module,
    batches: Sequence[Sequence[int]],
    texts: Mapping[int, Sequence[str]],
    alphabet: Alphabet,
    num_steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Trains what `logits` computes, the weights of `module`, on batches in random order."""
    parameters = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    scheduler = get_scheduler("linear", optimizer, num_steps // 10, num_steps)
    rng = random.Random(seed)
    order: list[Sequence[int]] = []
    for _ in range(num_steps):
        order = order or rng.sample(list(batches), len(batches))
        batch = order.pop()
        loss = alphabet.loss(*logits(batch), [texts[number] for number in batch])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@torch.no_grad()
def transcribe(logits: Logits, batches: Sequence[Sequence[int]], alphabet: Alphabet) -> dict[int, list[str]]:
    """Units of every recording."""
    found = {}
    for batch in batches:
        outputs, lengths = logits(batch)
        for number, of_frames, length in zip(batch, outputs, lengths.tolist(), strict=True):
            found[number] = alphabet.decode(of_frames[:length])
    return found


def phonemize(texts: Sequence[str], languages: Sequence[str]) -> list[list[str]]:
    """Phones of each text, by espeak-ng, which comes with the package espeakng-loader.

    Raises:
        UserError: a language without a voice.
    """
    import espeakng_loader
    from phonemizer.backend import EspeakBackend
    from phonemizer.backend.espeak.wrapper import EspeakWrapper
    from phonemizer.separator import Separator

    if unknown := set(languages) - ESPEAK_VOICES.keys():
        raise UserError(
            f"no phones for the language {', '.join(sorted(unknown))}: there are {', '.join(ESPEAK_VOICES)}"
        )
    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    phones: list[list[str]] = [[] for _ in texts]
    for language in sorted(set(languages)):
        chosen = [at for at, each in enumerate(languages) if each == language]
        backend = EspeakBackend(ESPEAK_VOICES[language], language_switch="remove-flags", words_mismatch="ignore")
        lines = backend.phonemize(
            [texts[at] for at in chosen], Separator(phone=" ", word="|", syllable=""), strip=True
        )
        for at, line in zip(chosen, lines, strict=True):
            phones[at] = line.replace("|", " ").split()
    return phones


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
