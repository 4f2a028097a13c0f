"""SUPERB's table of scores: Markdown, CSV and a plot; with the published rows if the data are SUPERB's own."""

import csv
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lighthubert_training.runs.plots import new_figure, save_figure
from lighthubert_training.runs.tables import markdown_table, mean_and_deviation
from lighthubert_training.superb.recipes import RECIPES
from modeling_lighthubert.files import whole_file, write_text


logger = logging.getLogger(__name__)
COLUMNS = {
    ("pr", "per"): ("PR", False),
    ("asr", "wer"): ("ASR", False),
    ("asr", "wer_lm"): ("ASR, LM", False),
    ("ks", "accuracy"): ("KS", True),
    ("qbe", "mtwv"): ("QbE", True),
    ("sid", "accuracy"): ("SID", True),
    ("asv", "eer"): ("ASV", False),
    ("sd", "der"): ("SD", False),
    ("ic", "accuracy"): ("IC", True),
    ("sf", "slot_f1"): ("SF F1", True),
    ("sf", "slot_value_cer"): ("SF CER", False),
    ("er", "accuracy"): ("ER", True),
}
"""Title of each metric of a task, and whether higher is better."""
TITLES = dict(COLUMNS.values())
SCORED = [title for title in TITLES if title != "ASR, LM"]
"""The eleven metrics of ten tasks that totals are of; slot filling has two."""
PUBLISHED = RECIPES / "published.json"

Scores = Mapping[str, Sequence[float]]
"""Of a model: values in percent by title, one for each seed."""


def read_result(file: Path) -> dict[str, Any] | None:
    """A result; `None` of a damaged file, which is named: its run is to be repeated."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if {"task", "model", "variant", "test"} <= result.keys():
            return result
        reason = "it holds no result"
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error)
    logger.warning(f"{file} is damaged ({reason}): it counts as missing")
    return None


def read_scores(output_dir: Path, variant: str | None) -> dict[str, dict[str, list[float]]]:
    """Scores of each model, in the order of their names."""
    found: dict[str, dict[str, list[float]]] = {}
    for file in sorted(output_dir.glob("*/*/seed-*/result.json")):
        if (result := read_result(file)) is None or result["variant"] != variant:
            continue
        for (task, metric), (title, _) in COLUMNS.items():
            if result["task"] == task and metric in result["test"]:
                found.setdefault(result["model"], {}).setdefault(title, []).append(100 * result["test"][metric])
    return found


def higher_is_better_score(title: str, value: float) -> float:
    """Score in percent, higher is better: error rates become 100 - error."""
    return value if TITLES[title] else 100 - value


def mean_over_tasks(values: Mapping[str, float]) -> float:
    """Mean of the values of `SCORED` over the ten tasks: slot filling counts once, by the mean of its two metrics."""
    slots = (values["SF F1"] + values["SF CER"]) / 2
    return statistics.mean([*(values[title] for title in SCORED if not title.startswith("SF ")), slots])


def superb_score(means: Mapping[str, float], lowest: Mapping[str, float], highest: Mapping[str, float]) -> float:
    """The leaderboard's score (arXiv 2210.08634): 1000 times the mean over tasks of the position of a value
    between `lowest` (0) and `highest` (1)."""
    positions = {title: (means[title] - lowest[title]) / (highest[title] - lowest[title]) for title in SCORED}
    return 1000 * mean_over_tasks(positions)


def totals(scores: Scores, ends: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
    """What a model is worth on all tasks, by title; nothing if a task is missing.

    `mean` is over tasks, errors as 100 - error. `overall` is that of the papers, over the eleven metrics: slot filling
    counts twice. `SUPERB score` needs the `lowest` and `highest` values of the leaderboard in `ends`.
    """
    if any(not scores.get(title) for title in SCORED):
        return {}
    means = {title: statistics.mean(scores[title]) for title in SCORED}
    values = {title: higher_is_better_score(title, mean) for title, mean in means.items()}
    found = {"mean": mean_over_tasks(values), "overall": statistics.mean(values.values())}
    return found | ({"SUPERB score": superb_score(means, ends["lowest"], ends["highest"])} if ends else {})


def rows_of(scores: Mapping[str, Scores], published: bool) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table.

    Args:
        published: whether the published rows and the leaderboard's score belong to it.
    """
    known = json.loads(PUBLISHED.read_text(encoding="utf-8")) if published else {"models": {}}
    everything: dict[str, Scores] = {
        f"{name} (published)": {title: [value] for title, value in row.items()}
        for name, row in known["models"].items()
    } | dict(scores)
    titles = [title for title in TITLES if any(title in row for row in everything.values())]
    summary = ["mean", "overall", *(["SUPERB score"] if published else [])]
    header = ["model", *(f"{title} {'↑' if TITLES[title] else '↓'}" for title in titles), *summary]
    rows = []
    for name, row in everything.items():
        found = totals(row, known if published else None)
        cells = [mean_and_deviation(row.get(title, []), 2) for title in titles]
        rows.append([name, *cells, *(f"{found[title]:.1f}" if found else "" for title in summary)])
    return header, rows


def plot_scores(scores: Mapping[str, Scores], file: Path) -> None:
    """A bar for each model and metric, the higher the better, with the deviation over seeds."""
    titles = [title for title in TITLES if any(title in row for row in scores.values())]
    figure, (axes,) = new_figure(size=(max(6.0, 1.1 * len(titles) + 2), 4))
    width, at = 0.8 / len(scores), np.arange(len(titles))
    for number, (name, row) in enumerate(scores.items()):
        means = [
            higher_is_better_score(title, statistics.mean(row[title])) if title in row else np.nan for title in titles
        ]
        spread = [statistics.stdev(row[title]) if len(row.get(title, [])) > 1 else 0.0 for title in titles]
        axes.bar(at + (number - (len(scores) - 1) / 2) * width, means, width, yerr=spread, label=name)
    axes.set_xticks(at, [title if TITLES[title] else f"100 - {title}" for title in titles], rotation=30)
    axes.set(ylabel="%", ylim=(0, 100))
    axes.grid(visible=False, axis="x")
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.18))
    save_figure(figure, file)


def write_report(output_dir: Path, variant: str | None, published: bool) -> str:
    """Writes `table.md`, `table.csv` and `table.png` of all results in `output_dir`, and returns the first."""
    scores = read_scores(output_dir, variant)
    header, rows = rows_of(scores, published)
    table = markdown_table(header, rows)
    write_text(output_dir / "table.md", table + "\n")
    with (
        whole_file(output_dir / "table.csv") as unfinished,
        unfinished.open("w", encoding="utf-8", newline="") as file,
    ):
        csv.writer(file).writerows([header, *rows])
    plot_scores(scores, output_dir / "table.png")
    return table
