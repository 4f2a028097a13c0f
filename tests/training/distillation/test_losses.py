"""Losses are what the papers and the docstrings say."""

import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_close
from tiny_distillation import padded_batch, tiny_student, tiny_teacher

from lighthubert_training.distillation.losses import (
    matching_layers,
    prediction_loss,
    temporal_relation_loss,
)
from lighthubert_training.distillation.step import PreparedBatch
from lighthubert_training.models import true_frames


INPUTS = ("input_values", "teacher_input_values", "attention_mask")


def student_loss(student, batch, outputs, mask, teacher, conv_features=None) -> torch.Tensor:
    return PreparedBatch({**batch, "mask": mask}, outputs, 0, conv_features).loss(student, teacher)


def test_the_loss_is_the_mean_absolute_error_of_the_frames_that_count():
    prediction, target = torch.tensor([[[1.0, 2.0], [5.0, 5.0]]]), torch.tensor([[[0.0, 4.0], [100.0, 100.0]]])
    assert float(prediction_loss(prediction, target, torch.tensor([[True, False]]))) == 1.5


def test_the_cosine_loss_is_minus_log_sigmoid_of_the_angle():
    prediction, target = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]])
    loss = prediction_loss(prediction, target, torch.tensor([[True]]), cosine_weight=2.0)
    assert float(loss) == pytest.approx(3.0 + 2.0 * np.log(2.0))


def test_temporal_relation_compares_pairs_of_true_frames_whatever_the_widths():
    student = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[1.0, 0.0, 0.0], [5.0, 0.0, 0.0], [1.0, 2.0, 3.0]]])
    frames = torch.tensor([[True, True, False]])
    # the frames are alike to the teacher, and at a right angle to the student: two of the four pairs are off by one
    assert float(temporal_relation_loss(student, teacher, frames)) == pytest.approx(0.5)
    assert float(temporal_relation_loss(3 * teacher, teacher, frames)) == pytest.approx(0.0, abs=1e-6)


def test_layers_match_those_of_the_teacher_at_the_same_height():
    assert matching_layers(range(12), 12, 12) == list(range(12))
    assert matching_layers((0, 1, 2), 3, 12) == [3, 7, 11]
    assert matching_layers((0, 2), 4, 2) == [0, 1]


@pytest.mark.parametrize(
    "options", [{}, {"loss_frames": "all", "cosine_weight": 1.0}, {"temporal_relation_weight": 1}]
)
def test_every_objective_trains_every_subnet(options):
    teacher, batch, student = tiny_teacher(**options), padded_batch(), tiny_student()
    outputs = teacher(batch["teacher_input_values"], batch["attention_mask"])
    mask = true_frames(student, 18, batch["attention_mask"]) & (torch.arange(18, device=DEVICE) % 2 == 0)
    for name in ("smallest", "largest"):
        student.set_subnet(name)
        student.zero_grad()
        loss = student_loss(student, batch, outputs, mask, teacher)
        loss.backward()
        assert loss > 0
        for weight in (student.prediction_heads[0].weight, student.hubert.feature_projection.projection.weight):
            assert 0 < weight.grad.abs().max() < float("inf")


@torch.no_grad()
def test_the_loss_is_a_weighted_sum_of_prediction_and_temporal_relation():
    student, batch = tiny_student(), padded_batch()

    def loss(**options: float) -> torch.Tensor:
        teacher = tiny_teacher(loss_frames="all", **options)
        outputs = teacher(batch["teacher_input_values"], batch["attention_mask"])
        return student_loss(student, batch, outputs, torch.zeros(2, 18, dtype=torch.bool, device=DEVICE), teacher)

    relation = loss(temporal_relation_weight=1.0, prediction_weight=0.0)
    assert relation > 0
    assert_close(loss(temporal_relation_weight=2.0, prediction_weight=0.5), 2 * relation + 0.5 * loss())


@pytest.mark.parametrize("options", [{}, {"cosine_weight": 1.0}])
@torch.no_grad()
def test_a_padded_batch_gives_the_mean_over_the_same_clips_alone(options):
    student, batch, teacher = tiny_student(), padded_batch(), tiny_teacher(loss_frames="all", **options)
    outputs = teacher(batch["teacher_input_values"], batch["attention_mask"])
    mask = true_frames(student, 18, batch["attention_mask"]) & (torch.arange(18, device=DEVICE) % 3 == 0)
    together = student_loss(student, batch, outputs, mask, teacher)
    alone, count = torch.zeros((), device=DEVICE), 0
    for row, samples in enumerate((6000, 3200)):
        single = {name: batch[name][row : row + 1, :samples] for name in INPUTS}
        single_outputs = teacher(single["teacher_input_values"], single["attention_mask"])
        length = single_outputs.targets[0].shape[1]
        loss = student_loss(student, single, single_outputs, mask[row : row + 1, :length], teacher)
        alone, count = alone + loss * length, count + length
    assert_close(together, alone / count)


@torch.no_grad()
def test_features_that_are_given_are_not_computed_again():
    student, batch, teacher = tiny_student(), padded_batch(), tiny_teacher()
    outputs = teacher(batch["teacher_input_values"], batch["attention_mask"])
    mask = true_frames(student, 18, batch["attention_mask"]) & (torch.arange(18, device=DEVICE) % 3 == 0)
    expected = student_loss(student, batch, outputs, mask, teacher)
    features = student.hubert.feature_extractor(batch["input_values"])
    batch["input_values"] = torch.zeros_like(batch["input_values"])
    assert torch.equal(student_loss(student, batch, outputs, mask, teacher, features), expected)
    assert not torch.equal(student_loss(student, batch, outputs, mask, teacher), expected)
