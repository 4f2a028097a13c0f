"""The console command lists its verbs, finds what they run, and imports nothing heavy before one runs."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from lighthubert_training.cli import VERBS, find_script, main, usage


def command(*words: str) -> subprocess.CompletedProcess:
    """The finished command, in a process of its own."""
    line = [sys.executable, "-c", "from lighthubert_training.cli import main; main()", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_help_lists_each_verb_once_in_order():
    lines = [line.split()[0] for line in usage().splitlines() if line.startswith("  ")]
    assert lines == list(VERBS)
    assert command("--help").stdout == command().stdout == usage() + "\n"


def test_the_version_is_that_of_the_distribution():
    finished = command("--version")
    assert finished.stdout.startswith("lighthubert 0.")
    assert finished.returncode == 0


def test_an_unknown_verb_is_one_line_and_exit_status_2():
    finished = command("distil")
    assert finished.returncode == 2
    assert finished.stderr == f"error: lighthubert has no verb 'distil': choose from {', '.join(VERBS)}\n"


@pytest.mark.parametrize("name", VERBS)
def test_what_a_verb_runs_is_there(name):
    target = VERBS[name].target
    assert find_script(target).is_file() if target.endswith(".py") else find_spec(target)


def test_a_script_runs_as_main_under_the_name_of_its_verb(monkeypatch, tmp_path, capsys):
    script = tmp_path / "run_distillation.py"
    script.write_text(
        "import pickle, sys\nclass Here: ...\nprint(__name__, sys.argv, pickle.dumps(Here()) and 'pickled')"
    )
    monkeypatch.setattr("lighthubert_training.cli.find_script", lambda name: tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["/bin/lighthubert", "distill", "--seed", "1"])
    before = sys.modules["__main__"]
    main()
    assert capsys.readouterr().out == "__main__ ['lighthubert distill', '--seed', '1'] pickled\n"
    assert sys.modules["__main__"] is before


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(sys, "argv", ["lighthubert", "search", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "needs optuna, which is not installed: pip install" in capsys.readouterr().err


def test_the_command_imports_nothing_heavy():
    program = "import sys; sys.argv[1:] = []; from lighthubert_training.cli import main; main(); print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "transformers", "datasets", "modeling_lighthubert"} & set(modules)
