"""The log averages over steps, keeps evaluations, and goes on where it stopped."""

import json

import pytest
import torch
from accelerate import Accelerator
from conftest import new_accelerator

from lighthubert_training.runs.log import RunLog


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return new_accelerator("cpu")


def values(**numbers: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(float(number)) for name, number in numbers.items()}


def test_an_entry_averages_what_its_steps_reported(accelerator):
    log = RunLog(accelerator, logging_steps=2)
    assert log.step(1, values(loss=1.0, loss_smallest=5.0), seconds=3.0, learning_rate=0.1) == {}
    shown = log.step(2, values(loss=3.0), seconds=3.0, learning_rate=0.2)
    (entry,) = log.history
    assert (entry["step"], entry["loss"], entry["loss_smallest"], entry["learning_rate"]) == (2, 2.0, 5.0, 0.2)
    assert entry == {"step": 2, **shown}
    assert entry["audio_seconds_per_second"] > 0
    log.step(3, {}, 3.0, 0.3)
    assert log.step(4, values(loss=7.0), 3.0, 0.3)["loss"] == 7.0


def test_a_loss_that_is_not_finite_is_found_with_its_step_and_recordings(accelerator):
    log = RunLog(accelerator, logging_steps=3)
    log.step(1, values(loss=1.0, grad_norm=float("inf")), 1.0, 0.1, ["a.wav"])
    log.step(2, values(loss=float("nan")), 1.0, 0.1, ["b.wav", "c.wav"])
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 2, on b\.wav, c\.wav"):
        log.step(3, values(loss=float("nan")), 1.0, 0.1, ["d.wav"])


def test_a_state_has_the_values_of_all_steps_or_is_none(accelerator):
    log = RunLog(accelerator, logging_steps=3)
    log.step(1, values(loss=1.0), 1.0, 0.1)
    assert log.state_dict()["sums"] == {"loss": [1.0, 1]}
    log.step(2, values(loss=float("inf")), 1.0, 0.1)
    with pytest.raises(FloatingPointError):
        log.state_dict()


def test_a_log_that_was_stopped_between_entries_goes_on(accelerator):
    whole, stopped = RunLog(accelerator, 4), RunLog(accelerator, 4)
    for step in range(1, 9):
        whole.step(step, values(loss=step), 1.0, 0.1)
        if step == 6:
            stopped = RunLog(accelerator, 4, json.loads(json.dumps(stopped.state_dict())))
        stopped.step(step, values(loss=step), 1.0, 0.1)
    assert [entry["loss"] for entry in whole.history] == [2.5, 6.5]
    assert [entry["loss"] for entry in stopped.history] == [2.5, 6.5]


def test_an_evaluation_is_an_entry_and_the_losses_of_the_last_one_stay(accelerator):
    log = RunLog(accelerator, 2)
    assert log.eval_losses == {}
    assert log.add_evaluation(4, {"largest": 9.0, "smallest": 9.0}) == 9.0
    assert log.add_evaluation(8, {"largest": 1.0, "smallest": 3.0}) == 2.0
    assert log.history[1] == {"step": 8, "eval_loss": 2.0, "eval_loss_largest": 1.0, "eval_loss_smallest": 3.0}
    for same in (log, RunLog(accelerator, 2, json.loads(json.dumps(log.state_dict())))):
        assert same.eval_losses == {"largest": 1.0, "smallest": 3.0}


def test_entries_go_to_the_trackers(accelerator, monkeypatch):
    sent = []
    monkeypatch.setattr(accelerator, "log", lambda values, step: sent.append((step, values)))
    log = RunLog(accelerator, 1)
    log.step(1, values(loss=1.0), 1.0, 0.1)
    log.add_evaluation(1, {"model": 0.5})
    (step, entry), evaluation = sent
    assert (step, entry["loss"]) == (1, 1.0)
    assert evaluation == (1, {"eval_loss": 0.5, "eval_loss_model": 0.5})
