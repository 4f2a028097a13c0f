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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from lighthubert_training.runs.distributed import any_process, on_main_process
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import give_permissions, write_json


logger = logging.getLogger(__name__)
PREFIX, STATE, MANIFEST = "checkpoint-", "run_state.json", "manifest.json"
UNFINISHED = f"unfinished-{PREFIX}"
"""What stands before the step of a checkpoint that is being written, or deleted. A kill leaves it behind."""


class FailedSaves:
    """Lets a run outlive saves that fail: on a disk that is full now and has room again in an hour, say.

    Args:
        resumption: what a run is gone on with.

    Attributes:
        in_a_row: number of saves that have failed since the last that did not.
    """

    MOST = 3

    def __init__(self, resumption: str = "--resume_from_checkpoint latest") -> None:
        self.resumption, self.in_a_row = resumption, 0

    def note(self, path: Path, error: Exception | None, accelerator: Accelerator) -> bool:
        """Notes the outcome of a save, and warns if it failed. All processes call it.

        Args:
            error: of this process, if there was one.

        Returns:
            Whether all processes have written what they had to.

        Raises:
            UserError: it is the third save in a row that failed, on all processes.
        """
        if not any_process(error is not None):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        message = f"{path} could not be written ({error or 'by another process'})"
        if self.in_a_row == self.MOST:
            raise UserError(
                f"{message}, nor could the {self.MOST - 1} before: what was saved earlier is as it was. See to it that"
                f" the disk has room, and go on with {self.resumption}"
            )
        if accelerator.is_main_process:
            logger.warning(f"{message}: going on without it")
        return False


def is_write_error(error: Exception) -> bool:
    """Whether an error says that a file could not be written. torch has no class of its own for that."""
    of_torch = type(error) is RuntimeError and any(name in str(error) for name in ("inline_container", "iostream"))
    return of_torch or isinstance(error, OSError | SafetensorError)


@contextmanager
def saving_results(folder: Path) -> Iterator[None]:
    """Inside the block, what cannot be written to `folder` is a `UserError`. Checkpoints are as they were."""
    try:
        yield
    except Exception as error:
        if not is_write_error(error):
            raise
        raise UserError(
            f"{folder} cannot be written: {error}. See to it that the disk has room, and go on with"
            " --resume_from_checkpoint latest"
        ) from error


def write_checkpoint(
    accelerator: Accelerator, folder: Path, write: Callable[[Path], object], failed: FailedSaves
) -> bool:
    """Writes the checkpoint `folder` beside its place, and renames it when it is whole. All processes call it.

    Args:
        folder: `checkpoint-{step}` in the output folder.
        write: writes the part of this process into a folder of the same name, which it makes.

    Returns:
        Whether it was written. If not, earlier ones are as they were, and the run may go on.
    """
    unfinished = folder.with_name(folder.name.replace(PREFIX, UNFINISHED)) / folder.name
    error: Exception | None = None
    if accelerator.is_main_process:
        shutil.rmtree(unfinished.parent, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        write(unfinished)
    except Exception as failure:
        if not is_write_error(failure):
            raise
        error = failure
    if not any_process(error is not None) and accelerator.is_main_process:
        try:
            give_permissions(unfinished)
            write_manifest(unfinished)
            _put_in_place(unfinished, folder)
        except OSError as failure:
            error = failure
    if accelerator.is_main_process:
        shutil.rmtree(unfinished.parent, ignore_errors=True)
    return failed.note(folder, error, accelerator)


def _put_in_place(unfinished: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one: whole ones are gone on from
    unfinished.replace(folder)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, state: dict[str, Any], limit: int, failed: FailedSaves
) -> Path | None:
    """Writes `output_dir/checkpoint-{step}` and deletes older ones. All processes call it.

    Args:
        state: what else is to be known when the run goes on, as JSON. Its `eval_loss`, where there is one, says which
            checkpoint is the best.
        limit: how many checkpoints stay, the newest, besides the best.
        failed: what became of earlier saves.

    Returns:
        The checkpoint; `None` if it could not be written (a full disk). Then earlier ones are as they were, and the
        run may go on.

    Raises:
        UserError: nor could the saves before.
    """
    folder = output_dir / f"{PREFIX}{step}"

    def write(unfinished: Path) -> None:
        accelerator.save_state(str(unfinished))
        if accelerator.is_main_process:
            write_json(unfinished / STATE, {"step": step, **state})

    if not write_checkpoint(accelerator, folder, write, failed):
        return None
    if accelerator.is_main_process:
        _prune(output_dir, limit)
    return folder


def find_checkpoint(accelerator: Accelerator, which: str, output_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, which `Accelerator.load_state` restores, and its state. All processes call it.

    Args:
        which: `"latest"`, the newest whole checkpoint in `output_dir`, or a folder.

    Returns:
        The folder, and what `save_checkpoint` was given as `state`, with `step`; `None` if there is none yet.

    Raises:
        UserError: the folder that was named is no whole checkpoint, or all checkpoints are damaged.
    """
    folder = on_main_process(
        lambda: newest_checkpoint(output_dir) if which == "latest" else require_whole(Path(which))
    )
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
    """The checkpoint with the lowest `eval_loss` in its state, if any has one; those without a state that can be read
    are named and passed over."""
    losses: dict[Path, float] = {}
    for folder in checkpoints(output_dir):
        try:
            loss = _state(folder).get("eval_loss")
        except (OSError, ValueError, AttributeError) as error:
            logger.warning(f"{folder} is damaged, {STATE} cannot be read ({error}): it does not count as the best")
            continue
        if isinstance(loss, int | float):
            losses[folder] = loss
    return min(losses, key=losses.__getitem__, default=None)


def _prune(output_dir: Path, limit: int) -> None:
    """Deletes all checkpoints but the newest and the best, and what a kill has left behind. What cannot be deleted is
    named, and stays."""
    best = best_checkpoint(output_dir)
    for folder in checkpoints(output_dir)[:-limit]:
        if folder != best:
            # renamed first: a kill in the middle must not leave what looks like a checkpoint
            unfinished = folder.with_name(folder.name.replace(PREFIX, UNFINISHED))
            try:
                shutil.rmtree(unfinished, ignore_errors=True)
                folder.replace(unfinished)
            except OSError as error:
                logger.warning(f"{folder} could not be deleted: {error}")
    for left in output_dir.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
