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
import time
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from common import (
    RECIPE,
    ROOT,
    TEACHER,
    Learning,
    LearningArguments,
    Results,
    bullets,
    noise,
    prepare_process,
    run_all,
    run_script,
    summary,
    to_distil,
    write_report,
)
from transformers import HfArgumentParser, PreTrainedModel, set_seed

from lighthubert_training.distillation.step import evaluate
from lighthubert_training.runs.distributed import build_accelerator
from lighthubert_training.runs.options import option, parse_options
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


class NarrowFeatureEncoders(Learning):
    """Runs variants of the feature encoder, and measures what comes out."""

    def __init__(self, arguments: NarrowArguments):
        super().__init__(arguments)
        self.num_candidates = arguments.num_candidates
        self.spaces = {None: self.space} | {parts: self.elastic_space(parts) for parts in (QUARTERS, HALVES)}
        for parts, space in self.spaces.items():
            space.to_json_file(self.space_file(parts))
        half = tuple(width // 2 for width in self.teacher.model.config.conv_dim)
        self.narrow = {
            f"{name}, {HALF}": dataclasses.replace(self.subnets[name], conv_dim=half)
            for name in ("middle", "smallest")
        }
        self.supernet = load_model(TEACHER, head=LightHubertModel, search_space=self.spaces[QUARTERS])
        self.ordered = self.output / "ordered"
        if not (self.ordered / "model.safetensors").exists():
            options = {"model_name_or_path": TEACHER, "search_space": self.space_file(QUARTERS), "device": "cpu"}
            options |= {"train_file": self.train_file, "output_dir": self.ordered}
            run_script("training/order_channels.py", **options)

    def elastic_space(self, parts: tuple[int, ...]) -> SearchSpace:
        """With those quarters of the teacher's channels to choose from, for each convolution."""
        choices = tuple(tuple(width * part // 4 for part in parts) for width in self.teacher.model.config.conv_dim)
        return dataclasses.replace(self.space, conv_dim=choices)

    def space_file(self, parts: tuple[int, ...] | None) -> Path:
        return self.output / ("search_space.json" if parts is None else f"search_space-from-{parts[0]}-of-4.json")

    def macs(self, subnet: Subnet) -> float:
        """MACs per second of audio."""
        with torch.device("meta"):
            model = LightHubertModel(self.supernet.config.cut_to(self.spaces[QUARTERS].resolve(subnet)))
        return macs_per_second(model)

    def macs_of_step(self, parts: tuple[int, ...] | None) -> float:
        """MACs of a training step for a second of audio, in the mean over the subnets that are drawn: a backward pass
        takes twice its forward pass, and the teacher has none."""
        drawn = (draw_subnets(self.spaces[parts], RECIPE["sampling"], 0, step)[0] for step in range(100))
        return statistics.mean(3 * self.macs(subnet) for subnet in drawn) + self.macs(self.space.largest)

    @cached_property
    def untrained_rows(self) -> dict[str, dict[str, Any]]:
        """The teacher and its slices, which no seed changes."""
        ordered = load_model(self.ordered)
        rows = {"teacher": self.measure(self.teacher.model, self.space.largest)}
        for name, subnet in (self.subnets | self.narrow).items():
            rows[f"{name}, slice of the teacher"] = self.measure(self.supernet.extract_subnet(subnet), subnet)
            rows[f"{name}, slice, ordered"] = self.measure(ordered.extract_subnet(subnet), subnet)
        return rows

    def controls(self, seed: int) -> dict[str, dict[str, Any]]:
        """Untrained slices of the teacher, and random weights."""
        rows = dict(self.untrained_rows)
        for name, subnet in self.narrow.items():
            set_seed(seed)
            random_weights = LightHubertModel(self.supernet.config.cut_to(subnet))
            rows[f"{name}, random weights"] = self.measure(random_weights, subnet)
        return rows

    def measure(self, model: PreTrainedModel, subnet: Subnet) -> dict[str, Any]:
        """Cost and quality of a cut model, and its subnet."""
        return {"subnet": subnet.to_dict(), "macs": self.macs(subnet)} | self.bench.measure(model)

    def folder(self, variant: str, seed: int) -> Path:
        return self.output / f"{variant.replace(' ', '-').replace(',', '')}-{seed}"

    def run(self, variant: str, seed: int) -> dict[str, dict[str, Any]]:
        """Measures of the controls, or of the subnets of a supernet that `variant` distils."""
        if variant == "controls":
            with self.measuring:
                return self.controls(seed)
        folder, (parts, is_ordered) = self.folder(variant, seed), VARIANTS[variant]
        steps = int(self.arguments.passes * self.macs_of_step(None) / self.macs_of_step(parts))
        changes = {"share_feature_encoder": False, "search_space": self.space_file(parts), "max_steps": steps}
        self.distil(changes | ({"student_name_or_path": self.ordered} if is_ordered else {}), seed, folder)
        trained = load_model(folder, head=LightHubertForPreTraining)
        with self.measuring:
            subnets = dict(self.subnets)
            if parts is not None:
                subnets |= self.narrow | {BEST: self.best_within_budget(trained)}
            return {
                name: {"steps": steps} | self.measure(trained.hubert.extract_subnet(subnet), subnet)
                for name, subnet in subnets.items()
            }

    def candidates(self, space: SearchSpace) -> list[Subnet]:
        """Random subnets that use between 80 and 100 % of the budget for MACs."""
        rng, budget, found = random.Random(0), BUDGET * self.macs(self.subnets["middle"]), []
        while len(found) < self.num_candidates:
            subnet = space.sample(rng)
            if 0.8 * budget <= self.macs(subnet) <= budget:
                found.append(subnet)
        return found

    def best_within_budget(self, trained: LightHubertForPreTraining) -> Subnet:
        """The candidate with the least loss on recordings to train on."""
        batches = to_distil(self.bench.train_frames[::4])
        candidates = {str(number): subnet for number, subnet in enumerate(self.candidates(trained.search_space))}
        losses = evaluate(trained, self.teacher, batches, candidates, build_accelerator("cpu"))
        return candidates[min(losses, key=losses.__getitem__)]


def measures_of(results: Results) -> list[str]:
    """R2, and the probes that the data has labels for."""
    controls = next(iter(results["controls"].values()))
    return [name for name in ("r2", "digit", "speaker") if name in controls["teacher"]]


def table(results: Results) -> str:
    """Markdown: a line for each subnet of each variant, mean and deviation over the seeds."""
    measures, rows = measures_of(results), []
    for variant, runs in results.items():
        for name, first in next(iter(runs.values())).items():
            found = [run[name] for run in runs.values()]
            macs = f"{statistics.mean(row['macs'] for row in found) / 1e6:.1f}"
            measured = [summary([row[measure] for row in found], measure != "r2") for measure in measures]
            rows.append([variant, name, str(first.get("steps", "")), macs, *measured])
    titles = ["R2" if measure == "r2" else measure for measure in measures]
    return markdown_table(["", "subnet", "steps", "MMAC/s", *titles], rows)


def mean(results: Results, variant: str, subnet: str, measure: str = "r2") -> float:
    return statistics.mean(run[subnet][measure] for run in results[variant].values())


def margins(results: Results) -> str:
    """What each elastic variant loses or gains against subnets with all channels, in the mean of the seeds."""
    lines = []
    for variant in [name for name in results if name.startswith("from") and FULL in results]:

        def gap(subnet: str, reference: str, measure: str = "r2", variant: str = variant) -> float:
            return mean(results, variant, subnet, measure) - mean(results, FULL, reference, measure)

        gaps = [f"{gap(f'middle, {HALF}', 'middle'):+.3f} in R2"]
        for probe in measures_of(results)[1:]:
            gaps.append(f"{100 * gap(f'middle, {HALF}', 'middle', probe):+.1f} points of {probe}")
        lines.append(
            f"{variant}: middle with {HALF} against all: {', '.join(gaps)}; {BEST} of the MACs against the smallest"
            f" with all channels: {gap(BEST, 'smallest'):+.3f} in R2"
        )
    return bullets(lines)


def speed_ups(narrow: NarrowFeatureEncoders, variant: str, rows: Mapping[str, Any], seed: int) -> dict[str, float]:
    """How many times faster than the teacher each cut subnet is on a clip of 5 s, taking turns with all the others."""
    trained, audio = load_model(narrow.folder(variant, seed)), torch.from_numpy(noise(1, 5))
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
    measures = measures_of(results)
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
    (arguments,) = parse_options(HfArgumentParser(NarrowArguments, description=__doc__))
    prepare_process()
    begin, narrow = time.perf_counter(), NarrowFeatureEncoders(arguments)
    results = run_all(narrow.output / "results.json", narrow.select(VARIANTS), narrow.run)
    print(write_report(narrow.output, table(results), margins(results)))
    if FULL in results and any(variant.startswith("from") for variant in results):
        plot(narrow, results, arguments.seeds[0], narrow.output / "quality-against-speed.png")
    print(f"{(time.perf_counter() - begin) / 60:.0f} minutes; all in {narrow.output}")


if __name__ == "__main__":
    run(main)
