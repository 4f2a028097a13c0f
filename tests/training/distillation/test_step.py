"""One step of training is what its parts would give one by one, however the batches are distributed."""

import pytest
import torch
from accelerate import Accelerator
from conftest import NARROW, TWO_DEEP, assert_close
from tiny_distillation import padded_batch, tiny_student, tiny_teacher

from lighthubert_training.distillation.step import evaluate, prepare_batch, training_step
from lighthubert_training.sampling import draw_subnets
from modeling_lighthubert.errors import UserError


def rows(batch: dict[str, torch.Tensor], row: int, samples: int) -> dict[str, torch.Tensor]:
    return {
        name: tensor[row : row + 1] if name == "items" else tensor[row : row + 1, :samples]
        for name, tensor in batch.items()
    }


def gradients(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """But for the order of sums; a gradient is a sum over all frames of what has the magnitude of the largest."""
    assert actual.keys() == expected.keys()
    assert_close(*(torch.cat([gradient.flatten() for gradient in each.values()]) for each in (actual, expected)))


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_the_gradient_of_a_sandwich_is_the_mean_over_its_subnets(accelerator):
    student, teacher, batch = tiny_student(), tiny_teacher(), padded_batch()
    prepared = prepare_batch(student, teacher, batch, 0, accelerator)
    subnets = draw_subnets(TWO_DEEP, "sandwich", 0, 0)
    expected_losses = []
    for subnet in subnets:
        student.set_subnet(subnet)
        loss = prepared.loss(student, teacher)
        (loss / 3).backward()
        expected_losses.append(float(loss.detach()))
    expected = gradients(student)
    student.zero_grad()
    losses = training_step(student, teacher, [batch], subnets, accelerator, seed=0)
    assert losses == pytest.approx(expected_losses)
    assert_same_gradients(gradients(student), expected)


def test_a_loss_counts_masked_frames_or_all(accelerator):
    for loss_frames, probability in (("masked", 0.65), ("all", 0.65), ("all", 0.0)):
        teacher = tiny_teacher(loss_frames=loss_frames, mask_time_prob=probability)
        prepared = prepare_batch(tiny_student(), teacher, padded_batch(), 0, accelerator)
        assert prepared.num_frames == (prepared.mask.sum() if loss_frames == "masked" else 18 + 9)
        assert 0 < prepared.mask.sum() < 18 + 9 or probability == 0.0


@pytest.mark.parametrize("loss_frames", ["masked", "all"])
def test_accumulated_batches_give_the_gradient_of_one(accelerator, loss_frames):
    student, teacher, batch = tiny_student(), tiny_teacher(loss_frames=loss_frames), padded_batch()
    together = training_step(student, teacher, [batch], [TWO_DEEP.smallest], accelerator, seed=0)
    expected = gradients(student)
    student.zero_grad()
    parts = [rows(batch, 0, 6000), rows(batch, 1, 3200)]
    assert training_step(student, teacher, parts, [TWO_DEEP.smallest], accelerator, seed=0) == pytest.approx(together)
    assert_same_gradients(gradients(student), expected)


@pytest.mark.parametrize("share", [False, True], ids=["frozen", "shared"])
def test_a_frozen_feature_encoder_runs_once_a_step_and_changes_no_gradient(accelerator, share):
    """Shared, it runs in the teacher alone."""
    student, teacher, batch = tiny_student(), tiny_teacher(), padded_batch()
    batch["teacher_input_values"] = batch["input_values"]
    student.hubert.feature_extractor.load_state_dict(teacher.model.feature_extractor.state_dict())
    subnets = draw_subnets(TWO_DEEP, "sandwich", 0, 0)
    expected = training_step(student, teacher, [batch], subnets, accelerator, seed=0)
    names = {name for name in gradients(student) if "feature_extractor" not in name}
    expected_gradients = {name: gradient for name, gradient in gradients(student).items() if name in names}
    student.zero_grad()
    student.freeze_feature_encoder()
    runs = []
    student.hubert.feature_extractor.conv_layers[0].register_forward_hook(lambda *call: runs.append(call))
    losses = training_step(student, teacher, [batch], subnets, accelerator, 0, share_feature_encoder=share)
    assert len(runs) == (0 if share else 1)
    assert losses == pytest.approx(expected, abs=1e-6)
    assert_same_gradients(gradients(student), expected_gradients)


def test_a_frozen_feature_encoder_is_not_shared_by_subnets_with_parts_of_it(accelerator):
    student, teacher, batch = tiny_student(NARROW), tiny_teacher(), padded_batch()
    subnets = [NARROW.smallest, NARROW.largest]
    expected = training_step(student, teacher, [batch], subnets, accelerator, seed=0)
    student.freeze_feature_encoder()
    assert training_step(student, teacher, [batch], subnets, accelerator, seed=0) == pytest.approx(expected)


def test_a_loss_that_is_not_finite_stops_the_step(accelerator):
    student, teacher = tiny_student(), tiny_teacher()
    with torch.no_grad():
        student.prediction_heads[0].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        training_step(student, teacher, [padded_batch()], [TWO_DEEP.largest], accelerator, seed=0)


def test_a_step_without_recordings_leaves_no_gradient(accelerator):
    student = tiny_student()
    assert training_step(student, tiny_teacher(), [], [TWO_DEEP.largest], accelerator, seed=0) == []
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
    parts = [rows(batch, 0, 6000), rows(batch, 1, 3200)]
    assert evaluate(student, teacher, parts, subnets, accelerator) == pytest.approx(losses)
    student.set_subnet("smallest")
    prepared = prepare_batch(student.eval(), teacher, batch, 0, accelerator)
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
