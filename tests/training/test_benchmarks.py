"""Every benchmark can be imported and lists its options; what common.py and the tables compute is right. No benchmark
is run."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from modeling_lighthubert.errors import UserError


FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """Scripts find `common` beside them; here their folder is on the path, last, while this module is tested."""
    sys.path.append(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    sys.path.remove(str(FOLDER))
    for name in [name for name in sys.modules if name == "common" or name.startswith("benchmark_")]:
        del sys.modules[name]
    torch.set_num_threads(threads)


def load(name: str) -> ModuleType:
    """A benchmark as a module, by its path: some are called like modules of others."""
    if name == "common":
        return importlib.import_module("common")
    module = f"benchmark_{name}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, FOLDER / f"{name}.py")
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "common"])
def test_a_benchmark_lists_its_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        load(name).main()
    assert ended.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


def test_results_are_kept_and_no_run_is_made_twice(tmp_path):
    common, made, file = load("common"), [], tmp_path / "results.json"

    def work(name: str, seed: int) -> dict[str, int]:
        made.append((name, seed))
        if name == "broken":
            raise RuntimeError("it failed")
        return {"r2": seed}

    with pytest.raises(RuntimeError, match="it failed"):
        common.run_all(file, [("one", 0), ("broken", 0)], work)
    assert json.loads(file.read_text()) == {"one": {"0": {"r2": 0}}}
    assert common.run_all(file, [("one", 0), ("one", 1)], work) == {"one": {"0": {"r2": 0}, "1": {"r2": 1}}}
    assert sorted(made) == [("broken", 0), ("one", 0), ("one", 1)]


def test_scripts_get_their_options_and_leave_a_log(tmp_path):
    (tmp_path / "script.py").write_text("import sys\n\nprint(sys.argv[1:])\n")
    load("common").run_script(tmp_path / "script.py", seed=3, subnet=None, output_dir=tmp_path)
    assert (tmp_path / "run.log").read_text() == f"['--seed=3', '--output_dir={tmp_path}']\n"


def test_a_script_that_fails_says_why(tmp_path):
    run_script = load("common").run_script
    (tmp_path / "refuses.py").write_text(
        "import sys\n\nprint('error: --seed 3 is odd', file=sys.stderr)\nsys.exit(2)\n"
    )
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="^--seed 3 is odd$"):
        run_script(tmp_path / "refuses.py", seed=3, output_dir=tmp_path)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_script(tmp_path / "breaks.py", output_dir=tmp_path)


def test_batches_for_a_distillation_loss_have_an_item_for_each_recording():
    audio = torch.randn(3, 800)
    (batch,) = load("common").to_distil([{"input_values": audio, "attention_mask": torch.ones(3, 800)}])
    assert set(batch) == {"input_values", "attention_mask", "teacher_input_values", "items"}
    assert batch["teacher_input_values"] is audio
    assert batch["items"].tolist() == [[0, 0], [0, 1], [0, 2]]


def test_noise_is_the_same_and_of_unit_variance():
    common = load("common")
    audio = common.noise(2, 0.5)
    assert audio.shape == (2, 8000)
    assert (audio == common.noise(2, 0.5)).all()
    assert audio.std() == pytest.approx(1, abs=0.05)


def test_the_most_memory_is_no_less_than_what_is_held():
    common = load("common")
    assert 10 < common.process_memory("VmRSS") <= common.process_memory("VmHWM")


def test_a_summary_is_mean_and_deviation():
    summary = load("common").summary
    assert summary([0.25, 0.75], percent=True) == "50.0 ± 35.4"
    assert summary([0.25], percent=False) == "0.250"
    assert summary([], percent=False) == ""


def test_runs_of_the_demonstration_are_summed_up_as_mean_and_range():
    demo_seeds = load("demo_seeds")
    assert demo_seeds.summary([0.324, 0.331, 0.318], percent=False) == "0.324 (0.318-0.331)"
    assert demo_seeds.summary([0.88, 0.88], percent=True) == "88.0%"
    runs = [
        {
            "models": [{"model": "teacher", "parameters": 1234, "macs": 5e6, "r2": r2}],
            "ctc": [{"model": "middle", "wer": wer, "cer": 0.1}],
        }
        for r2, wer in ((0.4, 0.2), (0.5, 0.4))
    ]
    models, ctc = (part.splitlines()[-1] for part in demo_seeds.tables(runs).split("\n\n"))
    assert models == "| teacher | 1,234 | 5.0 | 0.450 (0.400-0.500) |"
    assert ctc == "| middle | 30.0% (20.0-40.0) | 10.0% |"


def learnt(**r2: float) -> dict[str, dict[str, float]]:
    return {name.replace("_", " "): {"r2": value} for name, value in r2.items()}


CONTROLS = learnt(teacher=0.2, largest=0.2)
CONTROLS |= {f"{name}, {kind}": {"r2": 0.1} for name in ("largest", "middle", "smallest")
             for kind in ("slice of the teacher", "random weights")}  # fmt: skip


def test_the_table_of_recipes_has_controls_and_what_was_run():
    results = {
        "controls": {"0": CONTROLS, "1": CONTROLS},
        "recipe": {seed: learnt(largest=r2, middle=r2, smallest=r2) for seed, r2 in (("0", 0.2), ("1", 0.4))},
        "smallest alone": {"0": learnt(smallest=0.5)},
    }
    lines = load("learning").tables(results).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| teacher", "| slice of the teacher", "| random weights", "| recipe", "| smallest alone",
    ]  # fmt: skip
    assert lines[2] == "| teacher | 0.200 ± 0.000 | 0.200 ± 0.000 | 0.200 ± 0.000 |"
    assert lines[5] == "| recipe | 0.300 ± 0.141 | 0.300 ± 0.141 | 0.300 ± 0.141 |"
    assert lines[6] == "| smallest alone |  |  | 0.500 |"


def test_the_table_of_narrow_feature_encoders_has_cost_and_quality_of_each_subnet():
    row = {"r2": 0.27, "digit": 0.86, "macs": 5e6, "steps": 3}
    better = row | {"r2": 0.29}
    results = {
        "controls": {"0": {"teacher": {"r2": 0.2, "digit": 0.9, "macs": 9e6}}},
        "from a half, ordered": {"0": {"within 40 %": row}, "1": {"within 40 %": better}},
    }
    header, _, teacher, subnet = load("narrow_feature_encoder").table(results).splitlines()
    assert header == "|  | subnet | steps | MMAC/s | R2 | digit |"
    assert teacher == "| controls | teacher |  | 9.0 | 0.200 | 90.0 |"
    assert subnet == "| from a half, ordered | within 40 % | 3 | 5.0 | 0.280 ± 0.014 | 86.0 ± 0.0 |"


def test_once_for_all_is_compared_with_each_subnet_alone():
    asr = load("asr")

    def run(seconds: float, **wer: float) -> dict:
        return {"seconds": seconds} | {name: {"wer": rate, "cer": rate / 2} for name, rate in wer.items()}

    results = {
        "supernet": {"0": None},
        "once for all": {"0": run(40, smallest=0.3, middle=0.2, random_0=0.22)},
        "smallest alone": {"0": run(10, smallest=0.25)},
        "middle alone": {"0": run(10, middle=0.21)},
        "middle from random weights": {"0": run(10, middle=0.84)},
    }
    lines = asr.table(results, ["smallest", "middle", "random_0"]).splitlines()
    assert lines[2] == "| smallest | 25.0 | 30.0 |  |  | 12.5 | 15.0 |  |"
    assert lines[4] == "| random, mean |  | 22.0 |  |  |  | 11.0 |  |"
    of_control, of_all, _ = asr.margins(results, ["smallest", "middle", "random_0"])
    assert "0.25 of its word errors" in of_control
    assert "+2.0 points of WER against 2 subnets alone in the mean, +5.0 at most (smallest); 2.00 of" in of_all
    assert of_all.endswith("4.0 times that of one")


def test_a_task_is_won_in_every_seed_or_in_the_mean():
    benchmark = load("superb")
    first = {"PR": 50.0, "ASR": 50.0, "KS": 50.0, "QbE": 50.0, "SID": 50.0, "ASV": 50.0, "SD": 50.0, "IC": 50.0}
    control = {title: [value, value] for title, value in (first | {"SF F1": 50.0, "ER": 50.0}).items()}
    model = control | {"PR": [40.0, 45.0], "KS": [49.0, 60.0], "ER": [40.0, 59.0]}
    scores = {"random weights": control, "supernet": model}
    assert benchmark.tasks_won(scores, "supernet") == (["PR"], ["PR", "KS"])


def test_a_search_sums_up_what_it_found():
    search = load("search")
    results = {
        "fronts": [{"random": 0.7, "nsga2": 0.8}, {"random": 0.8, "nsga2": 0.7}],
        "sized": [{"found": 0.4, "uniform": 0.5, "parameters": 0.99, "macs": 1.0}],
        "timed": {"minutes": 2.0, "evaluation over forward passes": 1.01, "search over evaluations": 1.02},
        "num_timed": 100,
    }
    assert search.table(results).splitlines()[-1] == "| found |  | 0.400 |"
    fronts, sized, _ = search.findings(results)
    assert "in 1 of 2 seeds" in fronts
    assert "in 1 of 1 seeds" in sized
