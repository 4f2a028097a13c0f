"""Losses between the student's predictions and the teacher's targets. Sources are named in `arguments`."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from lighthubert_training.distillation.arguments import ObjectiveArguments
from lighthubert_training.distillation.teacher import TeacherOutputs
from lighthubert_training.models import computed_once
from modeling_lighthubert import LightHubertForPreTraining
from modeling_lighthubert.search_space import kept_layers


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
    return loss[frames].mean()


def temporal_relation_loss(student: torch.Tensor, teacher: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the cosine similarities between all pairs of true frames of a recording (Gram
    matrices over time, arXiv 2312.09040; frames of length 1 are our choice). The widths may differ.

    Args:
        student, teacher: (batch_size, num_frames, any width).
        frames: true frames, bool (batch_size, num_frames).
    """
    pairs = frames[:, :, None] & frames[:, None, :]
    ours, theirs = (F.normalize(states.float(), dim=-1) for states in (student, teacher))
    return F.mse_loss((ours @ ours.transpose(1, 2))[pairs], (theirs @ theirs.transpose(1, 2))[pairs])


def matching_layers(student_layers: Sequence[int], student_depth: int, teacher_depth: int) -> list[int]:
    """For each of the student's layers (0-based, of `student_depth`), the teacher's (0-based) at the same height."""
    return [math.ceil((layer + 1) * teacher_depth / student_depth) - 1 for layer in student_layers]


def student_loss(
    student: LightHubertForPreTraining,
    batch: Mapping[str, torch.Tensor],
    outputs: TeacherOutputs,
    mask_time_indices: torch.Tensor,
    objective: ObjectiveArguments,
    conv_features: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of the selected subnet on one batch: the mean over its prediction heads, and the temporal relation.

    Args:
        batch: `input_values` and `attention_mask`, (batch_size, num_samples).
        outputs: of the teacher, for this batch.
        mask_time_indices: frames that are masked for the student, bool (batch_size, num_frames).
        conv_features: of this batch, (batch_size, conv_dim, num_frames), if the student's feature encoder is frozen;
            then it is not computed again.
    """
    wants_states = objective.temporal_relation_weight > 0
    with computed_once(student.hubert.feature_extractor, conv_features):
        predicted = student(
            batch["input_values"], batch["attention_mask"], mask_time_indices, output_hidden_states=wants_states
        )
    frames = mask_time_indices if objective.loss_frames == "masked" else outputs.frames
    losses = [
        prediction_loss(prediction, target, frames, objective.cosine_weight)
        for prediction, target in zip(predicted.predictions, outputs.targets, strict=True)
    ]
    loss = torch.stack(losses).mean()
    if not wants_states:
        return loss
    depth, states = student.config.num_hidden_layers, predicted.hidden_states[1:]
    layers = matching_layers(kept_layers(depth, len(states)), depth, len(outputs.hidden_states))
    relations = [
        temporal_relation_loss(state, outputs.hidden_states[layer], outputs.frames)
        for state, layer in zip(states, layers, strict=True)
    ]
    return loss + objective.temporal_relation_weight * torch.stack(relations).mean()
