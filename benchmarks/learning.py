"""What each part of the recipe is worth: one factor varied at a time.

    python benchmarks/learning.py --speech_dir speech --held_out_speaker theo --held_out_language it

Every run distils the teacher by the recipe, but for one factor, and is measured by R2 and linear probes. Variants get
the same number of passes of a subnet, so a sandwich of three makes a third of the steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comparisons
from common import ALONE, RECIPE, SUBNETS, BenchArguments, Table
from comparisons import Results
from processes import parse
from runner import Runner

from lighthubert_training.runs.options import option
from lighthubert_training.runs.tables import markdown_table
from lighthubert_training.sampling import SAMPLING_STRATEGIES
from modeling_lighthubert.errors import run
from modeling_lighthubert.loading import load_model


# what a step costs in passes of a subnet
PASSES_OF_STEP = dict.fromkeys(SAMPLING_STRATEGIES, 1) | {"sandwich": 3}
RANDOM = {"student_name_or_path": "random", "share_feature_encoder": False, "learning_rate": 1e-3}
"""From random weights nothing is learned at the recipe's learning rate, which is for a start from the teacher."""
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    f"smallest, {ALONE}": {"alone": "smallest"},
    f"middle, {ALONE}": {"alone": "middle"},
    "sampling uniform": {"sampling": "uniform"},
    "sampling sandwich": {"sampling": "sandwich"},
    "loss on masked frames, 65 % masked": {"loss_frames": "masked", "mask_time_prob": 0.65},
    "no masks": {"mask_time_prob": 0.0},
    "half the learning rate": {"learning_rate": RECIPE["learning_rate"] / 2},
    "twice the learning rate": {"learning_rate": RECIPE["learning_rate"] * 2},
    "torch's moments of AdamW": {"adam_beta2": 0.999, "adam_epsilon": 1e-8},
    "target of all layers": {"all_layers": True},
    "feature encoder learns": {"share_feature_encoder": False},
    "channels, heads and units in the teacher's order": {"student_name_or_path": None},
    "stage 1 first": {"stage1": True},
    "two subnets a step": {"num_random_subnets": 2},
    "random start": RANDOM,
    "random start, stage 1 first": RANDOM | {"stage1": True},
}
"""What differs from the recipe, as options of the training script; besides, `stage1`: a quarter of the passes trains
the largest subnet first; `alone`: the subnet of that name is trained as one model; and `all_layers` of the teacher are
the target."""


@dataclass(kw_only=True)
class LearningArguments(BenchArguments):
    """What is distilled, for how long, and what becomes of it."""

    measures: list[str] = option(["r2", "probes"], "Groups of measures.")
    passes: int = option(300, "Passes of a subnet that each distillation has.")


class Learning(Table):
    """Variants of the recipe."""

    name = "learning"

    @classmethod
    def names(cls, arguments: BenchArguments) -> list[str]:
        return list(VARIANTS)

    @classmethod
    def cost(cls, name: str, arguments: BenchArguments) -> tuple[int, int]:
        return arguments.passes, 1 if "alone" in VARIANTS[name] else len(SUBNETS)

    def run(self, name: str, seed: int) -> dict[str, dict[str, Any]]:
        changes, passes = dict(VARIANTS[name]), self.arguments.passes
        if changes.pop("all_layers", False):
            changes["num_target_layers"] = self.space.largest.num_hidden_layers
        if alone := changes.pop("alone", None):
            return {alone: self.measure(self.distil_alone(ALONE, self.subnets[alone], seed, **changes), seed)}
        if changes.pop("stage1", False):
            stage1 = self.distil(seed, **changes, sampling="largest", max_steps=passes // 4)
            changes["student_name_or_path"], passes = stage1, passes - passes // 4
        of_step = PASSES_OF_STEP[changes.get("sampling", RECIPE["sampling"])] * changes.get("num_random_subnets", 1)
        steps = passes // of_step
        supernet = load_model(self.distil(seed, **changes, max_steps=steps))
        return {row: self.measure(supernet.extract_subnet(row), seed) for row in SUBNETS}


def table(results: Results) -> str:
    """Markdown: a row for each variant, mean and deviation over the seeds, in columns by measure and subnet."""
    measures = comparisons.measures_of(results)
    rows = []
    for variant in (name for name in VARIANTS if results.get(name)):
        cells = [
            comparisons.summary(
                list(comparisons.over_seeds(results, variant, subnet, measure).values()), measure[:2] != "r2"
            )
            for measure in measures
            for subnet in SUBNETS
        ]
        rows.append([variant, *cells])
    return markdown_table(["", *(f"{measure}, {subnet}" for measure in measures for subnet in SUBNETS)], rows)


def main() -> None:
    runner = Runner(Learning, parse(LearningArguments, __doc__))
    results: Mapping[str, Any] = runner()
    comparisons.report(runner.file.with_suffix(".md"), table(results))


if __name__ == "__main__":
    run(main)
