"""What each part of the recipe is worth for small budgets: one factor varied at a time.

    python benchmarks/learning.py
    python benchmarks/learning.py --train_file digits-train.parquet --test_file digits-test.parquet

Every run distils the teacher of the demonstration by the recipe `small_budget`, but for one factor, and is measured
like the demonstration: linear probes for digit and speaker, and R2 of a ridge regression from the masked frames of
held-out speech to the distillation target. Variants get the same number of passes of a subnet, so a sandwich of three
makes a third of the steps. Two runs at a time, one thread each; a run that is done is not made again, so the benchmark
goes on where it stopped.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import common
from common import CONTROL, RECIPE, SLICE, SUBNETS, LearningArguments, Results

from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert.errors import run
from modeling_lighthubert.loading import load_model


# what a step costs in passes of a subnet
PASSES_OF_STEP = {"largest": 1, "uniform": 1, "uniform_size": 1, "sandwich": 3}
PASSES_OF_STEP |= {"size_ends": 1, "worst_up": 1, "best_up": 1}
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


class Learning(common.Learning):
    """Runs variants of the recipe."""

    variants = VARIANTS

    def run(self, variant: str, seed: int) -> dict[str, dict[str, Any]]:
        """Distils `variant` and measures its subnets, by name."""
        folder, changes = self.output / f"{variant.replace(' ', '-')}-{seed}", dict(VARIANTS[variant])
        alone, stage1, passes = changes.pop("alone", False), changes.pop("stage1", False), self.arguments.passes
        if alone:
            with self.measuring:
                self.untrained[SLICE].extract_subnet("smallest").save_pretrained(folder / "slice")
            changes |= {"student_name_or_path": folder / "slice", "search_space": None, "sampling": "largest"}
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


def tables(results: Results) -> str:
    """Markdown: a row for each control and variant, mean and deviation over the seeds."""
    controls, measures = list(results["controls"].values()), common.measures_of(results)

    def cells(runs: Iterable[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
        return [
            common.summary([run[name][measure] for run in runs if name in run], percent=measure != "r2")
            for measure in measures
            for name in names
        ]

    rows = [["teacher", *cells(controls, ["teacher"] * len(SUBNETS))]]
    rows += [[kind, *cells(controls, [f"{name}, {kind}" for name in SUBNETS])] for kind in (SLICE, CONTROL)]
    done = [variant for variant in VARIANTS if results.get(variant)]
    rows += [[variant, *cells(list(results[variant].values()), SUBNETS)] for variant in done]
    return markdown_table(["", *(f"{title} {name}" for title in measures.values() for name in SUBNETS)], rows)


def main() -> None:
    learning = Learning(common.parse(LearningArguments, __doc__))
    common.report(learning.output, tables(learning.run_all()))


if __name__ == "__main__":
    run(main)
