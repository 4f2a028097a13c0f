"""Every verb of the console command says what it takes, under its own name."""

import subprocess
import sys

import pytest

from lighthubert_training.cli import VERBS


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_lists_its_options(name):
    line = [sys.executable, "-c", "from lighthubert_training.cli import main; main()", name, "--help"]
    finished = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.startswith(f"usage: lighthubert {name} ")
