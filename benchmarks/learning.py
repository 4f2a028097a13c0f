"""What each part of the recipe is worth for small budgets: one factor varied at a time.

    python benchmarks/learning.py
    python benchmarks/learning.py --train_file digits-train.parquet --test_file digits-test.parquet

Every run distils the teacher of the demonstration by the recipe `small_budget`, but for one factor, and is measured
like the demonstration: linear probes for digit and speaker, and R2 of a ridge regression from the masked frames of
held-out speech to the distillation target. Variants get the same number of passes of a subnet, so a sandwich of three
makes a third of the steps. Two runs at a time, one thread each; a run that is done is not made again, so the benchmark
goes on where it stopped.
"""

import time
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from common import (
    RECIPE,
    SUBNETS,
    Learning,
    LearningArguments,
    Results,
    bullets,
    prepare_process,
    run_all,
    summary,
    write_report,
)
from transformers import HfArgumentParser, set_seed

from lighthubert_training.runs.options import parse_options
from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert import LightHubertModel
from modeling_lighthubert.errors import run
from modeling_lighthubert.loading import load_model


# what a step costs in passes of a subnet
PASSES_OF_STEP = {"largest": 1, "uniform": 1, "uniform_size": 1, "sandwich": 3}
PAPER = {"loss_frames": "masked", "mask_time_prob": 0.65}
# at the recipe's learning rate a random start diverges
RANDOM = {"student_name_or_path": "random", "share_feature_encoder": False, "learning_rate": 1e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "sampling uniform": {"sampling": "uniform"},
    "sampling sandwich": {"sampling": "sandwich"},
    "loss on masked frames": {"loss_frames": "masked"},
    "65 % masked": {"mask_time_prob": 0.65},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "feature encoder learns": {"share_feature_encoder": False},
    "after stage 1": {"stage1": True},
    "smallest alone": {"alone": True},
    "random start": RANDOM,
    "random start, 65 % masked, loss on masked frames": RANDOM | PAPER,
}
"""What differs from the recipe, as options of the training script; besides, `stage1`: the largest subnet is trained
first, and `alone`: the smallest is trained as one model."""
SLICE, CONTROL = "slice of the teacher", "random weights"


class Variants(Learning):
    """Runs variants of the recipe."""

    def __init__(self, arguments: LearningArguments):
        super().__init__(arguments)
        self.untrained.extract_subnet("smallest").save_pretrained(self.output / "smallest-slice")

    def run(self, variant: str, seed: int) -> dict[str, dict[str, float]]:
        """Measures of the teacher and its slices, or of the subnets of a supernet that `variant` distils."""
        if variant == "controls":
            with self.measuring:
                return self.controls(seed)
        folder, changes = self.output / f"{variant.replace(' ', '-')}-{seed}", dict(VARIANTS[variant])
        alone, stage1, passes = changes.pop("alone", False), changes.pop("stage1", False), self.arguments.passes
        if alone:
            changes |= {"student_name_or_path": self.output / "smallest-slice", "search_space": None}
            changes["sampling"] = "largest"
        elif stage1:
            self.distil(changes | {"sampling": "largest", "max_steps": passes // 4}, seed, folder / "stage1")
            changes["student_name_or_path"], passes = folder / "stage1", passes - passes // 4
        steps = passes // PASSES_OF_STEP[changes.get("sampling", RECIPE["sampling"])]
        self.distil(changes | {"max_steps": steps}, seed, folder / "trained")
        trained = load_model(folder / "trained")
        with self.measuring:
            if alone:
                return {"smallest": self.bench.measure(trained)}
            return {name: self.bench.measure(trained.extract_subnet(name)) for name in SUBNETS}

    @cached_property
    def untrained_rows(self) -> dict[str, dict[str, float]]:
        """The teacher and its slices, which no seed changes."""
        slices = {f"{name}, {SLICE}": self.bench.measure(self.untrained.extract_subnet(name)) for name in SUBNETS}
        return {"teacher": self.bench.measure(self.teacher.model)} | slices

    def controls(self, seed: int) -> dict[str, dict[str, float]]:
        """The teacher, its untrained slices, and random weights."""
        rows = dict(self.untrained_rows)
        for name, subnet in self.subnets.items():
            set_seed(seed)
            rows[f"{name}, {CONTROL}"] = self.bench.measure(LightHubertModel(self.untrained.config.cut_to(subnet)))
        return rows


def tables(results: Results) -> str:
    """Markdown: a row for each control and variant, mean and deviation over the seeds."""
    controls = list(results["controls"].values())
    measures = ["r2", *(measure for measure in ("digit", "speaker") if measure in controls[0]["teacher"])]

    def cells(runs: Iterable[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
        return [
            summary([run[name][measure] for run in runs if name in run], percent=measure != "r2")
            for measure in measures
            for name in names
        ]

    rows = [["teacher", *cells(controls, ["teacher"] * len(SUBNETS))]]
    rows += [[kind, *cells(controls, [f"{name}, {kind}" for name in SUBNETS])] for kind in (SLICE, CONTROL)]
    done = [variant for variant in VARIANTS if results.get(variant)]
    rows += [[variant, *cells(list(results[variant].values()), SUBNETS)] for variant in done]
    titles = ["R2" if measure == "r2" else measure for measure in measures]
    return markdown_table(["", *(f"{title} {name}" for title in titles for name in SUBNETS)], rows)


def margins(results: Results) -> str:
    """The worst seed of what distillation adds."""
    lines, controls = [], results["controls"]
    if runs := results.get("recipe"):
        of_slice = [run["smallest"]["r2"] - controls[seed][f"smallest, {SLICE}"]["r2"] for seed, run in runs.items()]
        ratios = [run["largest"]["r2"] / controls[seed]["teacher"]["r2"] for seed, run in runs.items()]
        lines.append(f"smallest, R2 above its untrained slice: {min(of_slice):+.3f} at least")
        lines.append(f"largest, R2 over the teacher's: {min(ratios):.2f} at least")
    if (runs := results.get("random start")) and "digit" in controls[next(iter(runs))]["teacher"]:
        gaps = [
            run["smallest"]["digit"] - controls[seed][f"smallest, {CONTROL}"]["digit"] for seed, run in runs.items()
        ]
        lines.append(f"smallest, random start, digits above random weights: {100 * min(gaps):+.1f} points at least")
    return bullets(lines)


def main() -> None:
    (arguments,) = parse_options(HfArgumentParser(LearningArguments, description=__doc__))
    prepare_process()
    begin, learning = time.perf_counter(), Variants(arguments)
    results = run_all(learning.output / "results.json", learning.select(VARIANTS), learning.run)
    print(write_report(learning.output, tables(results), margins(results)))
    print(f"{(time.perf_counter() - begin) / 60:.0f} minutes; all in {learning.output}")


if __name__ == "__main__":
    run(main)
