"""SUPERB's table of what was measured: Markdown, CSV, and a plot; beside the published rows where the data are
SUPERB's own."""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("Agg")
from matplotlib import pyplot


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
"""Title of each task's metric, and whether more is better."""
TITLES = dict(COLUMNS.values())
SCORED = [title for title in TITLES if title != "ASR, LM"]
"""What the mean and the SUPERB score are of."""
PUBLISHED = Path(__file__).parents[1] / "configs/superb/published.json"

Scores = Mapping[str, Sequence[float]]
"""Of a model: values in percent by title, one for each seed."""


def read_scores(output_dir: Path, variant: str | None) -> dict[str, dict[str, list[float]]]:
    """Of each model, in the order of their names."""
    found: dict[str, dict[str, list[float]]] = {}
    for file in sorted(output_dir.glob("*/*/seed-*/result.json")):
        result = json.loads(file.read_text())
        if result["variant"] != variant:
            continue
        for (task, metric), (title, _) in COLUMNS.items():
            if result["task"] == task and metric in result["test"]:
                found.setdefault(result["model"], {}).setdefault(title, []).append(100 * result["test"][metric])
    return found


def goodness(title: str, value: float) -> float:
    """A value in percent as more is better: an error counts as what it leaves of 100."""
    return value if TITLES[title] else 100 - value


def overall(scores: Scores) -> float | None:
    """Mean over all tasks, errors as 100 - x; slot filling counts once. `None` if a task is missing."""
    if any(title not in scores for title in SCORED):
        return None
    values = {title: goodness(title, statistics.mean(scores[title])) for title in SCORED}
    slots = (values.pop("SF F1") + values.pop("SF CER")) / 2
    return statistics.mean([*values.values(), slots])


def superb_score(scores: Scores, lowest: Mapping[str, float], highest: Mapping[str, float]) -> float | None:
    """1000 times the mean over tasks of how far a model is from `lowest` (0) to `highest` (1), as the leaderboard has
    it (arXiv 2210.08634): from log mel filter banks to the best model."""
    if any(title not in scores for title in SCORED):
        return None

    def share(title: str) -> float:
        return (statistics.mean(scores[title]) - lowest[title]) / (highest[title] - lowest[title])

    shares = {title: share(title) for title in SCORED}
    slots = (shares.pop("SF F1") + shares.pop("SF CER")) / 2
    return 1000 * statistics.mean([*shares.values(), slots])


def rows_of(scores: Mapping[str, Scores], published: bool) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table."""
    known = json.loads(PUBLISHED.read_text()) if published else {"models": {}}
    everything: dict[str, Scores] = {
        f"{name} (published)": {title: [value] for title, value in row.items()}
        for name, row in known["models"].items()
    } | dict(scores)
    titles = [title for title in TITLES if any(title in row for row in everything.values())]
    header = ["model", *(f"{title} {'↑' if TITLES[title] else '↓'}" for title in titles), "mean"]
    header += ["SUPERB score"] if published else []
    rows = []
    for name, row in everything.items():
        cells = [name, *(summary(row.get(title, [])) for title in titles)]
        totals = [overall(row)] + ([superb_score(row, known["lowest"], known["highest"])] if published else [])
        rows.append([*cells, *("" if total is None else f"{total:.1f}" for total in totals)])
    return header, rows


def summary(values: Sequence[float]) -> str:
    """Mean and deviation over seeds."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def plot(scores: Mapping[str, Scores], file: Path) -> None:
    """A bar for each model in a panel for each metric, the higher the better."""
    titles = [title for title in TITLES if any(title in row for row in scores.values())]
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(titles) + 2), 4))
    width, at = 0.8 / len(scores), np.arange(len(titles))
    for number, (name, row) in enumerate(scores.items()):
        means = [goodness(title, statistics.mean(row[title])) if title in row else np.nan for title in titles]
        spread = [statistics.stdev(row[title]) if len(row.get(title, [])) > 1 else 0.0 for title in titles]
        axes.bar(at + (number - (len(scores) - 1) / 2) * width, means, width, yerr=spread, label=name)
    axes.set_xticks(at, [title if TITLES[title] else f"100 - {title}" for title in titles], rotation=30)
    axes.set(ylabel="%", ylim=(0, 100))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.18))
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def write_report(output_dir: Path, variant: str | None, published: bool) -> str:
    """Writes `table.md`, `table.csv` and `table.png` of all results in `output_dir`, and returns the first."""
    scores = read_scores(output_dir, variant)
    header, rows = rows_of(scores, published)
    table = "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))
    (output_dir / "table.md").write_text(table + "\n", encoding="utf-8")
    with (output_dir / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    plot(scores, output_dir / "table.png")
    return table
