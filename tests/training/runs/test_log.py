"""The log averages over steps, goes on where it stopped, and ends as a plot and a card."""

import json
from dataclasses import replace

import pytest
from accelerate import Accelerator
from conftest import NARROW, TWO_DEEP, tiny_model

from lighthubert_training.runs.log import RunLog, plot_losses, write_card
from modeling_lighthubert import LightHubertForPreTraining


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_an_entry_averages_what_its_steps_reported(accelerator):
    log = RunLog(accelerator, logging_steps=2)
    log.step(1, {"loss": 1.0, "loss_smallest": 5.0}, seconds=3.0, learning_rate=0.1)
    shown = log.step(2, {"loss": 3.0}, seconds=3.0, learning_rate=0.2)
    (entry,) = log.history
    assert (entry["step"], entry["loss"], entry["loss_smallest"], entry["learning_rate"]) == (2, 2.0, 5.0, 0.2)
    assert entry == {"step": 2, **shown}
    assert entry["audio_seconds_per_second"] > 0
    assert log.step(3, {"loss": 7.0}, 3.0, 0.3)["loss"] == 7.0


def test_a_log_that_was_stopped_between_entries_goes_on(accelerator):
    whole, stopped = RunLog(accelerator, 4), RunLog(accelerator, 4)
    for step in range(1, 9):
        whole.step(step, {"loss": step}, 1.0, 0.1)
        if step == 6:
            stopped = RunLog(accelerator, 4, json.loads(json.dumps(stopped.state_dict())))
        stopped.step(step, {"loss": step}, 1.0, 0.1)
    assert [entry["loss"] for entry in whole.history] == [2.5, 6.5]
    assert [entry["loss"] for entry in stopped.history] == [2.5, 6.5]


def test_a_history_is_plotted(tmp_path):
    for name, history in {"empty": [], "full": [{"step": 1, "loss": 0.5}, {"step": 2, "eval_loss": 0.4}]}.items():
        plot_losses(history, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


RECIPE = {
    **{"teacher_name_or_path": "the/teacher", "student_name_or_path": None, "dataset_name": ["some/speech"]},
    **{"train_file": None, "max_steps": 7, "sampling": "uniform", "target": "feed_forward", "loss_frames": "all"},
    **{"mask_time_prob": 0.65, "learning_rate": 1e-3, "seed": 3},
}


@pytest.mark.parametrize("space", [TWO_DEEP, None], ids=["supernet", "one-model"])
def test_the_card_says_what_the_student_is_and_learnt_from(tmp_path, space):
    student = tiny_model(LightHubertForPreTraining, space)
    write_card(student, RECIPE, {"smallest": 0.25}, tmp_path)
    card = (tmp_path / "README.md").read_text()
    smallest = student.hubert if space is None else student.hubert.extract_subnet("smallest")
    assert f"| {smallest.num_parameters():,} |" in card
    assert ("smaller HuBERTs" in card) is (space is not None)
    assert ("set_subnet" in card) is (space is not None)
    assert "Distilled from the/teacher on some/speech" in card
    assert "| smallest | 0.2500 |" in card
    assert "{{" not in card and "None" not in card


def test_the_card_lists_convolutions_and_windows_that_subnets_choose(tmp_path):
    student = tiny_model(LightHubertForPreTraining, replace(NARROW, attention_window=(2, None)))
    write_card(student, RECIPE, {}, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Convolutions have 4/8/16 channels to choose from, none fewer than the one before it." in card
    assert "attends to 2 or all frames on each side" in card
