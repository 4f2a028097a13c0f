"""The loop makes the steps that seed and step say, measures, saves, and ends in order when it is told to."""

import copy
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import DEVICE, SIX_DEEP, TWO_DEEP, new_accelerator
from speech import TONE, encoded, undecoded
from tiny_distillation import tiny_student, tiny_teacher
from transformers import Wav2Vec2FeatureExtractor

from lighthubert_training.data.collators import DistillationCollator
from lighthubert_training.data.sources import DataArguments
from lighthubert_training.distillation.arguments import DistillationArguments
from lighthubert_training.distillation.loaders import SpeechLoader
from lighthubert_training.distillation.loop import Distiller, prepare_output, stop_on_sigterm
from lighthubert_training.runs.checkpoints import checkpoint_damage
from lighthubert_training.runs.log import RunLog
from modeling_lighthubert.errors import UserError


EXTRACTOR = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
NAMES = ["largest", "smallest", "middle", "random_0", "random_1"]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return new_accelerator()


@pytest.fixture
def distiller(accelerator, tmp_path) -> Distiller:
    """Four recordings, two in a batch; student and optimiser as a run begins."""
    arguments = DistillationArguments(
        *("teacher", str(tmp_path)),
        **{"sampling": "sandwich", "max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2},
        **{"eval_steps": 3, "logging_steps": 1, "dataloader_num_workers": 0},
    )
    student = tiny_student(hidden_dropout=0.1).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    rows = [{"audio": {"bytes": encoded(TONE[: 4000 + 400 * at], format="WAV"), "path": None}} for at in range(4)]
    collator = DistillationCollator(EXTRACTOR, EXTRACTOR, student.config, mask_time_prob=0.65)
    common = (arguments, DataArguments(max_unreadable_share=0.5), undecoded(rows), collator, accelerator)
    return Distiller(
        arguments=arguments,
        student=student,
        teacher=tiny_teacher(),
        optimizer=accelerator.prepare_optimizer(optimizer),
        scheduler=torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=4),
        accelerator=accelerator,
        loader=SpeechLoader(*common, {"step": 0, "sampler": None}),
        eval_loader=SpeechLoader(*common, None),
        log=RunLog(accelerator, arguments.logging_steps),
        recipe={"seed": 0},
    )


def state(distiller: Distiller) -> dict[str, torch.Tensor]:
    return copy.deepcopy(distiller.student.state_dict())


def next_batches(distiller: Distiller) -> list[dict]:
    return [next(distiller.loader.readable(distiller.loader))]


@pytest.mark.parametrize(
    ("space", "losses", "expected"),
    [
        (SIX_DEEP, [4.0, 1.0, 2.0, 3.0], {"loss": 2.5, "loss_smallest": 4.0, "loss_random": 1.5, "loss_largest": 3.0}),
        (None, [4.0], {"loss": 4.0}),
    ],
)
def test_losses_are_averaged_by_class_of_subnet(distiller, monkeypatch, space, losses, expected):
    monkeypatch.setattr("lighthubert_training.distillation.loop.training_step", lambda *_: torch.tensor(losses))
    distiller.arguments, distiller.student = replace(distiller.arguments, num_random_subnets=2), tiny_student(space)
    shown = distiller.step(0, next_batches(distiller))
    assert {name: value for name, value in shown.items() if "loss" in name} == expected


def test_a_step_depends_on_its_number_and_its_batches_only(distiller):
    before, batches = state(distiller), next_batches(distiller)
    shown = distiller.step(0, batches)
    after = state(distiller)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert shown["loss"] == pytest.approx((shown["loss_smallest"] + shown["loss_random"] + shown["loss_largest"]) / 3)
    assert shown["learning_rate"] < 1e-3
    assert not any(weight.grad is not None for weight in distiller.student.parameters())
    for number, same in ((0, True), (1, False)):
        distiller.student.load_state_dict(before)
        distiller.optimizer.optimizer.state.clear()
        for group in distiller.optimizer.param_groups:
            group["lr"] = 1e-3
        torch.rand(7)  # what was drawn before does not matter
        distiller.step(number, batches)
        again = state(distiller)
        assert all(torch.equal(again[name], after[name]) for name in after) is same


def test_a_loss_that_is_not_finite_names_step_and_recordings(distiller):
    with torch.no_grad():
        distiller.student.prediction_heads[0].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss is nan at step 4, on recording [0-3], recording [0-3]"):
        distiller.step(3, next_batches(distiller))


def test_a_step_without_recordings_logs_no_loss(distiller):
    before = state(distiller)
    shown = distiller.step(0, [])
    assert "loss" not in shown
    assert all(torch.equal(weight, before[name]) for name, weight in state(distiller).items())


def test_a_step_without_recordings_is_none_for_a_scaler_of_gradients_either(distiller, accelerator, monkeypatch):
    """As in fp16 on a GPU, with real scaling on any device."""
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler(DEVICE.type, init_scale=1024.0))
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
    monkeypatch.setattr(accelerator, "_optimizers", [])  # those of other tests
    distiller.optimizer = accelerator.prepare_optimizer(distiller.optimizer.optimizer)
    before = state(distiller)
    assert "loss" not in distiller.step(0, [])
    assert all(torch.equal(weight, before[name]) for name, weight in state(distiller).items())
    assert distiller.step(1, next_batches(distiller))["grad_norm"] < 1000
    assert any(not torch.equal(weight, before[name]) for name, weight in state(distiller).items())


def test_what_cannot_be_read_is_counted_and_left_out(distiller):
    batches = [{"unreadable": [("a.wav", "cut off")]}, {"unreadable": [], "input_values": torch.zeros(1, 400)}]
    (left,) = distiller.loader.readable(batches)
    assert "input_values" in left
    assert distiller.loader.unreadable.names == {"a.wav"}
    assert not distiller.eval_loader.unreadable.names


def test_an_evaluation_is_logged_and_changes_nothing(distiller):
    distiller.student.set_subnet(TWO_DEEP.sample(0))
    before, selected = state(distiller), distiller.student.subnet
    mean = distiller.evaluate(3)
    losses = distiller.log.eval_losses
    assert list(losses) == NAMES
    assert mean == pytest.approx(sum(losses.values()) / 5)
    assert distiller.log.history == [
        {"step": 3, "eval_loss": mean} | {f"eval_loss_{name}": loss for name, loss in losses.items()}
    ]
    assert distiller.evaluate(4) == mean
    assert distiller.student.subnet == selected
    assert all(torch.equal(weight, before[name]) for name, weight in state(distiller).items())


def test_evaluations_are_due_every_so_many_steps_and_at_the_end(distiller):
    assert [step for step in range(1, 5) if distiller.is_evaluated(step)] == [3, 4]
    distiller.arguments = replace(distiller.arguments, eval_steps=None)
    assert [step for step in range(1, 5) if distiller.is_evaluated(step)] == [4]
    distiller.eval_loader = None
    assert not distiller.is_evaluated(4)


def test_training_evaluates_and_saves_what_another_run_goes_on_from(distiller, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert distiller.train(0)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [entry["step"] for entry in distiller.log.history] == [1, 2, 3, 3, 4, 4]
    for step, eval_loss in ((2, None), (4, distiller.log.history[-1]["eval_loss"])):
        folder = tmp_path / f"checkpoint-{step}"
        assert checkpoint_damage(folder) is None
        saved = json.loads((folder / "run_state.json").read_text())
        assert (saved["step"], saved["eval_loss"], saved["recipe"]) == (step, eval_loss, {"seed": 0})
    log = RunLog(distiller.accelerator, 2, saved["log"])
    assert log.history == distiller.log.history
    assert log.eval_losses == distiller.log.eval_losses


def test_sigterm_ends_training_with_a_checkpoint_of_the_last_step(distiller, tmp_path, capsys):
    calls = []

    def terminate(*_):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    distiller.teacher.register_forward_hook(terminate)
    assert not distiller.train(0)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2", "checkpoint-3"]
    assert "stopped after step 3" in capsys.readouterr().out


def test_sigterm_has_its_old_meaning_after_the_block_also_on_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError), stop_on_sigterm() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(1)
        raise OSError
    assert signal.getsignal(signal.SIGTERM) is before


# Before a run


def test_a_used_folder_is_refused_unless_the_run_goes_on(distiller, accelerator, tmp_path):
    arguments, recipe = distiller.arguments, {"seed": 0}
    assert prepare_output(arguments, recipe, accelerator) == (None, {"step": 0, "log": None, "sampler": None})
    assert prepare_output(arguments, recipe, accelerator)[0] is None  # nothing was computed yet
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="has an earlier run's model: go on from it with --resume_from"):
        prepare_output(arguments, recipe, accelerator)
    distiller.save(2, None)
    with pytest.raises(UserError, match="has checkpoints of an earlier run, checkpoint-2 the newest"):
        prepare_output(arguments, recipe, accelerator)
    going_on = replace(arguments, resume_from_checkpoint="latest")
    folder, saved = prepare_output(going_on, recipe, accelerator)
    assert (folder, saved["step"]) == (tmp_path / "checkpoint-2", 2)
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        prepare_output(going_on, {"seed": 1}, accelerator)
