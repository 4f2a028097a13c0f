"""One step of training is what its parts would give one by one, however the batches are dealt."""

import pytest
import torch
from accelerate import Accelerator
from conftest import TWO_DEEP
from test_distillation import padded_batch, tiny_student, tiny_teacher

from distillation import student_loss
from distillation_step import prepare_lesson, training_step
from subnet_sampling import draw_subnets


def batch_with_visits() -> dict[str, torch.Tensor]:
    return padded_batch() | {"visits": torch.tensor([[0, 3], [0, 8]])}


def rows(batch: dict[str, torch.Tensor], row: int, samples: int) -> dict[str, torch.Tensor]:
    return {
        name: tensor[row : row + 1] if name == "visits" else tensor[row : row + 1, :samples]
        for name, tensor in batch.items()
    }


def gradients(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}


def test_the_gradient_of_a_sandwich_is_the_mean_over_its_subnets():
    student, teacher, batch = tiny_student(), tiny_teacher(), batch_with_visits()
    lesson = prepare_lesson(student, teacher, batch, seed=0)
    subnets = draw_subnets(TWO_DEEP, "sandwich", 0, 0)
    for subnet in subnets:
        student.set_subnet(subnet)
        (student_loss(student, batch, lesson.answer, lesson.mask, teacher.objective) / 3).backward()
    expected = gradients(student)
    student.zero_grad()
    training_step(student, teacher, [batch], subnets, Accelerator(cpu=True), seed=0)
    torch.testing.assert_close(gradients(student), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss_frames", ["masked", "all"])
def test_accumulated_batches_give_the_gradient_of_one(loss_frames):
    student, teacher, batch = tiny_student(), tiny_teacher(loss_frames=loss_frames), batch_with_visits()
    accelerator = Accelerator(cpu=True)
    together = training_step(student, teacher, [batch], [TWO_DEEP.smallest], accelerator, seed=0)
    expected = gradients(student)
    student.zero_grad()
    parts = [rows(batch, 0, 6000), rows(batch, 1, 3200)]
    assert training_step(student, teacher, parts, [TWO_DEEP.smallest], accelerator, seed=0) == pytest.approx(together)
    torch.testing.assert_close(gradients(student), expected, rtol=0, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_step():
    student, teacher = tiny_student(), tiny_teacher()
    with torch.no_grad():
        student.prediction_heads[0].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        training_step(student, teacher, [batch_with_visits()], [TWO_DEEP.largest], Accelerator(cpu=True), seed=0)
