"""Benchmarks at the paper's size say what was measured, and read the recipe that they name."""

import pytest
import torch
from tiny_bench import benchmarks_on_the_path, load  # noqa: F401


def of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_training_is_made_of_times_and_flop():
    found = {
        "batch_size": 10,
        "clip_seconds": 20.0,
        "precision": "bf16",
        "memory": 12e9,
        "memory_compiled": 11e9,
        "seconds_to_compile": 30.0,
        "waits": 2,
        "told": {"peak": 13e9},
        "product_flops": 8e12,
        "times": {"as drawn": [0.4, 0.5, 0.6], "largest": [1.0, 1.0, 2.0], "largest, compiled": [0.5, 0.5, 1.0]}
        | {"product": [0.01, 0.01, 0.02]},
        "flops": {"as drawn": [80e12, 80e12, 90e12], "largest": [100e12] * 3, "largest, compiled": [100e12] * 3},
    }
    text = load("paper_size").training_table(found)
    drawn, largest, compiled = map(of, text.splitlines()[2:5])
    assert drawn == ["as drawn", "500", "400", "160", "20%", "16%", "1.00"]
    assert largest == ["largest", "1000", "200", "100", "12%", "10%", "1.00"]
    assert compiled == ["largest, compiled", "500", "400", "200", "25%", "20%", "2.00"]
    assert "800 TFLOP/s" in text
    assert "12.00 GB, 13.00 GB are told" in text
    assert "11.00 GB" in text
    assert "waits 2 times" in text


def test_the_table_of_inference_compares_with_hubert_base_at_the_same_batch_size():
    found = {
        "dtype": "bfloat16",
        "clip_seconds": 10.0,
        "product_flops": 1e12,
        "gigamacs": {"stock HuBERT Base": 50.0, "a_small": 20.0},
        "times": {8: {"stock HuBERT Base": [0.2, 0.2], "a_small": [0.1, 0.1], "product": [0.01, 0.01]}},
        "memory": {8: {"stock HuBERT Base": 2e9, "a_small": 1e9}},
    }
    stock, small = map(of, load("paper_size").inference_table(found).splitlines()[2:])
    assert stock == ["stock HuBERT Base", "8", "200.0", "400", "40%", "1.00", "2.00"]
    assert small == ["a_small", "8", "100.0", "800", "32%", "2.00", "1.00"]


def test_hours_of_a_search_are_those_of_its_evaluations():
    found = {"waits": 3, "num_batches": 8, "first_stage": [9.0, 9.0, 30.0], "all_stages": [36.0, 36.0, 90.0]}
    told = load("paper_size").search_report(found, 10.0)
    assert "9 s for the first stage, 36 s for all; between 0.5 and 2 hours for 200" in told
    assert "3 waits for the GPU" in told


def test_a_recipe_is_measured_as_published_but_for_what_is_asked():
    paper_size = load("paper_size")
    arguments, objective = paper_size.read_recipe(paper_size.PaperSizeArguments(batch_seconds=17.5))
    assert arguments.per_device_train_batch_seconds == 17.5
    assert (arguments.search_space, arguments.mixed_precision, arguments.teacher_dtype) == (
        "small",
        "bf16",
        "bfloat16",
    )
    assert objective.mask_time_prob == 0.65


def test_a_device_other_than_a_gpu_is_never_waited_for():
    assert load("paper_size").count_waits(lambda: torch.zeros(1).item(), torch.device("cpu")) is None


def test_memory_is_what_was_alive_at_once():
    kept = []

    def run() -> None:
        kept.append(torch.zeros(1000))
        torch.zeros(5000)

    assert load("processes").peak_memory(run, torch.device("cpu")) == pytest.approx(24_000, rel=0.01)


def test_the_table_of_whole_runs_says_whether_a_killed_run_went_on_to_the_same_weights():
    found = {"device": "CPU, 2 threads", "batch_seconds": 87.5, "audio_seconds_per_second": 2.5, "gb": 11.0}
    runs = {"plain": found | {"same_weights": True}, "torn": found | {"same_weights": False}, "whole": found}
    lines = [of(line) for line in load("full_runs").table(runs).splitlines()[2:]]
    assert lines[0] == ["plain", "CPU, 2 threads", "87.5 s", "2.5", "11.00", "yes"]
    assert [line[-1] for line in lines] == ["yes", "no", ""]


def test_the_cost_of_superb_follows_from_hours_widths_and_rates():
    cost = load("superb_cost")
    assert cost.gigabytes("pr", "stock HuBERT Base") == pytest.approx(111.4 * 3600 * 50 * 13 * 768 * 2 / 1e9)
    assert cost.seconds_of_audio("pr", kept=True) == pytest.approx(111.4 * 3600)
    mean = 100.6 * 3600 / 28_539
    assert cost.seconds_of_audio("pr", kept=False) == pytest.approx(100_000 * 32 * mean + 100 * 5.4 * 3600)
    assert cost.seconds_of_audio("sid", kept=False) == pytest.approx(200_000 * 32 * 8 + 50 * 17.5 * 3600), "cropped"
    times = {name: [0.2, 0.1, 0.1] for name in cost.MODELS}
    lines = cost.table({"times": {"8": times}, "clip_seconds": 10.0}, 8).splitlines()
    assert "stock HuBERT Base (800 s of audio a second)" in lines[0]
    assert of(lines[2])[:2] == ["pr", f"400 GB, {111.4 / 800:.2g} h; 15 h"]
