"""Imports run downwards: from jobs to the ground floor, from there to the library, and never sideways."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "training" / "lighthubert_training"
JOBS = ("distillation", "recognition", "search", "superb")
GROUND_FLOOR = (
    *("runs", "error_rates", "decoding", "sampling", "models", "data", "probing", "cards"),  # lowest first
)
SHARED = ("common", "comparisons", "ctc", "measures", "processes", "recordings", "rivals", "runner", "shapes")
"""Modules that benchmarks share."""
SCRIPTS = {file.stem for folder in ("training", "demo", "benchmarks") for file in (ROOT / folder).glob("*.py")}


def imported(source: str) -> Iterator[str]:
    """Full names of the modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module)


def complaint(name: str, part: str | None) -> str | None:
    """Why a file may not import `name`.

    Args:
        part: of the training package that the file lies in: a job, or a part of the ground floor; `None` for
            scripts, the demonstration and benchmarks.
    """
    if name.startswith("."):
        return "a relative import"
    top, _, rest = name.partition(".")
    if top in SCRIPTS and (top not in SHARED or part is not None):
        return "a script"
    if part is None or top != "lighthubert_training" or not rest:
        return None
    target = rest.partition(".")[0]
    if target in JOBS and target != part:
        return "another job" if part in JOBS else "a job, from the ground floor"
    if target in GROUND_FLOOR and part in GROUND_FLOOR and GROUND_FLOOR.index(target) > GROUND_FLOOR.index(part):
        return "what lies above"
    return None


FILES = [
    *(file for file in PACKAGE.rglob("*.py") if file.name not in ("__init__.py", "cli.py")),
    *(file for folder in ("training", "demo", "benchmarks", "model_cards") for file in (ROOT / folder).glob("*.py")),
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downwards(file):
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py") if file.is_relative_to(PACKAGE) else None
    assert part is None or part in (*JOBS, *GROUND_FLOOR)
    found = {name: complaint(name, part) for name in imported(file.read_text())}
    assert not {name: reason for name, reason in found.items() if reason}


def test_no_file_edits_the_path_of_imports():
    banned = ("sys.path", "noqa: " + "E402")  # in two parts, so that a search of the repository finds nothing
    assert not [file for file in FILES if any(text in file.read_text() for text in banned)]


@pytest.mark.parametrize("file", sorted((ROOT / "modeling_lighthubert").glob("*.py")), ids=lambda file: file.name)
def test_the_library_knows_nothing_of_training(file):
    assert not [name for name in imported(file.read_text()) if name.startswith("lighthubert_training")]


@pytest.mark.parametrize(
    ("source", "part", "reason"),
    [
        ("import lighthubert_training.recognition.data", "search", "another job"),
        ("from lighthubert_training import superb", "search", "another job"),
        ("def f():\n    from lighthubert_training.search import ledger", "runs", "a job, from the ground floor"),
        ("from lighthubert_training.data.audio import duration", "runs", "what lies above"),
        ("import run_distillation", "search", "a script"),
        ("from run_demo import plot", None, "a script"),
        ("from .. import runs", "search", "a relative import"),
        ("from lighthubert_training.runs import files", "data", None),
        ("from common import table", None, None),
    ],
)
def test_what_is_not_allowed_is_noticed(source, part, reason):
    assert reason in {complaint(name, part) for name in imported(source)}
