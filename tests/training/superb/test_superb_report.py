"""The table of scores: totals over tasks as the leaderboard and the papers have them."""

import csv
import json

import pytest

from lighthubert_training.superb.report import PUBLISHED, SCORED, rows_of, totals, write_report


KNOWN = json.loads(PUBLISHED.read_text())


def as_scores(row: dict[str, float]) -> dict[str, list[float]]:
    return {title: [value] for title, value in row.items()}


def test_the_mean_counts_errors_as_100_minus_error_and_slot_filling_once():
    # by hand, from the row of HuBERT Base
    parts = [100 - 5.41, 100 - 6.42, 96.30, 7.36, 81.42, 100 - 5.11, 100 - 5.88, 98.34, 64.92]
    found = totals(as_scores(KNOWN["models"]["HuBERT Base"]))
    assert found["mean"] == pytest.approx((sum(parts) + (88.53 + 100 - 25.20) / 2) / 10)
    assert found["overall"] == pytest.approx((sum(parts) + 88.53 + 100 - 25.20) / 11)
    assert "SUPERB score" not in found


@pytest.mark.parametrize(
    ("model", "score", "overall"),
    [
        ("HuBERT Base", 941, None),
        ("LightHuBERT stage 1", 959, None),
        ("LightHuBERT a_small", 901, 79.1),
        ("DistilHuBERT", 717, None),
        ("DPHuBERT", 866, None),
        ("DPWavLM", 926, 80.2),
        ("STaRHuBERT-L", 896, 79.8),
    ],
)
def test_published_rows_have_the_score_of_the_leaderboard_and_the_overall_of_the_papers(model, score, overall):
    found = totals(as_scores(KNOWN["models"][model]), KNOWN)
    assert round(found["SUPERB score"]) == score
    assert overall is None or round(found["overall"], 1) == overall


def test_the_superb_score_is_0_for_the_lowest_and_1000_for_the_highest():
    for end, expected in (("lowest", 0.0), ("highest", 1000.0)):
        assert totals(as_scores(KNOWN[end]), KNOWN)["SUPERB score"] == pytest.approx(expected)


def test_a_model_that_lacks_a_task_has_no_totals():
    scores = as_scores(KNOWN["models"]["HuBERT Base"])
    assert totals({title: scores[title] for title in SCORED[:-1]}, KNOWN) == {}
    header, rows = rows_of({"mine": {"KS": [90.0]}}, published=False)
    assert (header, rows) == (["model", "KS ↑", "mean", "overall"], [["mine", "90.00", "", ""]])


def write_result(folder, model: str, task: str, seed: int, variant: str | None, **test: float) -> None:
    file = folder / model / task / f"seed-{seed}/result.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"model": model, "task": task, "seed": seed, "variant": variant, "test": test}))


def test_the_table_has_means_and_deviations_over_seeds_in_percent(tmp_path):
    for seed, accuracy in ((0, 0.5), (1, 0.75)):
        write_result(tmp_path, "one", "ks", seed, "stand_in", accuracy=accuracy)
    write_result(tmp_path, "one", "asr", 0, "stand_in", wer=0.1, wer_lm=0.0625)
    write_result(tmp_path, "two", "ks", 0, "stand_in", accuracy=0.25)
    write_result(tmp_path, "two", "ks", 1, None, accuracy=0.125)
    table = write_report(tmp_path, "stand_in", published=False)
    lines = ["| model | ASR ↓ | ASR, LM ↓ | KS ↑ | mean | overall |", "| --- | --- | --- | --- | --- | --- |"]
    lines += ["| one | 10.00 | 6.25 | 62.50 ± 17.68 |  |  |", "| two |  |  | 25.00 |  |  |"]
    assert table.splitlines() == lines
    assert (tmp_path / "table.md").read_text() == table + "\n"
    with (tmp_path / "table.csv").open() as file:
        assert [row["KS ↑"] for row in csv.DictReader(file)] == ["62.50 ± 17.68", "25.00"]
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_published_rows_stand_beside_what_was_measured_on_superbs_own_data(tmp_path):
    write_result(tmp_path, "mine", "ks", 0, None, accuracy=0.5)
    header, _, *rows = (line.split(" | ") for line in write_report(tmp_path, None, published=True).splitlines())
    assert [row[0] for row in rows] == [f"| {name} (published)" for name in KNOWN["models"]] + ["| mine"]
    small = next(dict(zip(header, row)) for row in rows if "a_small" in row[0])
    assert {small[title] for title in ("PR ↓", "ASR ↓", "overall")} == {"6.60", "8.33", "79.1"}
    assert small["SUPERB score |"].startswith("901.2")
