"""What a narrower feature encoder costs in quality, and which recipe makes the most of it.

    python benchmarks/narrow_feature_encoder.py
    python benchmarks/narrow_feature_encoder.py --train_file digits-train.parquet --test_file digits-test.parquet

As `learning.py`: every run distils the teacher of the demonstration by the recipe `small_budget`, and is measured by
probes and R2. Here the feature encoder learns, and in all variants but the first subnets choose its channels as well.
All variants have the same budget, in MACs: forward and backward passes of student and teacher, of `--passes` steps
with all channels. `within 40 %` is the best of subnets at no more than 40 % of the MACs of the middle one: that with
the least loss, on training speech, of random ones. Controls are slices of the teacher, with channels in order of
importance and not, and random weights.
"""

import dataclasses
import random
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common import RECIPE, ROOT, SLICE, SUBNETS, TEACHER, LearningArguments, Results
from transformers import PreTrainedModel

from lighthubert_training.distillation.step import evaluate
from lighthubert_training.runs.distributed import build_accelerator
from lighthubert_training.runs.options import option
from lighthubert_training.runs.plots import new_figure, save_figure
from lighthubert_training.runs.tables import markdown_table
from lighthubert_training.sampling import draw_subnets
from modeling_lighthubert import LightHubertForPreTraining, LightHubertModel, SearchSpace, Subnet
from modeling_lighthubert.errors import run
from modeling_lighthubert.loading import load_model
from modeling_lighthubert.profiling import macs_per_second, median_ratio, time_in_turns


QUARTERS, HALVES = (1, 2, 3, 4), (2, 3, 4)
FULL = "all channels"
VARIANTS: dict[str, tuple[tuple[int, ...] | None, bool]] = {
    FULL: (None, False),
    "from a quarter": (QUARTERS, False),
    "from a quarter, ordered": (QUARTERS, True),
    "from a half, ordered": (HALVES, True),
}
"""Quarters of the channels that subnets choose from for each convolution; and whether channels are in order of
importance."""
BUDGET, BEST = 0.4, "within 40 %"
"""MACs, of those of the middle subnet with all channels."""
HALF = "half of the channels"


@dataclasses.dataclass
class NarrowArguments(LearningArguments):
    """What is compared, and for how long."""

    output_dir: str = option(str(ROOT / "benchmarks/output/narrow_feature_encoder"), "Folder for runs and results.")
    num_candidates: int = option(40, "Random subnets to choose the best within the budget from.")


class NarrowFeatureEncoders(common.Learning):
    """Runs variants of the feature encoder, and measures what comes out."""

    variants = VARIANTS

    def __init__(self, arguments: NarrowArguments):
        super().__init__(arguments)
        self.arguments: NarrowArguments = arguments
        self.spaces = {None: self.space} | {parts: self.elastic_space(parts) for parts in (QUARTERS, HALVES)}
        for parts, space in self.spaces.items():
            space.to_json_file(self.space_file(parts))
        half = tuple(width // 2 for width in self.teacher.model.config.conv_dim)
        self.random_subnets = [f"{name}, {HALF}" for name in ("middle", "smallest")]
        for name in self.random_subnets:
            self.subnets[name] = dataclasses.replace(self.subnets[name.partition(",")[0]], conv_dim=half)
        self.ordered = self.output / "ordered"
        if not (self.ordered / "model.safetensors").exists():
            options = {"model_name_or_path": TEACHER, "search_space": self.space_file(QUARTERS), "device": "cpu"}
            options |= {"train_file": self.train_file, "output_dir": self.ordered}
            common.run_script("training/order_channels.py", **options)
        supernet = load_model(TEACHER, head=LightHubertModel, search_space=self.spaces[QUARTERS])
        self.untrained = {SLICE: supernet, "slice, ordered": load_model(self.ordered)}

    def elastic_space(self, parts: tuple[int, ...]) -> SearchSpace:
        """With those quarters of the teacher's channels to choose from, for each convolution."""
        choices = tuple(tuple(width * part // 4 for part in parts) for width in self.teacher.model.config.conv_dim)
        return dataclasses.replace(self.space, conv_dim=choices)

    def space_file(self, parts: tuple[int, ...] | None) -> Path:
        return self.output / ("search_space.json" if parts is None else f"search_space-from-{parts[0]}-of-4.json")

    def macs(self, subnet: Subnet) -> float:
        """MACs per second of audio."""
        with torch.device("meta"):
            model = LightHubertModel(self.untrained[SLICE].config.cut_to(self.spaces[QUARTERS].resolve(subnet)))
        return macs_per_second(model)

    def macs_of_step(self, parts: tuple[int, ...] | None) -> float:
        """MACs of a training step for a second of audio, in the mean over the subnets that are drawn: a backward pass
        takes twice its forward pass, and the teacher has none."""
        drawn = (draw_subnets(self.spaces[parts], RECIPE["sampling"], 0, step)[0] for step in range(100))
        return statistics.mean(3 * self.macs(subnet) for subnet in drawn) + self.macs(self.space.largest)

    def measure(self, model: PreTrainedModel, subnet: Subnet) -> dict[str, Any]:
        """Cost and quality of a cut model, and its subnet."""
        return {"subnet": subnet.to_dict(), "macs": self.macs(subnet)} | self.bench.measure(model)

    def folder(self, variant: str, seed: int) -> Path:
        return self.output / f"{variant.replace(' ', '-').replace(',', '')}-{seed}"

    def run(self, variant: str, seed: int) -> dict[str, dict[str, Any]]:
        """Distils `variant` and measures its subnets, by name."""
        folder, (parts, is_ordered) = self.folder(variant, seed), VARIANTS[variant]
        steps = int(self.arguments.passes * self.macs_of_step(None) / self.macs_of_step(parts))
        changes = {"share_feature_encoder": False, "search_space": self.space_file(parts), "max_steps": steps}
        self.distil(changes | ({"student_name_or_path": self.ordered} if is_ordered else {}), seed, folder)
        trained = load_model(folder, head=LightHubertForPreTraining)
        with self.measuring:
            subnets = {name: self.subnets[name] for name in SUBNETS}
            if parts is not None:
                subnets = self.subnets | {BEST: self.best_within_budget(trained)}
            return {
                name: {"steps": steps} | self.measure(trained.hubert.extract_subnet(subnet), subnet)
                for name, subnet in subnets.items()
            }

    def candidates(self, space: SearchSpace) -> list[Subnet]:
        """Random subnets that use between 80 and 100 % of the budget for MACs."""
        rng, budget, found = random.Random(0), BUDGET * self.macs(self.subnets["middle"]), []
        while len(found) < self.arguments.num_candidates:
            subnet = space.sample(rng)
            if 0.8 * budget <= self.macs(subnet) <= budget:
                found.append(subnet)
        return found

    def best_within_budget(self, trained: LightHubertForPreTraining) -> Subnet:
        """The candidate with the least loss on recordings to train on."""
        batches = common.to_distil(self.bench.train_frames[::4])
        candidates = {str(number): subnet for number, subnet in enumerate(self.candidates(trained.search_space))}
        losses = evaluate(trained, self.teacher, batches, candidates, build_accelerator("cpu"))
        return candidates[min(losses, key=losses.__getitem__)]


def table(results: Results) -> str:
    """Markdown: a line for each subnet of each variant, mean and deviation over the seeds."""
    measures, rows = common.measures_of(results), []
    for variant, runs in results.items():
        for name, first in next(iter(runs.values())).items():
            found = [run[name] for run in runs.values()]
            macs = f"{statistics.mean(row['macs'] for row in found) / 1e6:.1f}"
            measured = [common.summary([row[measure] for row in found], measure != "r2") for measure in measures]
            rows.append([variant, name, str(first.get("steps", "")), macs, *measured])
    return markdown_table(["", "subnet", "steps", "MMAC/s", *measures.values()], rows)


def mean(results: Results, variant: str, subnet: str, measure: str = "r2") -> float:
    return statistics.mean(run[subnet][measure] for run in results[variant].values())


def speed_ups(narrow: NarrowFeatureEncoders, variant: str, rows: Mapping[str, Any], seed: int) -> dict[str, float]:
    """How many times faster than the teacher each cut subnet is on a clip of 5 s, taking turns with all the others."""
    trained, audio = load_model(narrow.folder(variant, seed)), torch.from_numpy(common.noise(1, 5))
    models = {"reference": narrow.teacher.model}
    models |= {name: trained.extract_subnet(row["subnet"]).eval() for name, row in rows.items()}
    with torch.inference_mode():
        times = time_in_turns({name: partial(model, audio) for name, model in models.items()}, repeats=30)
    return {name: median_ratio(times["reference"], times[name]) for name in rows}


def plot(narrow: NarrowFeatureEncoders, results: Results, seed: int, path: Path) -> None:
    """R2, and accuracy of the probes, against speed: subnets with all channels, and of the best elastic variant."""
    elastic = [variant for variant in results if variant.startswith("from")]
    best = max(elastic, key=lambda variant: mean(results, variant, f"middle, {HALF}"))
    labels = {"r2": "R2 of the target", "digit": "digit probe, accuracy", "speaker": "speaker probe, accuracy"}
    measures = common.measures_of(results)
    figure, panels = new_figure(len(measures), (4.5 * len(measures), 4))
    for variant, marker in ((FULL, "s"), (best, "o")):
        rows = results[variant][str(seed)]
        speeds = speed_ups(narrow, variant, rows, seed)
        for axes, measure in zip(panels, measures, strict=True):
            points = [(speeds[name], mean(results, variant, name, measure)) for name in rows]
            axes.scatter(*zip(*points, strict=True), marker=marker, label=variant)
            for name, point in zip(rows, points, strict=True):
                axes.annotate(name, point, fontsize=7, xytext=(3, 3), textcoords="offset points")
    for axes, measure in zip(panels, measures, strict=True):
        axes.plot(1, mean(results, "controls", "teacher", measure), "k*", markersize=11, label="teacher")
        axes.set(xlabel="speed, times that of the teacher", ylabel=labels[measure])
        axes.margins(x=0.4)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=3)
    save_figure(figure, path, rect=(0, 0, 1, 0.93))


def main() -> None:
    narrow = NarrowFeatureEncoders(common.parse(NarrowArguments, __doc__))
    results = narrow.run_all()
    common.report(narrow.output, table(results))
    if FULL in results and any(variant.startswith("from") for variant in results):
        plot(narrow, results, narrow.arguments.seeds[0], narrow.output / "quality-against-speed.png")


if __name__ == "__main__":
    run(main)
