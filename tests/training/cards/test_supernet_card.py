"""The card of a student says what it is and how it was trained."""

from dataclasses import replace

import pytest
from conftest import NARROW, TWO_DEEP, tiny_model

from lighthubert_training.cards.supernet import write_supernet_card
from modeling_lighthubert import LightHubertForPreTraining


RECIPE = {
    **{"teacher_name_or_path": "the/teacher", "student_name_or_path": None, "dataset_name": ["some/speech"]},
    **{"train_file": None, "subnet": None},
    **{"max_steps": 7, "sampling": "uniform", "target": "feed_forward", "loss_frames": "all"},
    **{"mask_time_prob": 0.65, "learning_rate": 1e-3, "seed": 3},
}


@pytest.mark.parametrize("space", [TWO_DEEP, None], ids=["supernet", "one-model"])
def test_the_card_says_what_the_student_is_and_what_it_was_trained_on(tmp_path, space):
    student = tiny_model(LightHubertForPreTraining, space)
    write_supernet_card(student, RECIPE, {"smallest": 0.25}, tmp_path, {"num_recordings": 7, "num_available": 8})
    card = (tmp_path / "README.md").read_text()
    smallest = student.hubert if space is None else student.hubert.extract_subnet("smallest")
    assert f"| {smallest.num_parameters():,} |" in card
    assert ("smaller HuBERTs" in card) is (space is not None)
    assert ("set_subnet" in card) is (space is not None)
    assert "Distilled from the/teacher on some/speech" in card
    assert "Distillation loss on held-out speech, 7 of 8 recordings:" in card
    assert "| smallest | 0.2500 |" in card
    assert "{{" not in card and "None" not in card


def test_the_card_of_a_subnet_that_was_cut_says_out_of_what_and_what_it_gained(tmp_path):
    student = tiny_model(LightHubertForPreTraining, TWO_DEEP).extract_subnet("smallest")
    recipe = RECIPE | {"student_name_or_path": "the/supernet", "subnet": "smallest"}
    write_supernet_card(student, recipe, {"as it was cut": 0.5, "model": 0.25}, tmp_path)
    card = (tmp_path / "README.md").read_text().replace("\n", " ")
    assert "A subnet cut out of the LightHuBERT supernet the/supernet, and distilled further by itself" in card
    assert f"by itself, for 7 steps; it began as the subnet smallest of the/supernet: {student.subnet}." in card
    assert "| as it was cut | 0.5000 | | model | 0.2500 |" in card
    assert "| sampling |" not in card


def test_the_card_lists_convolutions_and_windows_that_subnets_choose(tmp_path):
    student = tiny_model(LightHubertForPreTraining, replace(NARROW, attention_window=(2, None)))
    write_supernet_card(student, RECIPE, {}, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Convolutions have 4/8/16 channels to choose from, none fewer than the one before it." in card
    assert "attends to 2 or all frames on each side" in card
