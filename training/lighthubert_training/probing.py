"""What frozen features are worth, without fine-tuning: linear probes of recordings, and a ridge regression of
frames."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedModel, SequenceFeatureExtractor

from lighthubert_training.distillation.teacher import Teacher, draw_time_mask, num_true_frames, true_frames


Batch = dict[str, torch.Tensor]


def make_batches(
    waveforms: Sequence[np.ndarray], extractor: SequenceFeatureExtractor, batch_size: int = 16
) -> list[Batch]:
    """Padded batches of `input_values` and `attention_mask`, in the order of `waveforms`."""
    return [
        extractor(
            list(waveforms[start : start + batch_size]),
            sampling_rate=extractor.sampling_rate,
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        for start in range(0, len(waveforms), batch_size)
    ]


@torch.no_grad()
def pooled_features(model: PreTrainedModel, batches: Sequence[Batch]) -> np.ndarray:
    """Mean of the last hidden state over the true frames: (num_recordings, hidden_size)."""
    pooled = []
    for batch in batches:
        hidden_states = model(batch["input_values"], attention_mask=batch["attention_mask"]).last_hidden_state
        frames = true_frames(model, hidden_states.shape[1], batch["attention_mask"]).unsqueeze(-1)
        pooled.append((hidden_states * frames).sum(dim=1) / frames.sum(dim=1))
    return torch.cat(pooled).numpy()


def linear_probe() -> Pipeline:
    """Logistic regression on standardised features."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def probe_accuracy(
    train_features: np.ndarray, train_labels: Sequence, test_features: np.ndarray, test_labels: Sequence
) -> float:
    """Accuracy on test recordings of a linear probe fitted to the training recordings."""
    return float(linear_probe().fit(train_features, train_labels).score(test_features, test_labels))


def cross_validated_accuracy(features: np.ndarray, labels: Sequence, num_folds: int = 5) -> float:
    """Mean accuracy of a linear probe over folds, for labels that training recordings do not have (new speakers)."""
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=0)
    return float(cross_val_score(linear_probe(), features, labels, cv=folds).mean())


def draw_masks(
    model: PreTrainedModel, batches: Sequence[Batch], mask_time_prob: float, mask_time_length: int
) -> list[torch.Tensor]:
    """Frames that models do not see: bool (batch_size, num_frames) for each batch.

    They depend on the order of the recordings only, so that models are compared on the same input.
    """
    masks, seed = [], 0
    for batch in batches:
        num_frames = num_true_frames(model, batch["attention_mask"])
        masks.append(draw_time_mask(num_frames, mask_time_prob, mask_time_length, range(seed, seed + len(num_frames))))
        seed += len(num_frames)
    return masks


@torch.no_grad()
def masked_features(model: PreTrainedModel, batches: Sequence[Batch], masks: Sequence[torch.Tensor]) -> np.ndarray:
    """Last hidden states of the frames that `model` does not see: (num_frames, hidden_size)."""
    features = [
        model(batch["input_values"], attention_mask=batch["attention_mask"], mask_time_indices=mask.clone())
        for batch, mask in zip(batches, masks, strict=True)
    ]
    return torch.cat([output.last_hidden_state[mask] for output, mask in zip(features, masks, strict=True)]).numpy()


def masked_targets(teacher: Teacher, batches: Sequence[Batch], masks: Sequence[torch.Tensor]) -> np.ndarray:
    """The teacher's distillation targets of the same frames: (num_frames, hidden_size of the teacher)."""
    answers = [teacher(batch["input_values"], batch["attention_mask"]) for batch in batches]
    return torch.cat([answer.targets[0][mask] for answer, mask in zip(answers, masks, strict=True)]).numpy()


def ridge_r2(
    train_features: np.ndarray, train_targets: np.ndarray, test_features: np.ndarray, test_targets: np.ndarray
) -> float:
    """Share of the variance of the test targets that a ridge regression, fitted to training frames, explains."""
    regression = make_pipeline(StandardScaler(), Ridge()).fit(train_features, train_targets)
    return float(r2_score(test_targets, regression.predict(test_features), multioutput="variance_weighted"))
