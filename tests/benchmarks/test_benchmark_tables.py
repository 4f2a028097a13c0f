"""The tables and findings of benchmarks say what was measured."""

import pytest
from tiny_bench import benchmarks_on_the_path, load  # noqa: F401


def test_a_summary_is_mean_and_deviation():
    summary = load("comparisons").summary
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


def test_a_margin_says_whether_all_seeds_agree():
    margin = load("comparisons").margin
    better = margin({"0": 0.3, "1": 0.25}, {"0": 0.2, "1": 0.2, "2": 0.9}, "r2")
    assert better.gains == pytest.approx([0.1, 0.05])
    assert better.relative == pytest.approx(0.375)
    assert better.verdict == 1
    assert margin({"0": 0.3, "1": 0.2}, {"0": 0.2, "1": 0.3}, "wer, 1 min").verdict == 0
    assert margin({"0": 0.3}, {"0": 0.2}, "wer, 1 min").verdict == -1, "more errors are worse"
    assert margin({"0": 0.3}, {"1": 0.2}, "r2") is None
    assert margin({"0": 0.1}, {"0": -0.1}, "r2").relative == pytest.approx(2), "R2 below 0 is worse"


def test_the_table_of_gains_has_every_seed_and_the_findings_say_in_how_many_measures_it_is_better():
    gains = load("gains")

    def made(row: str, **measures: float) -> dict:
        return {row: measures}

    results = {
        "teacher": {"0": made("teacher", r2=0.5)},
        "distilled once for all": {
            "0": made("smallest", r2=0.4, per=0.3, wer=0.5),
            "1": made("smallest", r2=0.5, per=0.4, wer=0.7),
        },
        "smallest, slice of the teacher": {
            "0": made("smallest", r2=0.3, per=0.35, wer=0.4),
            "1": made("smallest", r2=0.3, per=0.45, wer=0.6),
        },
    }
    of_means = gains.overview(results, ["r2", "per"]).splitlines()
    assert of_means[0] == "|  | r2 | per |"
    assert of_means[2:4] == ["| teacher | 0.500 |  |", "| smallest, distilled once for all | 0.450 | 35.0 |"]
    assert gains.table(results, "smallest", ["r2", "per", "wer"]).splitlines() == [
        "|  | teacher | distilled once for all | slice of the teacher |",
        "| --- | --- | --- | --- |",
        "| r2 | 0.500 (0.500) | 0.450 (0.400 0.500) | 0.300 |",
        "| per |  | 35.0 (30.0 40.0) | 40.0 (35.0 45.0) |",
        "| wer |  | 60.0 (50.0 70.0) | 50.0 (40.0 60.0) |",
    ]
    (finding,) = gains.findings(results, ["r2", "per", "wer"])
    assert "against slice of the teacher: better in the mean in 2 of 3 measures, and in every seed in 2" in finding
    assert finding.endswith("worse in every seed in wer; errors in the mean: 12% fewer per, 20% more wer")


def test_the_table_of_recipes_has_what_was_run():
    def made(r2: float) -> dict:
        return {name: {"r2": r2} for name in ("largest", "middle", "smallest")}

    results = {"recipe": {"0": made(0.2), "1": made(0.4)}, "no masks": {"0": made(0.5)}}
    assert load("learning").table(results).splitlines()[2:] == [
        "| recipe | 0.300 ± 0.141 | 0.300 ± 0.141 | 0.300 ± 0.141 |",
        "| no masks | 0.500 | 0.500 | 0.500 |",
    ]


def test_the_table_of_narrow_feature_encoders_has_cost_and_quality_of_each_subnet():
    row = {"r2": 0.27, "digit": 0.86, "macs": 5e6, "steps": 3}
    better = row | {"r2": 0.29}
    results = {
        "controls": {"0": {"smallest, slice": {"r2": 0.2, "digit": 0.9, "macs": 9e6}}},
        "from a half, ordered": {"0": {"within 40 %": row}, "1": {"within 40 %": better}},
    }
    header, _, control, subnet = load("narrow_feature_encoder").table(results).splitlines()
    assert header == "|  | subnet | steps | MMAC/s | r2 | digit |"
    assert control == "| controls | smallest, slice |  | 9.0 | 0.200 | 90.0 |"
    assert subnet == "| from a half, ordered | within 40 % | 3 | 5.0 | 0.280 ± 0.014 | 86.0 ± 0.0 |"


def test_once_for_all_is_compared_with_each_subnet_alone():
    asr = load("asr")

    def made(seconds: float, **wer: float) -> dict:
        row = {"training_seconds": seconds}
        return {name: row | {"wer": rate, "cer": rate / 2} for name, rate in wer.items()}

    results = {
        "once for all": {"0": made(40, smallest=0.3, middle=0.2, random_0=0.22)},
        "smallest alone": {"0": made(10, smallest=0.25)},
        "middle alone": {"0": made(10, middle=0.21)},
    }
    lines = asr.table(results, ["smallest", "middle", "random_0"]).splitlines()
    assert lines[2] == "| smallest | 25.0 | 30.0 |  | 12.5 | 15.0 |"
    assert lines[4] == "| random, mean |  | 22.0 |  |  | 11.0 |"
    of_all, _ = asr.margins(results, ["smallest", "middle", "random_0"])
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


def test_error_rates_are_known_by_their_names():
    is_error = load("comparisons").is_error
    assert all(map(is_error, ("wer, 1 min", "per, held-out language", "sf cer, people")))
    assert not any(map(is_error, ("r2", "ks accuracy, people", "sf f1, people", "digit")))
