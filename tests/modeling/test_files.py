"""Claims about files and folders that are whole or not there, whatever happens while they are written."""

import json
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scripts import finish

from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import (
    UNFINISHED,
    require_unused,
    whole_file,
    whole_files,
    whole_folder,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    """Takes all permissions of others, and writing of the group."""
    earlier = os.umask(0o027)
    yield
    os.umask(earlier)


KILLED = """
import os, signal, sys
from modeling_lighthubert.files import whole_file, whole_folder

with (whole_file if sys.argv[1] == "file" else whole_folder)(sys.argv[2]) as path:
    (path if sys.argv[1] == "file" else path / "new.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_while_writing(kind: str, path: Path) -> None:
    script = path.parent / "killed.py"
    script.write_text(KILLED)
    finished = finish(script, kind, path)
    script.unlink()
    assert finished.returncode == -signal.SIGKILL, finished.stderr


# Files


def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "new" / "model.onnx"
    with whole_file(path) as unfinished:
        assert unfinished.parent == path.parent
        assert unfinished.suffix == ".onnx", "libraries choose a format by it"
        unfinished.write_text("content")
        assert not path.exists()
    assert path.read_text() == "content"
    assert names(path.parent) == ["model.onnx"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    write_text(tmp_path / "results.json", "old")
    with pytest.raises(error), whole_file(tmp_path / "results.json") as unfinished:
        unfinished.write_text("half")
        raise error
    assert (tmp_path / "results.json").read_text() == "old"
    assert names(tmp_path) == ["results.json"]


def test_a_kill_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "results.json", "old")
    kill_while_writing("file", tmp_path / "results.json")
    assert (tmp_path / "results.json").read_text() == "old"
    left = [name for name in names(tmp_path) if name != "results.json"]
    assert len(left) == 1
    assert left[0].startswith(UNFINISHED)


def test_writers_of_the_same_file_do_not_meet(tmp_path):
    path = tmp_path / "results.json"
    with whole_file(path) as one, whole_file(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one", "the last to end counts"
    assert names(tmp_path) == ["results.json"]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
def test_a_file_has_the_permissions_of_the_umask(tmp_path):
    write_text(tmp_path / "text.txt", "text")
    assert mode(tmp_path / "text.txt") == 0o640


@pytest.mark.usefixtures("umask")
def test_weights_have_the_permissions_of_the_umask_too(tmp_path):
    """safetensors writes files that nobody but their owner can read."""
    with whole_file(tmp_path / "model.safetensors") as unfinished:
        save_file({"weight": torch.zeros(2)}, unfinished)
    with whole_folder(tmp_path / "out") as unfinished:
        save_file({"weight": torch.zeros(2)}, unfinished / "model.safetensors")
        (unfinished / "part").mkdir()
        save_file({"weight": torch.zeros(2)}, unfinished / "part" / "model.safetensors")
    with whole_files(tmp_path / "in") as unfinished:
        save_file({"weight": torch.zeros(2)}, unfinished / "model.safetensors")
    files = ("model.safetensors", "out/model.safetensors", "out/part/model.safetensors", "in/model.safetensors")
    for file in files:
        assert mode(tmp_path / file) == 0o640


def test_a_block_that_writes_nothing_fails_and_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "results.json", "old")
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "results.json"):
        pass
    assert (tmp_path / "results.json").read_text() == "old"


def test_json_is_for_people_too(tmp_path):
    write_json(tmp_path / "value.json", {"name": "Müller", "numbers": [1, 2.5]})
    text = (tmp_path / "value.json").read_bytes().decode("utf-8")
    assert "Müller" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"name": "Müller", "numbers": [1, 2.5]}


# Several files in a folder that stays


def test_files_appear_in_a_folder_when_the_block_ends_beside_those_that_are_there(old_folder):
    (old_folder / "config.json").write_text("old")
    with whole_files(old_folder) as unfinished:
        (unfinished / "config.json").write_text("new")
        (unfinished / "part").mkdir()
        (unfinished / "part" / "code.py").write_text("code")
        assert (old_folder / "config.json").read_text() == "old"
    assert names(old_folder) == ["config.json", "old.txt", "part"]
    assert (old_folder / "config.json").read_text() == "new"
    assert names(old_folder / "part") == ["code.py"]


def test_an_error_leaves_the_old_files_and_nothing_else(old_folder):
    with pytest.raises(KeyboardInterrupt), whole_files(old_folder) as unfinished:
        (unfinished / "old.txt").write_text("half")
        raise KeyboardInterrupt
    assert names(old_folder) == ["old.txt"]
    assert (old_folder / "old.txt").read_text() == "old"


# Folders


@pytest.fixture
def old_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    return tmp_path / "out"


def test_a_folder_replaces_the_old_one_when_the_block_ends(old_folder):
    with whole_folder(old_folder) as unfinished:
        (unfinished / "new.txt").write_text("new")
        assert names(old_folder) == ["old.txt"]
    assert names(old_folder) == ["new.txt"]
    assert names(old_folder.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder_and_nothing_else(old_folder, error):
    with pytest.raises(error), whole_folder(old_folder) as unfinished:
        (unfinished / "new.txt").write_text("half")
        raise error
    assert names(old_folder) == ["old.txt"]
    assert names(old_folder.parent) == ["out"]


def test_a_kill_leaves_the_old_folder_and_the_next_writer_cleans_up(old_folder):
    kill_while_writing("folder", old_folder)
    assert names(old_folder) == ["old.txt"]
    assert names(old_folder.parent) == [f"{UNFINISHED}out", "out"]
    with whole_folder(old_folder) as unfinished:
        assert not names(unfinished)
    assert names(old_folder.parent) == ["out"]
    assert not names(old_folder)


@pytest.mark.usefixtures("umask")
def test_a_folder_has_the_permissions_of_the_umask(tmp_path):
    with whole_folder(tmp_path / "new" / "out"):
        pass
    assert mode(tmp_path / "new" / "out") == 0o750


def test_a_link_to_a_folder_stays_one(old_folder, tmp_path):
    (tmp_path / "link").symlink_to(old_folder)
    with whole_folder(tmp_path / "link") as unfinished:
        (unfinished / "new.txt").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert names(old_folder) == ["new.txt"]


def test_the_working_directory_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with whole_folder(".") as unfinished:
        (unfinished / "new.txt").write_text("new")
    assert names(tmp_path / "here") == ["new.txt"]


# What is in use


def test_a_folder_that_is_not_there_or_empty_can_be_used(tmp_path):
    assert require_unused(str(tmp_path / "new")) == tmp_path / "new"
    assert require_unused(tmp_path) == tmp_path
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["out", "out/old.txt"], ids=["folder", "file"])
def test_what_is_in_use_is_refused_with_the_option_to_change(old_folder, name):
    path = old_folder.parent / name
    with pytest.raises(UserError, match=f"^{path} exists and is not empty: choose another --folder, or delete it$"):
        require_unused(path, "--folder")
