"""A run that is killed, terminated or fails ends as if nothing had happened, once it is resumed."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import run_distillation
import torch
from scripts import TESTS, call, distil, distillation, fails, held, killed, newest, run, weights

from lighthubert_training.runs.checkpoints import checkpoint_damage
from modeling_lighthubert.errors import UserError


KILLS = int(os.environ.get("LIGHTHUBERT_TEST_KILLS", "2"))
"""How often the test of resumption kills a run."""

IN_A_SAVE = [
    ("lighthubert_training.runs.checkpoints:write_json", 3),  # the state, after model and optimiser
    ("lighthubert_training.runs.checkpoints:write_json", 4),  # the digests
    ("lighthubert_training.runs.checkpoints:_flush", 10),
]
"""Calls in the second save of a run: a checkpoint is half written."""

ELSEWHERE = [
    ("lighthubert_training.distillation.loop:training_step", 4),
    ("lighthubert_training.distillation.loop:training_step", 5),
    ("lighthubert_training.runs.checkpoints:_prune", 2),
]

STEPS = ("--sampling", "sandwich", "--max_steps", 30, "--save_steps", 2, "--per_device_train_batch_size", 2)
STEPS = (*STEPS, "--logging_steps", 3, "--eval_steps", 16)
SPEED = ("audio_seconds_per_second", "memory_gib")


def losses(folder: Path) -> list[dict[str, float]]:
    """The history of a run, without what depends on the machine."""
    history = json.loads((folder / "history.json").read_text())
    return [{name: value for name, value in entry.items() if name not in SPEED} for entry in history]


@pytest.mark.parametrize(
    ("processes", "streaming"),
    [(2, False), (1, True), (2, True)],
    ids=["two", "one-streaming", "two-streaming"],
)
def test_a_run_killed_again_and_again_ends_with_the_same_weights(workshop, processes, streaming):
    """Every other kill comes in the middle of a save, the others in a step or after a save."""
    name = f"{processes}-{streaming}"
    options = (*STEPS, "--train_file", workshop / "recordings", "--streaming", streaming)
    uninterrupted = distil(workshop, f"uninterrupted-{name}", *options, processes=processes)
    output, rng = workshop / f"killed-{name}", random.Random(name)
    command = distillation(workshop, output.name, *options, "--resume_from_checkpoint", "latest")
    for kill in range(KILLS):
        before, in_a_save = newest(output), kill % 2 == 0
        killed(*rng.choice(IN_A_SAVE if in_a_save else ELSEWHERE), *command, processes=processes)
        assert newest(output) > before
        assert not in_a_save or list(output.glob("unfinished-checkpoint-*"))
        assert not (output / "model.safetensors").exists(), "it was over before it was killed: more steps are needed"
    run(*command, processes=processes)
    for name, weight in weights(output).items():
        assert torch.equal(weight, weights(uninterrupted)[name]), name
    assert losses(output) == losses(uninterrupted)
    left = {path.name for path in output.glob("*checkpoint*")}
    assert {"checkpoint-28", "checkpoint-30"} <= left <= {"checkpoint-16", "checkpoint-28", "checkpoint-30"}


CHECKPOINTS = "lighthubert_training.runs.checkpoints"
WINDOWS = [
    ("accelerate.accelerator:save_accelerator_state", 0),  # the first save: nothing is written
    (f"{CHECKPOINTS}:write_json", 0),  # what Accelerate keeps is written, not the state of the run
    (f"{CHECKPOINTS}:write_manifest", 0),
    (f"{CHECKPOINTS}:_put_in_place", 0),
    (f"{CHECKPOINTS}:_prune", 1),  # it is there, and nothing is deleted yet
    (f"{CHECKPOINTS}:write_manifest", 1),  # the second save
    (f"{CHECKPOINTS}:_put_in_place", 1),
    (f"{CHECKPOINTS}:best_checkpoint", 2),  # there are two, of which one is to go
    ("modeling_lighthubert.files:give_permissions", 3),  # all steps are made: the model is written beside its place
    ("lighthubert_training.cards.supernet:write_supernet_card", 3),
]
"""Functions in whose first call a run is killed, and the newest checkpoint then."""


def test_a_run_killed_in_each_window_of_its_saves_ends_with_the_same_weights(workshop):
    """Each run goes on from what the one before has left; only the newest checkpoint is kept."""
    options = ("--max_steps", 3, "--save_steps", 1, "--save_total_limit", 1, "--sampling", "sandwich")
    uninterrupted = distil(workshop, "undisturbed", *options)
    output = workshop / "windows"
    command = distillation(workshop, output.name, *options, "--resume_from_checkpoint", "latest")
    for function, left in WINDOWS:
        killed(function, 1, *command)
        assert newest(output) == left, function
    call(run_distillation.main, *command)
    assert all(torch.equal(weight, weights(uninterrupted)[name]) for name, weight in weights(output).items())
    assert losses(output) == losses(uninterrupted)
    left = [path.name for path in output.glob("*checkpoint*")], [path.name for path in output.glob(".*")]
    assert left == (["checkpoint-3"], [])


def test_sigterm_leaves_a_checkpoint_of_the_last_step_and_ends_well(workshop):
    command = distillation(workshop, "terminated", "--max_steps", 500, "--save_steps", 5)
    step = "lighthubert_training.distillation.loop:training_step"
    output = run(TESTS / "signalled.py", "SIGTERM", step, 7, *command)
    assert "stopped after step 7: go on with --resume_from_checkpoint latest" in output
    assert {path.name for path in (workshop / "terminated").glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-7"}
    assert not (workshop / "terminated" / "model.safetensors").exists()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(workshop):
    whole = distil(workshop, "whole", *STEPS)
    damaged = workshop / "damaged"
    shutil.copytree(whole, damaged)
    model = damaged / "checkpoint-30" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    output = run(*distillation(workshop, "damaged", *STEPS, "--resume_from_checkpoint", "latest"))
    assert "checkpoint-30 is damaged" in output
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(damaged).items())


def test_the_checkpoints_of_an_earlier_run_are_not_mixed_with_those_of_another(workshop):
    options = ("--max_steps", 2, "--save_steps", 1)
    distil(workshop, "earlier", *options)
    with pytest.raises(UserError, match="has checkpoints of an earlier run, checkpoint-2 the newest"):
        distil(workshop, "earlier", *options)


def test_a_second_run_to_the_same_folder_is_refused_whether_it_resumes_or_not(workshop):
    for more in ((), ("--resume_from_checkpoint", "latest")):
        with (
            held(workshop / "busy") as pid,
            pytest.raises(UserError, match=f"busy is being written by process {pid} on"),
        ):
            distil(workshop, "busy", *more)
    distil(workshop, "busy", "--max_steps", 1)


def test_the_model_of_an_earlier_run_is_not_overwritten(workshop):
    output = distil(workshop, "finished", "--max_steps", 1)
    before = weights(output)
    with pytest.raises(UserError, match="has an earlier run's model: .* choose another --output_dir"):
        distil(workshop, "finished", "--max_steps", 2)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(output).items())
    assert "max_steps: 1" in (output / "recipe.yaml").read_text()
    distil(workshop, "finished", "--max_steps", 1, "--resume_from_checkpoint", "latest")  # begins anew, as was asked


def test_a_changed_recipe_is_not_resumed(workshop):
    distil(workshop, "recipe", "--max_steps", 2, "--save_steps", 1)
    options = ("--max_steps", 2, "--learning_rate", 0.1, "--resume_from_checkpoint", "latest")
    with pytest.raises(UserError, match="learning_rate was 0.0005 and is 0.1"):
        distil(workshop, "recipe", *options)


def test_a_loss_that_is_not_finite_names_the_recordings_and_leaves_the_last_checkpoint(workshop):
    options = ("--learning_rate", 1e30, "--warmup_ratio", 0, "--max_steps", 20, "--save_steps", 1)
    message = fails(*distillation(workshop, "diverged", *options), status=1)
    assert "on recording " in message
    assert "The last checkpoint is as it was" in message
    assert checkpoint_damage(workshop / "diverged" / f"checkpoint-{newest(workshop / 'diverged')}") is None
