"""Commands as processes: every verb lists its options, and what a process says and returns where it fails."""

import json
import sys

import pytest
from conftest import GOLDEN
from scripts import fails, finish_as_a_user, run

from lighthubert_training.cli import VERBS, main


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_lists_its_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lighthubert", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(f"usage: lighthubert {name} ")


def test_a_mistake_is_one_line_of_the_process_and_exit_status_2(tmp_path):
    command = ("-m", "modeling_lighthubert.export", "--model_name_or_path", tmp_path / "nowhere")
    message = fails(*command, "--output_dir", tmp_path / "out", finish=finish_as_a_user)
    assert message == (
        f"error: {tmp_path / 'nowhere'} does not exist: give the folder of a checkpoint, or its name on the Hub\n"
    )


BUG = """
from modeling_lighthubert.errors import run

def main():
    print("so far")
    raise KeyError("bug")

run(main)
"""


def test_a_bug_is_the_traceback_of_the_process_and_exit_status_1(tmp_path):
    (tmp_path / "bug.py").write_text(BUG)
    finished = finish_as_a_user(tmp_path / "bug.py")
    assert (finished.returncode, finished.stdout) == (1, "so far\n")
    assert finished.stderr.startswith("Traceback (most recent call last):")
    assert finished.stderr.endswith("KeyError: 'bug'\n")


def test_the_conversion_runs_as_a_module(tmp_path):
    (tmp_path / "space.json").write_text(json.dumps(json.loads((GOLDEN / "cases.json").read_text())["search_space"]))
    module = "modeling_lighthubert.convert_lighthubert_original_checkpoint_to_pytorch"
    files = ("--checkpoint_path", GOLDEN / "checkpoint.pt", "--search_space", tmp_path / "space.json")
    run("-m", module, *files, "--pytorch_dump_folder_path", tmp_path / "out", finish=finish_as_a_user)
    assert (tmp_path / "out" / "model.safetensors").is_file()
