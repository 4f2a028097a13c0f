"""Checkpoints are whole or absent, are pruned, and a failed one leaves the others alone."""

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import new_accelerator, small_disk

from lighthubert_training.runs.checkpoints import (
    FailedSaves,
    best_checkpoint,
    checkpoint_damage,
    checkpoints,
    find_checkpoint,
    is_write_error,
    newest_checkpoint,
    require_no_run,
    require_whole,
    save_checkpoint,
)
from modeling_lighthubert.errors import UserError


@pytest.fixture
def accelerator() -> Accelerator:
    """One with a small model and its optimiser prepared."""
    accelerator = new_accelerator("cpu")
    model = accelerator.prepare_model(torch.nn.Linear(2, 2), evaluation_mode=True)
    accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters()))
    yield accelerator
    accelerator.free_memory()


def save(accelerator: Accelerator, output_dir: Path, step: int, state: dict, limit: int, **given) -> Path | None:
    """`save_checkpoint`, by default in a run of which no save has failed."""
    return save_checkpoint(accelerator, output_dir, step, state, limit, **({"failed": FailedSaves()} | given))


def weight(accelerator: Accelerator) -> torch.Tensor:
    return accelerator._models[0].weight.data


def test_a_checkpoint_brings_back_weights_step_and_state(accelerator, tmp_path):
    before = weight(accelerator).clone()
    folder = save(accelerator, tmp_path, 7, {"recipe": {"seed": 1}}, limit=2)
    assert folder == tmp_path / "checkpoint-7"
    assert checkpoint_damage(folder) is None
    weight(accelerator).zero_()
    assert find_checkpoint(accelerator, "latest", tmp_path) == (folder, {"step": 7, "recipe": {"seed": 1}})
    accelerator.load_state(str(folder))
    assert torch.equal(weight(accelerator), before)


def test_the_newest_stay(accelerator, tmp_path):
    for step in (2, 4, 10, 12):
        save(accelerator, tmp_path, step, {}, limit=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-12"]
    assert not list(tmp_path.glob("unfinished-*"))


def test_the_best_stays_however_old(accelerator, tmp_path):
    for step, loss in enumerate([0.5, 0.3, None, 0.4, None], start=1):
        save(accelerator, tmp_path, step, {"eval_loss": loss}, limit=1)
    assert best_checkpoint(tmp_path).name == "checkpoint-2"
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-5"]


@pytest.mark.parametrize(
    ("num_bytes", "error"),
    [
        (100, "Error while serializing: .*File too large"),
        (1000, "iostream error|inline_container"),
        (30_000, "Errno 27"),
    ],
    ids=["weights", "optimiser", "state"],
)
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on(accelerator, tmp_path, caplog, num_bytes, error):
    (parameter,) = list(accelerator._models[0].parameters())[:1]
    parameter.grad = torch.ones_like(parameter)
    accelerator._optimizers[0].step()  # its state is larger than the weights
    save(accelerator, tmp_path, 1, {}, limit=1)
    with small_disk(num_bytes):
        assert save(accelerator, tmp_path, 2, {"log": "much" * 10_000}, limit=1) is None
    assert re.search(f"checkpoint-2 could not be written .*{error}.*: going on without it", caplog.text)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint_damage(tmp_path / "checkpoint-1") is None
    assert save(accelerator, tmp_path, 3, {}, limit=1) == tmp_path / "checkpoint-3"


def test_a_run_ends_when_three_saves_in_a_row_have_failed(accelerator, tmp_path):
    failed = FailedSaves()

    def saves(step: int, num_bytes: int) -> bool:
        with small_disk(num_bytes):
            return save(accelerator, tmp_path, step, {}, limit=1, failed=failed) is not None

    assert [saves(step, 10**6 if step == 3 else 100) for step in range(1, 6)] == [False, False, True, False, False]
    message = (
        r"checkpoint-6 could not be written \(.*\), nor could the 2 before: .* the disk has room, and go on with --res"
    )
    with pytest.raises(UserError, match=message):
        saves(6, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("NCCL error"), ValueError()]
)
def test_what_is_no_fault_of_a_disk_ends_the_run(accelerator, tmp_path, monkeypatch, error):
    assert not is_write_error(error)

    def fail(folder: str) -> None:
        raise error

    monkeypatch.setattr(accelerator, "save_state", fail)
    with pytest.raises(type(error)):
        save(accelerator, tmp_path, 2, {}, limit=2)


@pytest.mark.parametrize("content", ["", "[]", None], ids=["emptied", "another", "missing"])
def test_a_damaged_older_checkpoint_is_no_obstacle_to_a_save(accelerator, tmp_path, caplog, content):
    for step, loss in ((1, 0.5), (2, 0.7)):
        save(accelerator, tmp_path, step, {"eval_loss": loss}, limit=2)
    state = tmp_path / "checkpoint-1" / "run_state.json"
    state.unlink() if content is None else state.write_text(content)
    assert save(accelerator, tmp_path, 3, {"eval_loss": 0.8}, limit=1) == tmp_path / "checkpoint-3"
    assert "checkpoint-1 is damaged, run_state.json cannot be read" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3"}


def test_what_a_kill_left_of_a_save_or_of_a_deletion_goes_with_the_next_save(accelerator, tmp_path):
    for step in (1, 2):
        (tmp_path / f"unfinished-checkpoint-{step}").mkdir()
        (tmp_path / f"unfinished-checkpoint-{step}" / "half").touch()
    folder = save(accelerator, tmp_path, 2, {}, limit=2)
    assert list(tmp_path.iterdir()) == [folder]
    assert not (folder / "half").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "run_state.json", "optimizer.bin", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
def test_any_damage_is_noticed(accelerator, tmp_path, name, how):
    folder = save(accelerator, tmp_path, 1, {}, limit=2)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if how != "missing":
        (folder / name).write_bytes(content[:-3] if how == "cut" else content[:-3] + b"???")
    assert checkpoint_damage(folder) is not None


def test_the_newest_whole_checkpoint_is_taken_and_named_damage_is_refused(accelerator, tmp_path, caplog):
    for step in (1, 2):
        save(accelerator, tmp_path, step, {}, limit=2)
    (tmp_path / "checkpoint-2" / "run_state.json").write_text(json.dumps({"step": 3}))
    assert find_checkpoint(accelerator, "latest", tmp_path)[0].name == "checkpoint-1"
    assert newest_checkpoint(tmp_path) == require_whole(tmp_path / "checkpoint-1") == tmp_path / "checkpoint-1"
    assert "checkpoint-2 is damaged, run_state.json is not what was written: trying the one before" in caplog.text
    with pytest.raises(UserError, match=r"cannot go on from .*checkpoint-2: run_state.json is not what was written"):
        find_checkpoint(accelerator, str(tmp_path / "checkpoint-2"), tmp_path)
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        find_checkpoint(accelerator, "latest", tmp_path)


def test_nothing_to_go_on_from_is_a_fresh_start(accelerator, tmp_path):
    assert find_checkpoint(accelerator, "latest", tmp_path) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "checkpoint-10",
            "has checkpoints of an earlier run, checkpoint-10 the newest: go on from it with --",
        ),
        ("model.safetensors", "has an earlier run's model: go on from it with --resume_f.* another --output_dir"),
        ("model-00001-of-00002.safetensors", "has an earlier run's model"),
        ("tensorboard", None),
    ],
)
def test_a_folder_in_use_is_refused(tmp_path, name, message):
    require_no_run(tmp_path / "nowhere")
    (tmp_path / "checkpoint-9").mkdir() if name == "checkpoint-10" else None
    (tmp_path / name).mkdir()
    if message is None:
        require_no_run(tmp_path)
    else:
        with pytest.raises(UserError, match=message):
            require_no_run(tmp_path)
