"""Commands as processes: every verb lists its options, and what a process says and returns where it fails."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import push_subnet
import pytest
import run_distillation
import run_speech_recognition_ctc as ctc
from conftest import GOLDEN, tiny_model
from huggingface_hub import HfApi
from scripts import call, distillation, fails, finish_as_a_user, run

from lighthubert_training.cli import VERBS, main
from modeling_lighthubert.errors import run as run_command


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


def pushing(folder: Path, workshop: Path) -> dict[str, tuple[Callable[[], object], Sequence[object]]]:
    """The `main` of every script that pushes, and a command line that makes it push."""
    speech, hub, supernet = workshop / "speech.parquet", ("--push_to_hub", "--hub_model_id", "me/model"), folder / "in"
    model = ("--model_name_or_path", supernet)
    quiet = ("--max_steps", 1, "--use_cpu", "--report_to", "none", "--disable_tqdm", True)
    output = ("--output_dir", folder / "out")
    return {
        "distill": (run_distillation.main, distillation(workshop, "", *output, "--max_steps", 1, *hub)[1:]),
        "finetune": (ctc.main, (*model, "--train_file", speech, *output, *quiet, "--subnet", "smallest", *hub)),
        "push": (
            push_subnet.main,
            (*model, "--repo_id", "me/model", "--training_data", "Tones.", "--license", "mit", "--repeats", 1),
        ),
    }


@pytest.mark.parametrize("verb", ["distill", "finetune", "push"])
def test_a_hub_that_fails_at_the_end_is_one_line_and_exit_status_1(verb, workshop, tmp_path, monkeypatch, capfd):
    def create_repo(*_, **__):
        raise OSError("503 Service Unavailable for hf_secret")

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name in ("create_repo", "repo_info"):
        monkeypatch.setattr(HfApi, name, create_repo)
    tiny_model().save_pretrained(tmp_path / "in")
    main, words = pushing(tmp_path, workshop)[verb]
    with pytest.raises(SystemExit) as ended:
        call(lambda: run_command(main), verb, *words)
    assert ended.value.code == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: me/model could not be pushed (503 Service Unavailable for ***)")
    assert verb == "push" or (tmp_path / "out" / "model.safetensors").is_file()


def test_the_conversion_runs_as_a_module(tmp_path):
    (tmp_path / "space.json").write_text(json.dumps(json.loads((GOLDEN / "cases.json").read_text())["search_space"]))
    module = "modeling_lighthubert.convert_lighthubert_original_checkpoint_to_pytorch"
    files = ("--checkpoint_path", GOLDEN / "checkpoint.pt", "--search_space", tmp_path / "space.json")
    run("-m", module, *files, "--pytorch_dump_folder_path", tmp_path / "out", finish=finish_as_a_user)
    assert (tmp_path / "out" / "model.safetensors").is_file()
