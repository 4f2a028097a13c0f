"""Runs of a benchmark are made once and kept with what they depend on."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from scripts import fails, finish_as_a_user, run
from tiny_bench import FOLDER, benchmarks_on_the_path, load, tiny_bench_arguments  # noqa: F401
from transformers import HubertModel

from modeling_lighthubert import SearchSpace
from modeling_lighthubert.errors import UserError


@pytest.fixture
def bench_arguments(tmp_path):
    return tiny_bench_arguments(tmp_path)


def test_runs_are_made_once_and_kept_with_their_options(bench_arguments):
    options = {name: value for name, value in asdict(bench_arguments).items() if value is not None}
    options |= {"only": "smallest, DistilHuBERT's way", "measures": "r2"}
    words = [f"--{name}={value[0] if isinstance(value, list) else value}" for name, value in options.items()]
    assert "1 runs" in run(FOLDER / "gains.py", *words, finish=finish_as_a_user)
    kept = Path(bench_arguments.results_file).read_text()
    name = "smallest, DistilHuBERT's way"
    made = json.loads(kept)["results"][name]["0"]["smallest"]
    assert {"r2", "r2 of masked frames"} <= set(made)
    runner = load("runner").Runner(load("gains").Gains, replace(bench_arguments, only=None, measures=["r2"]))
    assert runner.hours([runner.job(name, 1)]) == runner.seconds[name]["0"]["r2"] / 7200
    assert "runs, about" not in run(FOLDER / "gains.py", *words)
    assert Path(bench_arguments.results_file).read_text() == kept
    run(FOLDER / "gains.py", *words, "--measures", "r2", "probes", finish=finish_as_a_user)
    with_probes = json.loads(Path(bench_arguments.results_file).read_text())["results"][name]["0"]["smallest"]
    assert made.items() < with_probes.items(), "what was measured before is kept"
    assert "digit" in with_probes
    assert "has results with another passes" in fails(FOLDER / "gains.py", *words, "--passes=3")


@pytest.mark.parametrize(
    ("module", "table", "options"),
    [
        ("gains", "Gains", "BenchArguments"),
        ("learning", "Learning", "LearningArguments"),
        ("passes", "Passes", "PassesArguments"),
        ("teachers", "Teachers", "TeachersArguments"),
        ("narrow_feature_encoder", "NarrowFeatureEncoders", "NarrowArguments"),
        ("asr", "Recognition", "RecognitionArguments"),
        ("cascade", "Cascades", "CascadeArguments"),
    ],
)
def test_the_hours_of_all_runs_are_told_beforehand(bench_arguments, module, table, options):
    bench = load(module)
    arguments = getattr(bench, options)(**asdict(bench_arguments) | {"measures": ["r2"], "passes": 1200})
    runner = load("runner").Runner(getattr(bench, table), arguments)
    jobs = [runner.job(name, 0) for name in runner.kind.names(arguments)]
    assert all(runner.hours([job]) > 0 for job in jobs)
    assert 0.01 < runner.hours(jobs) < 48


def test_a_cascade_is_tested_on_recordings_that_did_not_choose_its_threshold(bench_arguments, monkeypatch):
    module, added = load("cascade"), []
    options = asdict(bench_arguments) | {"measures": [], "steps": 2, "repeats": 1}
    cascades = module.Cascades(module.CascadeArguments(**options))
    add = module.Calibration.add
    monkeypatch.setattr(module.Calibration, "add", lambda self, *given: (added.append(given[1]), add(self, *given)))
    rows = cascades.run("prompts", 0)
    assert list(rows) == list(module.CASCADES)
    chosen_on, tested_on = added[:2]
    assert (len(chosen_on), len(tested_on)) == (6, 6)
    for row in rows.values():
        shares, errors = zip(*row["curve"])
        assert 0 < shares[0] < 1 and list(shares) == sorted(shares)
        assert shares[0] <= row["share of macs"] <= shares[-1] + 1e-6
        assert errors[0] == pytest.approx(row["wer, first"]) and row["share of time"] > 0
    table = module.table({"prompts": {"0": rows}})
    assert table.splitlines()[2].startswith("| prompts: smallest,largest | ")


def test_runs_of_another_teacher_in_the_same_folder_are_others(bench_arguments):
    runner, gains = load("runner"), load("gains").Gains(bench_arguments)
    runner.Runner(load("gains").Gains, bench_arguments).keep(runner.Job("teacher", 0, ("r2",)), 1.0, {})
    first = gains.distil(0)
    teacher = HubertModel.from_pretrained(bench_arguments.teacher_name_or_path)
    teacher.encoder.layer_norm.bias.data += 1.0
    teacher.save_pretrained(bench_arguments.teacher_name_or_path)
    assert load("gains").Gains(bench_arguments).distil(0) != first
    with pytest.raises(UserError, match="has results with another teacher_weights"):
        runner.Runner(load("gains").Gains, bench_arguments)


def test_runs_of_another_search_space_under_the_same_name_are_others(bench_arguments):
    module = load("gains")
    runner = load("runner").Runner(module.Gains, bench_arguments)
    runner.keep(load("runner").Job("teacher", 0, ("r2",)), 1.0, {})
    first = module.Gains(bench_arguments).distil(0, student_name_or_path=None)
    SearchSpace((24, 32), (2, 4), (1, 2), (2, 3), head_dim=8).to_json_file(bench_arguments.search_space)
    assert module.Gains(bench_arguments).distil(0, student_name_or_path=None) != first
    with pytest.raises(UserError, match="has results with another search_space"):
        load("runner").Runner(module.Gains, bench_arguments)


def test_a_run_that_fails_ends_the_benchmark_and_the_others_are_kept(bench_arguments):
    options = {name: value for name, value in asdict(bench_arguments).items() if value not in (None, [])}
    words = [f"--{name}={value[0] if isinstance(value, list) else value}" for name, value in options.items()]
    Path(bench_arguments.output_dir).mkdir()
    Path(bench_arguments.output_dir, "distilled").write_text("a file where a folder has to be made")
    runs = ("smallest, distilled alone", "smallest, random weights")
    done = subprocess.run(
        [sys.executable, FOLDER / "gains.py", *words, "--measures=r2", "--only", *runs], capture_output=True, text=True
    )
    assert done.returncode and "distilled" in done.stderr
    assert list(json.loads(Path(bench_arguments.results_file).read_text())["results"]) == [runs[1]]


def test_an_unknown_run_is_named(bench_arguments):
    bench_arguments.only = ["largest, by magic"]
    with pytest.raises(UserError, match="--only largest, by magic: choose from 'distilled once for all'"):
        load("runner").Runner(load("gains").Gains, bench_arguments)()
