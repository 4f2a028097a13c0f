"""One step of training is what its parts would give one by one, however the batches are distributed."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from conftest import NARROW, TWO_DEEP, assert_close, new_accelerator
from tiny_distillation import padded_batch, tiny_student, tiny_teacher
from waits import Waits

from lighthubert_training.distillation.step import evaluate, prepare_batch, training_step
from lighthubert_training.sampling import draw_subnets
from modeling_lighthubert.errors import UserError


def halves(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Each of the two recordings of `padded_batch` by itself."""
    parts = []
    for row, samples, frames in ((0, 6000, 18), (1, 3200, 9)):
        audio = {name: value[row : row + 1, :samples] for name, value in batch.items() if torch.is_tensor(value)}
        mask = batch["mask"][row : row + 1, :frames]
        parts.append(audio | {"mask": mask, "num_frames": frames, "num_masked": int(mask.sum())})
    return parts


def gradients(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """But for the order of sums; a gradient is a sum over all frames of what has the magnitude of the largest."""
    assert actual.keys() == expected.keys()
    assert_close(*(torch.cat([gradient.flatten() for gradient in each.values()]) for each in (actual, expected)))


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return new_accelerator()


def test_the_gradient_of_a_sandwich_is_the_mean_over_its_subnets(accelerator):
    student, teacher, batch = tiny_student(), tiny_teacher(), padded_batch()
    prepared = prepare_batch(student, teacher, batch, accelerator)
    subnets = draw_subnets(TWO_DEEP, "sandwich", 0, 0)
    expected_losses = []
    for subnet in subnets:
        student.set_subnet(subnet)
        loss = prepared.loss(student, teacher)
        (loss / 3).backward()
        expected_losses.append(float(loss.detach()))
    expected = gradients(student)
    student.zero_grad()
    losses = training_step(student, teacher, [batch], subnets, accelerator)
    assert_close(losses, torch.tensor(expected_losses))
    assert_same_gradients(gradients(student), expected)


def test_a_loss_counts_masked_frames_or_all(accelerator):
    for loss_frames, probability in (("masked", 0.65), ("all", 0.65), ("all", 0.0)):
        teacher = tiny_teacher(loss_frames=loss_frames, mask_time_prob=probability)
        batch = padded_batch(probability)
        prepared = prepare_batch(tiny_student(), teacher, batch, accelerator)
        assert prepared.num_frames == (batch["mask"].sum() if loss_frames == "masked" else 18 + 9)
        assert 0 < batch["mask"].sum() < 18 + 9 or probability == 0.0


@pytest.mark.parametrize("loss_frames", ["masked", "all"])
def test_accumulated_batches_give_the_gradient_of_one(accelerator, loss_frames):
    student, teacher, batch = tiny_student(), tiny_teacher(loss_frames=loss_frames), padded_batch()
    together = training_step(student, teacher, [batch], [TWO_DEEP.smallest], accelerator)
    expected = gradients(student)
    student.zero_grad()
    parts = halves(batch)
    losses = training_step(student, teacher, parts, [TWO_DEEP.smallest], accelerator)
    assert_close(losses, together)
    assert_same_gradients(gradients(student), expected)


@pytest.mark.parametrize("share", [False, True], ids=["frozen", "shared"])
def test_a_frozen_feature_encoder_runs_once_a_step_and_changes_no_gradient(accelerator, share):
    """Shared, it runs in the teacher alone."""
    student, teacher, batch = tiny_student(), tiny_teacher(), padded_batch()
    batch["teacher_input_values"] = batch["input_values"]
    student.hubert.feature_extractor.load_state_dict(teacher.model.feature_extractor.state_dict())
    subnets = draw_subnets(TWO_DEEP, "sandwich", 0, 0)
    expected = training_step(student, teacher, [batch], subnets, accelerator)
    names = {name for name in gradients(student) if "feature_extractor" not in name}
    expected_gradients = {name: gradient for name, gradient in gradients(student).items() if name in names}
    student.zero_grad()
    student.freeze_feature_encoder()
    runs = []
    student.hubert.feature_extractor.conv_layers[0].register_forward_hook(lambda *call: runs.append(call))
    losses = training_step(student, teacher, [batch], subnets, accelerator, share_feature_encoder=share)
    assert len(runs) == (0 if share else 1)
    assert_close(losses, expected)
    assert_same_gradients(gradients(student), expected_gradients)


def test_a_frozen_feature_encoder_is_not_shared_by_subnets_with_parts_of_it(accelerator):
    student, teacher, batch = tiny_student(NARROW), tiny_teacher(), padded_batch()
    subnets = [NARROW.smallest, NARROW.largest]
    expected = training_step(student, teacher, [batch], subnets, accelerator)
    student.freeze_feature_encoder()
    losses = training_step(student, teacher, [batch], subnets, accelerator)
    assert_close(losses, expected)


def test_a_step_without_recordings_leaves_no_gradient(accelerator):
    student = tiny_student()
    assert training_step(student, tiny_teacher(), [], [TWO_DEEP.largest], accelerator) is None
    assert not gradients(student)


def test_evaluation_measures_each_subnet_and_leaves_everything_as_it_was(accelerator):
    teacher, batch, student = tiny_teacher(), padded_batch(), tiny_student().train()
    subnets = {"smallest": TWO_DEEP.smallest, "largest": TWO_DEEP.largest}
    student.set_subnet(TWO_DEEP.sample(0))
    before = student.subnet
    torch.manual_seed(5)
    losses = evaluate(student, teacher, [batch], subnets, accelerator)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert drawn == torch.rand(1)
    assert student.training and student.subnet == before
    parts = halves(batch)
    assert evaluate(student, teacher, parts, subnets, accelerator) == pytest.approx(losses, rel=1e-5)
    student.set_subnet("smallest")
    prepared = prepare_batch(student.eval(), teacher, batch, accelerator)
    assert float(prepared.loss(student, teacher).detach()) == pytest.approx(losses["smallest"])
    with pytest.raises(UserError, match="none of the recordings"):
        evaluate(student, teacher, [], subnets, accelerator)


def test_an_evaluation_that_fails_leaves_everything_as_it_was(accelerator):
    student = tiny_student().train()
    student.set_subnet(TWO_DEEP.sample(0))
    before = student.subnet

    def batches():
        yield padded_batch()
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        evaluate(student, tiny_teacher(), batches(), {"largest": TWO_DEEP.largest}, accelerator)
    assert student.training and student.subnet == before


@pytest.mark.parametrize(
    "options", [{}, {"loss_frames": "all", "cosine_weight": 1.0}, {"temporal_relation_weight": 1.0}]
)
@pytest.mark.parametrize("share", [False, True], ids=["learns", "shared"])
def test_a_step_waits_for_its_device_in_transformers_alone(accelerator, monkeypatch, options, share):
    """In the mask of attention, once for the teacher and once for each subnet."""
    monkeypatch.setattr(accelerator.state, "device", torch.device("meta"))
    student, teacher = tiny_student().to("meta").train(), tiny_teacher(**options).to("meta")
    optimizer = torch.optim.AdamW(student.parameters())
    batch = send_to_device(padded_batch(), "meta")
    with Waits() as waits:
        subnets = draw_subnets(TWO_DEEP, "sandwich", 0, 0)
        losses = training_step(student, teacher, [batch, batch], subnets, accelerator, share_feature_encoder=share)
        accelerator.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    assert losses.is_meta
    assert waits.lines == {"and (padding_mask is None or padding_mask.all())": 2 * (1 + len(subnets))}
