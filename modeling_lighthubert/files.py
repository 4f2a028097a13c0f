"""Files and folders that are whole or not there: each is written beside its place, and renamed when it is done."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from .errors import UserError


UNFINISHED = ".unfinished-"
"""What stands before the name of a file or folder that is being written. A kill leaves it behind."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Inside the block, the path of a new file beside `path`, which replaces it at the end; not on an error.

    Its permissions are those of the umask. Processes that write the same file do not meet.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{UNFINISHED}{uuid4().hex[:8]}-{path.name}")  # the suffix stays: libraries read it
    unfinished.touch()
    mode = unfinished.stat().st_mode
    unfinished.unlink()  # a block that writes nothing has to fail
    try:
        yield unfinished
        unfinished.chmod(mode)  # safetensors gives its files to nobody but their owner
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, with letters as they are."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def give_permissions(folder: Path) -> None:
    """Gives the files in a folder the permissions of the folder: safetensors keeps its files from all but their
    owner."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(file.stat().st_mode | folder.stat().st_mode & 0o666)


@contextmanager
def whole_files(folder: str | Path) -> Iterator[Path]:
    """Inside the block, a new folder in `folder`, which is made. Its files move to `folder` at the end, each replacing
    the one of its name; not on an error.

    Their permissions are those of the umask. What a kill left behind of an earlier one is deleted.
    """
    folder = Path(folder)
    unfinished = folder / f"{UNFINISHED}files"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        give_permissions(unfinished)
        for file in sorted(unfinished.rglob("*")):
            if file.is_file():
                target = folder / file.relative_to(unfinished)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Inside the block, a new folder beside `folder`, which replaces it at the end; not on an error.

    Its permissions are those of the umask. What a kill left behind of an earlier one is deleted.
    """
    folder = Path(folder).resolve()  # a link stays one, and "." has a name
    unfinished, replaced = (folder.with_name(f"{UNFINISHED}{kind}{folder.name}") for kind in ("", "old-"))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        give_permissions(unfinished)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.replace(replaced)
        unfinished.replace(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def require_unused(folder: str | Path, option: str = "--output_dir") -> Path:
    """The same folder, if nothing is in it.

    Raises:
        UserError: it is a file, or holds something.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: choose another {option}, or delete it")
    return folder
