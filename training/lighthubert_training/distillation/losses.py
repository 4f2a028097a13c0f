"""Losses between the student's predictions and the teacher's targets. Sources are named in `arguments`."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def prediction_loss(
    prediction: torch.Tensor, target: torch.Tensor, frames: torch.Tensor, cosine_weight: float = 0.0
) -> torch.Tensor:
    """Mean absolute error over `frames`, plus `cosine_weight` times minus log sigmoid of the cosine (DistilHuBERT).

    Args:
        prediction, target: (batch_size, num_frames, hidden_size of the teacher).
        frames: bool (batch_size, num_frames), the frames that count.
    """
    prediction = prediction.float()
    loss = F.l1_loss(prediction, target, reduction="none").mean(dim=-1)
    if cosine_weight > 0:
        loss = loss - cosine_weight * F.logsigmoid(F.cosine_similarity(prediction, target, dim=-1))
    return mean_where(frames, loss)


def mean_where(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Mean of the `values` where `mask` is set, of the same shape. Selecting them would wait for the device."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def temporal_relation_loss(student: torch.Tensor, teacher: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the cosine similarities between all pairs of true frames of a recording (Gram
    matrices over time, arXiv 2312.09040; frames of length 1 are our choice). The widths may differ.

    Args:
        student, teacher: (batch_size, num_frames, any width).
        frames: true frames, bool (batch_size, num_frames).
    """
    pairs = frames[:, :, None] & frames[:, None, :]
    ours, theirs = (F.normalize(states.float(), dim=-1) for states in (student, teacher))
    return mean_where(pairs, (ours @ ours.transpose(1, 2) - theirs @ theirs.transpose(1, 2)).square())


def matching_layers(student_layers: Sequence[int], student_depth: int, teacher_depth: int) -> list[int]:
    """For each of the student's layers (0-based, of `student_depth`), the teacher's (0-based) at the same height."""
    return [math.ceil((layer + 1) * teacher_depth / student_depth) - 1 for layer in student_layers]
