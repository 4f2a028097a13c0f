"""Options that contradict each other are refused, and a run goes on with the options that it was started with."""

from dataclasses import asdict

import pytest

from lighthubert_training.data.sources import DataArguments
from lighthubert_training.distillation.arguments import (
    FREE_TO_CHANGE,
    DistillationArguments,
    ObjectiveArguments,
    check_same_recipe,
)
from modeling_lighthubert.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps=0 has to be at least 1"),
        ({"save_total_limit": 0}, "save_total_limit=0 has to be at least 1"),
        ({"eval_steps": 0}, "eval_steps=0 has to be at least 1, or left out"),
        ({"crop_seconds": 0.0}, "crop_seconds=0.0 has to be above 0"),
        ({"freeze_feature_encoder": True, "feature_encoder_learning_rate": 1e-4}, "the feature encoder is frozen"),
        ({"share_feature_encoder": True, "feature_encoder_learning_rate": 1e-4}, "the feature encoder is frozen"),
        ({"subnet": "a", "search_space": "small"}, "--subnet a .* one model, .*: leave out --search_space small"),
        ({"subnet": "a"}, "--subnet a is cut out of a supernet: give .* as --student_name_or_path"),
        ({"subnet": "a", "student_name_or_path": "random"}, "--subnet a is cut out of a supernet"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments("teacher", "output", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_layers": [0]}, "feed_forward are counted from 1"),
        ({"target_layers": [-1], "target": "hidden_states"}, "hidden_states are counted from 0"),
        ({"target_layers": []}, "counted from 1"),
        ({"mask_time_prob": 1.5}, "between 0 and 1"),
        ({"mask_time_prob": 0.0}, "no frame would count"),
        ({"prediction_weight": 0.0}, "nothing would be learnt"),
    ],
)
def test_impossible_objectives_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveArguments(**options)


def test_each_layer_that_is_named_has_a_prediction_head():
    assert ObjectiveArguments().num_prediction_heads == 1
    assert ObjectiveArguments(target_layers=[4, 8, 12]).num_prediction_heads == 3


def recipe(**changes) -> dict:
    parts = (DistillationArguments("teacher", "output"), ObjectiveArguments(), DataArguments())
    return {name: value for part in parts for name, value in asdict(part).items()} | changes


def test_a_resumed_run_may_change_only_what_does_not_change_its_result():
    assert recipe().keys() > FREE_TO_CHANGE
    check_same_recipe(recipe(), recipe(**dict.fromkeys(FREE_TO_CHANGE, "another")))
    for name in recipe().keys() - FREE_TO_CHANGE:
        with pytest.raises(UserError, match=f"{name} was 'another' and is "):
            check_same_recipe(recipe(), recipe(**{name: "another"}))
