"""Checkpoints are whole or absent, are pruned, and a failed one leaves the others alone."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from lighthubert_training.runs.checkpoints import (
    best_checkpoint,
    checkpoints,
    damage,
    find_checkpoint,
    save_checkpoint,
)


@pytest.fixture
def accelerator() -> Accelerator:
    """One with a small model and its optimiser prepared."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare_model(torch.nn.Linear(2, 2), evaluation_mode=True)
    accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters()))
    yield accelerator
    accelerator.free_memory()


def weight(accelerator: Accelerator) -> torch.Tensor:
    return accelerator._models[0].weight.data


def test_a_checkpoint_brings_back_weights_step_and_state(accelerator, tmp_path):
    before = weight(accelerator).clone()
    folder = save_checkpoint(accelerator, tmp_path, 7, {"recipe": {"seed": 1}}, limit=2)
    assert folder == tmp_path / "checkpoint-7"
    assert damage(folder) is None
    weight(accelerator).zero_()
    assert find_checkpoint(accelerator, "latest", tmp_path) == (folder, {"step": 7, "recipe": {"seed": 1}})
    accelerator.load_state(str(folder))
    assert torch.equal(weight(accelerator), before)


def test_the_newest_stay(accelerator, tmp_path):
    for step in (2, 4, 10, 12):
        save_checkpoint(accelerator, tmp_path, step, {}, limit=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-12"]
    assert not list(tmp_path.glob("unfinished-*"))


def test_the_best_stays_however_old(accelerator, tmp_path):
    for step, loss in enumerate([0.5, 0.3, None, 0.4, None], start=1):
        save_checkpoint(accelerator, tmp_path, step, {"eval_loss": loss}, limit=1)
    assert best_checkpoint(tmp_path).name == "checkpoint-2"
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-5"]


def test_a_save_that_fails_leaves_the_last_good_one(accelerator, tmp_path, monkeypatch):
    save_checkpoint(accelerator, tmp_path, 1, {}, limit=2)

    def disk_full(folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(accelerator, "save_state", disk_full)
    assert save_checkpoint(accelerator, tmp_path, 2, {}, limit=2) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert damage(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize("name", ["model.safetensors", "run_state.json", "optimizer.bin", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
def test_any_damage_is_noticed(accelerator, tmp_path, name, how):
    folder = save_checkpoint(accelerator, tmp_path, 1, {}, limit=2)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if how != "missing":
        (folder / name).write_bytes(content[:-3] if how == "cut" else content[:-3] + b"???")
    assert damage(folder) is not None


def test_the_newest_whole_checkpoint_is_taken_and_named_damage_is_refused(accelerator, tmp_path):
    for step in (1, 2):
        save_checkpoint(accelerator, tmp_path, step, {}, limit=2)
    (tmp_path / "checkpoint-2" / "run_state.json").write_text(json.dumps({"step": 3}))
    assert find_checkpoint(accelerator, "latest", tmp_path)[0].name == "checkpoint-1"
    with pytest.raises(ValueError, match=r"cannot go on from .*checkpoint-2: run_state.json is not what was written"):
        find_checkpoint(accelerator, str(tmp_path / "checkpoint-2"), tmp_path)
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
        find_checkpoint(accelerator, "latest", tmp_path)


def test_nothing_to_go_on_from_is_a_fresh_start(accelerator, tmp_path):
    assert find_checkpoint(accelerator, "latest", tmp_path) is None
