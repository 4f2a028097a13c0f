"""Checkpoints that survive a kill at any moment.

A checkpoint is written beside its place and renamed when it is whole; a manifest of digests tells a damaged one. What
happens in a step follows from the seed and the step, so model, optimiser, schedule, scaler, the number of steps and
the position in streamed data are all there is to keep.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lighthubert_training.runs.distributed import any_process
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import write_json


logger = logging.getLogger(__name__)
PREFIX, STATE, MANIFEST = "checkpoint-", "run_state.json", "manifest.json"
UNFINISHED = f"unfinished-{PREFIX}"
"""What stands before the step of a checkpoint that is being written, or deleted. A kill leaves it behind."""


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, state: dict[str, Any], limit: int
) -> Path | None:
    """Writes `output_dir/checkpoint-{step}` and deletes older ones. All processes call it.

    Args:
        state: what else is to be known when the run goes on, as JSON. Its `eval_loss`, where there is one, says which
            checkpoint is the best.
        limit: how many checkpoints stay, the newest, besides the best.

    Returns:
        The checkpoint; `None` if it could not be written (a full disk). Then earlier ones are as they were, and the
        run may go on.
    """
    folder, unfinished = output_dir / f"{PREFIX}{step}", output_dir / f"{UNFINISHED}{step}"
    error: OSError | RuntimeError | None = None
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(unfinished))
    except (OSError, RuntimeError) as failure:  # torch and safetensors raise RuntimeErrors of their own
        error = failure
    if not any_process(accelerator, error is not None) and accelerator.is_main_process:
        try:
            write_json(unfinished / STATE, {"step": step, **state})
            write_manifest(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.replace(folder)
            _prune(output_dir, limit)
        except OSError as failure:
            error = failure
    if not any_process(accelerator, error is not None):
        return folder
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        logger.warning(f"{folder} could not be written ({error or 'by another process'}): going on without it")
    return None


def find_checkpoint(accelerator: Accelerator, which: str, output_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, which `Accelerator.load_state` restores, and its state. All processes call it.

    Args:
        which: `"latest"`, the newest whole checkpoint in `output_dir`, or a folder.

    Returns:
        The folder, and what `save_checkpoint` was given as `state`, with `step`; `None` if there is none yet.

    Raises:
        UserError: the folder that was named is no whole checkpoint, or all checkpoints are damaged.
    """
    found: list[Path | str | None] = [None]  # a message, if it is a string
    if accelerator.is_main_process:
        try:
            found = [newest_checkpoint(output_dir) if which == "latest" else require_whole(Path(which))]
        except UserError as error:
            found = [str(error)]
    broadcast_object_list(found)
    folder = found[0]
    if isinstance(folder, str):
        raise UserError(folder)
    return None if folder is None else (folder, _state(folder))


def _state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints, whole or damaged, oldest first."""
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def require_no_run(output_dir: Path) -> None:
    """Raises a `UserError` if the folder has checkpoints or a model of an earlier run."""
    newest = checkpoints(output_dir)[-1:]
    if newest or any(output_dir.glob("model*.safetensors")):
        found = f"checkpoints of an earlier run, {newest[0].name} the newest" if newest else "an earlier run's model"
        raise UserError(
            f"{output_dir} has {found}: go on from it with --resume_from_checkpoint latest, delete it, or choose"
            " another --output_dir"
        )


def checkpoint_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; `None` if every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest.items():
            if _digest(folder / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return f"it is not whole ({error})"
    return None


def require_whole(folder: Path) -> Path:
    """The same folder; raises a `UserError` if it is no checkpoint, or a damaged one."""
    if reason := checkpoint_damage(folder):
        raise UserError(f"cannot go on from {folder}: {reason}")
    return folder


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint without damage, `None` if there is none at all; damaged ones are named and passed over.

    Raises:
        UserError: all are damaged.
    """
    found = checkpoints(output_dir)
    for folder in reversed(found):
        reason = checkpoint_damage(folder)
        if reason is None:
            return folder
        logger.warning(f"{folder} is damaged, {reason}: trying the one before")
    if found:
        names = ", ".join(folder.name for folder in found)
        raise UserError(f"every checkpoint in {output_dir} is damaged ({names}): delete them to start anew")
    return None


def write_manifest(folder: Path) -> None:
    """Writes the digests of all files in a checkpoint, once they are on the disk."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            _flush(path)
            digests[str(path.relative_to(folder))] = _digest(path)
    write_json(folder / MANIFEST, digests)
    _flush(folder / MANIFEST)


def _flush(path: Path) -> None:
    """Waits until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def best_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint with the lowest `eval_loss` in its state, if any has one."""
    losses = {folder: _state(folder).get("eval_loss") for folder in checkpoints(output_dir)}
    measured = {folder: loss for folder, loss in losses.items() if loss is not None}
    return min(measured, key=measured.__getitem__, default=None)


def _prune(output_dir: Path, limit: int) -> None:
    """Deletes all checkpoints but the newest and the best, and what a kill has left behind."""
    best = best_checkpoint(output_dir)
    for folder in checkpoints(output_dir)[:-limit]:
        if folder != best:
            # renamed first: a kill in the middle must not leave what looks like a checkpoint
            folder.replace(folder.with_name(folder.name.replace(PREFIX, UNFINISHED)))
    for left in output_dir.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
