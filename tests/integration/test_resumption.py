"""A run that is killed, terminated or fails ends as if nothing had happened, once it is resumed."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from scripts import distil, distillation, fails, newest, run, start, weights

from lighthubert_training.runs.checkpoints import damage


KILLS = int(os.environ.get("LIGHTHUBERT_TEST_KILLS", "2"))
"""How often the test of resumption kills a run."""

STEPS = ("--sampling", "sandwich", "--max_steps", 30, "--save_steps", 2, "--per_device_train_batch_size", 2)
STEPS = (*STEPS, "--logging_steps", 3, "--eval_steps", 16)
SPEED = ("audio_seconds_per_second", "memory_gib")


def losses(folder: Path) -> list[dict[str, float]]:
    """The history of a run, without what depends on the machine."""
    history = json.loads((folder / "history.json").read_text())
    return [{name: value for name, value in entry.items() if name not in SPEED} for entry in history]


def saving(output: Path, since: float) -> bool:
    """Whether a checkpoint is half written, by a process that was started then."""
    return any(folder.stat().st_ctime > since for folder in output.glob("unfinished-*"))


@pytest.mark.parametrize(
    ("processes", "streaming"),
    [(1, False), (2, False), (1, True), (2, True)],
    ids=["one", "two", "one-streaming", "two-streaming"],
)
def test_a_run_killed_again_and_again_ends_with_the_same_weights(workshop, processes, streaming):
    """Every other kill comes in the middle of a save, the others anywhere."""
    name = f"{processes}-{streaming}"
    options = (*STEPS, "--train_file", workshop / "recordings", "--streaming", streaming)
    uninterrupted = distil(workshop, f"uninterrupted-{name}", *options, processes=processes)
    output, rng, unfinished = workshop / f"killed-{name}", random.Random(name), 0
    command = distillation(workshop, output.name, *options, "--resume_from_checkpoint", "latest")
    for kill in range(KILLS):
        process = start(*command, processes=processes)
        begin, before, in_a_save = time.time(), newest(output), kill % 2 == 0
        while process.poll() is None and newest(output) == before and not (in_a_save and saving(output, begin)):
            time.sleep(0.0002)
        time.sleep(0 if in_a_save else rng.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        unfinished += saving(output, begin)
        assert not (output / "model.safetensors").exists(), "it was over before it was killed: more steps are needed"
    assert newest(output)
    assert unfinished
    run(*command, processes=processes)
    for name, weight in weights(output).items():
        assert torch.equal(weight, weights(uninterrupted)[name]), name
    assert losses(output) == losses(uninterrupted)
    left = {path.name for path in output.glob("*checkpoint*")}
    assert {"checkpoint-28", "checkpoint-30"} <= left <= {"checkpoint-16", "checkpoint-28", "checkpoint-30"}


def test_sigterm_leaves_a_checkpoint_and_ends_well(workshop):
    output = workshop / "terminated"
    options = ("--max_steps", 500, "--save_steps", 5)
    process = start(*distillation(workshop, "terminated", *options))
    while process.poll() is None and not newest(output):
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=60) == 0
    assert newest(output) >= 5
    assert not (output / "model.safetensors").exists()


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
    with pytest.raises(ValueError, match="has checkpoints of an earlier run, checkpoint-2 the newest"):
        distil(workshop, "earlier", *options)


def test_a_changed_recipe_is_not_resumed(workshop):
    distil(workshop, "recipe", "--max_steps", 2, "--save_steps", 1)
    options = ("--max_steps", 2, "--learning_rate", 0.1, "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match="learning_rate was 0.0005 and is 0.1"):
        distil(workshop, "recipe", *options)


def test_a_loss_that_is_not_finite_names_the_recordings_and_leaves_the_last_checkpoint(workshop):
    options = ("--learning_rate", 1e30, "--warmup_ratio", 0, "--max_steps", 20, "--save_steps", 1)
    message = fails(*distillation(workshop, "diverged", *options))
    assert "on recording " in message
    assert "The last checkpoint is as it was" in message
    assert damage(workshop / "diverged" / f"checkpoint-{newest(workshop / 'diverged')}") is None
