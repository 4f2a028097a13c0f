"""What frozen features are worth, without fine-tuning: linear probes of recordings, a ridge regression of frames."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.collators import Batch, padded_batches
from lighthubert_training.data.strings import SAMPLING_RATE, Speech, read_parquet
from lighthubert_training.models import draw_time_mask, true_frames, true_lengths


@torch.no_grad()
def pooled_features(model: PreTrainedModel, batches: Sequence[Batch]) -> np.ndarray:
    """Mean of the last hidden state over the true frames: (num_recordings, hidden_size)."""
    pooled = []
    for batch in (send_to_device(each, model.device) for each in batches):
        hidden_states = model(batch["input_values"], attention_mask=batch["attention_mask"]).last_hidden_state
        frames = true_frames(model, hidden_states.shape[1], batch["attention_mask"]).unsqueeze(-1)
        pooled.append((hidden_states * frames).sum(dim=1) / frames.sum(dim=1))
    return torch.cat(pooled).float().cpu().numpy()


def linear_probe() -> Pipeline:
    """Logistic regression on standardised features."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def probe_accuracy(
    train_features: np.ndarray, train_labels: Sequence, test_features: np.ndarray, test_labels: Sequence
) -> float:
    """Accuracy on test recordings of a linear probe fitted to the training recordings."""
    return float(linear_probe().fit(train_features, train_labels).score(test_features, test_labels))


def draw_masks(
    model: PreTrainedModel, batches: Sequence[Batch], mask_time_prob: float, mask_time_length: int
) -> list[torch.Tensor]:
    """Frames that are masked, bool (batch_size, num_frames) for each batch.

    They depend on the order of the recordings only, so that models are compared on the same input.
    """
    masks, seed = [], 0
    for batch in batches:
        num_frames = true_lengths(model, batch["attention_mask"]).tolist()
        masks.append(draw_time_mask(num_frames, mask_time_prob, mask_time_length, range(seed, seed + len(num_frames))))
        seed += len(num_frames)
    return masks


@torch.no_grad()
def masked_features(model: PreTrainedModel, batches: Sequence[Batch], masks: Sequence[torch.Tensor]) -> np.ndarray:
    """Last hidden states of the masked frames, (num_frames, hidden_size)."""
    features = []
    for pair in zip(batches, masks, strict=True):
        batch, mask = send_to_device(pair, model.device)
        output = model(batch["input_values"], attention_mask=batch["attention_mask"], mask_time_indices=mask.clone())
        features.append(output.last_hidden_state[mask])
    return torch.cat(features).cpu().numpy()


def masked_targets(teacher: Any, batches: Sequence[Batch], masks: Sequence[torch.Tensor]) -> np.ndarray:
    """The first of the distillation targets that `teacher(input_values, attention_mask)` gives, of the same frames:
    (num_frames, hidden_size of the teacher). Its `model` is on the device that it runs on."""
    targets = []
    for pair in zip(batches, masks, strict=True):
        batch, mask = send_to_device(pair, teacher.model.device)
        targets.append(teacher(batch["input_values"], batch["attention_mask"]).targets[0][mask])
    return torch.cat(targets).cpu().numpy()


class ProbeBench:
    """Data that models are compared on: words with labels for the probes, and any speech for the frames.

    Args:
        train, test: recordings that probes are fitted to, and recordings that they are tested on.
        teacher: gives the targets of R2, as `masked_targets` asks for them; its `model` is the base model.
        max_recordings: of each kind, drawn at random.
        mask_time_prob, mask_time_length: of the frames that R2 is measured on. Spoken words are short: a span of 10
            frames is half of one.
    """

    def __init__(
        self,
        train: Speech,
        test: Speech,
        teacher: Any,
        extractor: Wav2Vec2FeatureExtractor,
        max_recordings: int,
        mask_time_prob: float = 0.3,
        mask_time_length: int = 5,
    ):
        self.teacher = teacher

        def some(recordings: Dataset) -> Dataset:
            return recordings.shuffle(seed=0).select(range(min(max_recordings, len(recordings))))

        def waveforms(recordings: Dataset) -> list[np.ndarray]:
            return [load_waveform(audio, SAMPLING_RATE) for audio in recordings["audio"]]

        def frames(file: Path) -> list[Batch]:
            return padded_batches(extractor, sorted(waveforms(some(read_parquet(file))), key=len))

        self.train_words, self.test_words = some(train.words), some(test.words)
        self.train_batches = padded_batches(extractor, waveforms(self.train_words))
        self.test_batches = padded_batches(extractor, waveforms(self.test_words))
        self.train_frames, self.test_frames = frames(train.file), frames(test.file)
        both = (self.train_frames, self.test_frames)
        self.masks = [draw_masks(teacher.model, each, mask_time_prob, mask_time_length) for each in both]
        self.train_targets = masked_targets(teacher, self.train_frames, self.masks[0])
        self.test_targets = masked_targets(teacher, self.test_frames, self.masks[1])

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Of the frozen `model`: R2, the share of the variance of the test targets that a ridge regression, fitted to
        training frames, explains; and the probes' accuracies for the labels that the data has, of `speaker` over five
        folds of the test recordings, because training recordings have other speakers."""
        model = model.eval()
        features = masked_features(model, self.train_frames, self.masks[0])
        regression = make_pipeline(StandardScaler(), Ridge()).fit(features, self.train_targets)
        predicted = regression.predict(masked_features(model, self.test_frames, self.masks[1]))
        row = {"r2": float(r2_score(self.test_targets, predicted, multioutput="variance_weighted"))}
        test = pooled_features(model, self.test_batches)
        if "digit" in self.test_words.column_names:
            train = pooled_features(model, self.train_batches)
            row["digit"] = probe_accuracy(train, self.train_words["digit"], test, self.test_words["digit"])
        if "speaker" in self.test_words.column_names:
            folds = StratifiedKFold(5, shuffle=True, random_state=0)
            row["speaker"] = float(cross_val_score(linear_probe(), test, self.test_words["speaker"], cv=folds).mean())
        return row
