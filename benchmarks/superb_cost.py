"""What SUPERB costs at its real size: gigabytes of kept features, and hours of a GPU for the features of each task.

    python benchmarks/superb_cost.py

Steps and batch sizes are those of the recipes, hours and numbers of recordings those of the corpora. How much audio a
model answers in a second was measured by `paper_size.py`. The head, which trains on the features, is not in it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml
from processes import ROOT, parse
from shapes import REFERENCE, SUBNETS

from lighthubert_training.runs.options import option
from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert.errors import run


class Corpus(NamedTuple):
    """Hours and recordings to train on, and hours of all other parts."""

    hours: float
    recordings: int
    other_hours: float

    @property
    def seconds(self) -> float:
        """Of a recording, in the mean."""
        return 3600 * self.hours / self.recordings


LIBRISPEECH = Corpus(100.6, 28_539, 10.8)
CORPORA = {  # recordings: data card of s3prl/superb on the Hub; hours: papers of the corpora
    "pr": LIBRISPEECH,
    "asr": LIBRISPEECH,
    "ks": Corpus(14.2, 51_094, 2.7),  # of one second
    "sid": Corpus(317.0, 138_361, 35.0),
    "asv": Corpus(340.4, 148_642, 11.2),
    "sd": Corpus(58.0, 13_901, 22.0),
    "ic": Corpus(14.7, 23_132, 4.3),
}
FRAMES_PER_HOUR, BYTES = 50 * 3600, 2
SHAPES = {REFERENCE: (12, 768)} | {name: (each.num_hidden_layers, each.hidden_size) for name, each in SUBNETS.items()}
"""Layers and their width."""
MODELS = (REFERENCE, "a_small", "smallest of tiny_to_base")
RECIPES = ROOT / "training/lighthubert_training/configs/superb"


@dataclass
class CostArguments:
    """Where what was measured is."""

    results_file: str = option(str(ROOT / "benchmarks/results/paper_size_h200.json"), "Results of paper_size.py.")
    dtype: str = option("float32", "Precision that they are taken in.")
    batch_size: int = option(8, "Batch size that they are taken at.")


def gigabytes(task: str, model: str) -> float:
    """Of the hidden states of all recordings of a task, in half precision."""
    layers, width = SHAPES[model]
    corpus = CORPORA[task]
    return (corpus.hours + corpus.other_hours) * FRAMES_PER_HOUR * (layers + 1) * width * BYTES / 1e9


def seconds_of_audio(task: str, kept: bool) -> float:
    """That go through the model: all once where features are kept, else the batches of all steps, and the dev part,
    half of the others, at every evaluation."""
    corpus, recipe = CORPORA[task], yaml.safe_load((RECIPES / f"{task}.yaml").read_text(encoding="utf-8"))
    if kept:
        return 3600 * (corpus.hours + corpus.other_hours)
    length = min(corpus.seconds, recipe.get("max_seconds", corpus.seconds))
    evaluations = recipe["max_steps"] // recipe["eval_steps"]
    return recipe["max_steps"] * recipe["batch_size"] * length + evaluations * 3600 * corpus.other_hours / 2


def table(measured: dict[str, Any], batch_size: int) -> str:
    """Markdown: a line for each task, with cells for each model."""
    times, clip = measured["times"][str(batch_size)], measured["clip_seconds"]
    rates = {model: batch_size * clip / median(times[model]) for model in MODELS}
    rows = []
    for task in CORPORA:
        cells = []
        for model, rate in rates.items():
            hours = [seconds_of_audio(task, kept) / rate / 3600 for kept in (True, False)]
            cells.append(f"{gigabytes(task, model):.0f} GB, {hours[0]:.2g} h; {hours[1]:.2g} h")
        rows.append([task, *cells])
    return markdown_table(
        ["task", *(f"{model} ({rate:.0f} s of audio a second)" for model, rate in rates.items())], rows
    )


def main() -> None:
    arguments = parse(CostArguments, __doc__)
    found = json.loads(Path(arguments.results_file).read_text(encoding="utf-8"))
    print(f"{found['device']}, {arguments.dtype}\n\n{table(found[arguments.dtype], arguments.batch_size)}")


if __name__ == "__main__":
    run(main)
