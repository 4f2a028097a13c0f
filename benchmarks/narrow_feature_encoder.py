"""What a narrower feature encoder costs in quality, and which recipe makes the most of it.

    python benchmarks/narrow_feature_encoder.py --speech_dir speech

Every run distils the teacher by the recipe, and is measured by R2 and linear probes. Here the feature encoder learns,
and in all variants but the first subnets choose its channels as well. All variants have the same budget, in MACs:
forward and backward passes of student and teacher, of `--passes` steps with all channels. `within 40 %` is the best of
subnets at no more than 40 % of the MACs of the middle one: that with the least loss, on training speech, of random
ones. Controls are slices of the teacher, with channels in order of importance and not, and random weights.
"""

import dataclasses
import random
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import comparisons
import torch
from common import ORDERED, RANDOM, RECIPE, SLICE, SUBNETS, BenchArguments, Table
from comparisons import Results
from processes import parse, synchronizer
from recordings import noise, to_distil
from runner import Runner
from transformers import set_seed

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
    FULL: (None, True),
    "from a quarter": (QUARTERS, False),
    "from a quarter, ordered": (QUARTERS, True),
    "from a half, ordered": (HALVES, True),
}
"""Quarters of the channels that subnets choose from for each convolution; and whether channels are in order of
importance."""
BUDGET, BEST = 0.4, "within 40 %"
"""MACs, of those of the middle subnet with all channels."""
HALF = "half of the channels"


@dataclasses.dataclass(kw_only=True)
class NarrowArguments(BenchArguments):
    """What is distilled, for how long, and what becomes of it."""

    measures: list[str] = option(["r2", "probes"], "Groups of measures.")
    passes: int = option(300, "Passes of a subnet that each distillation has.")
    num_candidates: int = option(40, "Random subnets to choose the best within the budget from.")


CONTROLS = "controls"


class NarrowFeatureEncoders(Table):
    """Variants of the feature encoder."""

    name = "narrow_feature_encoder"
    arguments: NarrowArguments

    def __init__(self, arguments: NarrowArguments):
        super().__init__(arguments)
        self.spaces = {None: self.space} | {parts: self.elastic_space(parts) for parts in (QUARTERS, HALVES)}
        half = tuple(width // 2 for width in self.teacher.model.config.conv_dim)
        self.narrow = {
            f"{name}, {HALF}": dataclasses.replace(self.subnets[name], conv_dim=half)
            for name in ("middle", "smallest")
        }
        options = {"head": LightHubertModel, "dtype": torch.float32, "search_space": self.spaces[QUARTERS]}
        self.elastic = load_model(arguments.teacher_name_or_path, **options)

    @classmethod
    def names(cls, arguments: BenchArguments) -> list[str]:
        return [CONTROLS, *VARIANTS]

    @classmethod
    def cost(cls, name: str, arguments: BenchArguments) -> tuple[int, int]:
        models = len(SUBNETS) + 2  # and two of them with half of the channels
        return (0, 2 * models) if name == CONTROLS else (arguments.passes, models)

    def elastic_space(self, parts: tuple[int, ...]) -> SearchSpace:
        """With those quarters of the teacher's channels to choose from, for each convolution."""
        choices = tuple(tuple(width * part // 4 for part in parts) for width in self.teacher.model.config.conv_dim)
        return dataclasses.replace(self.space, conv_dim=choices)

    def space_file(self, parts: tuple[int, ...] | None, seed: int) -> Path:
        """A search space as a file, for the run of a seed."""
        file = self.output / f"search_space-{'full' if parts is None else f'from-{parts[0]}-of-4'}-{seed}.json"
        self.spaces[parts].to_json_file(file)
        return file

    def macs(self, subnet: Subnet) -> float:
        """MACs per second of audio."""
        with torch.device("meta"):
            model = LightHubertModel(self.elastic.config.cut_to(self.spaces[QUARTERS].resolve(subnet)))
        return macs_per_second(model)

    def macs_of_step(self, parts: tuple[int, ...] | None) -> float:
        """MACs of a training step for a second of audio, in the mean over the subnets that are drawn: a backward pass
        takes twice its forward pass, and the teacher has none."""
        drawn = (draw_subnets(self.spaces[parts], RECIPE["sampling"], 0, step)[0] for step in range(100))
        return statistics.mean(3 * self.macs(subnet) for subnet in drawn) + self.macs(self.space.largest)

    def measure(self, model: LightHubertModel, subnet: Subnet, seed: int) -> dict[str, Any]:
        """Cost and quality of a cut model, and its subnet."""
        return {"subnet": subnet.to_dict(), "macs": self.macs(subnet), **self.measures(model, seed)}

    def run(self, name: str, seed: int) -> dict[str, dict[str, Any]]:
        """Distils a variant and measures its subnets, by name; or measures what is not trained."""
        every = self.subnets | self.narrow
        if name == CONTROLS:
            rows = {}
            ordered = load_model(self.order(self.space_file(QUARTERS, seed)), dtype=torch.float32)
            for title, supernet in {SLICE: self.elastic, ORDERED: ordered}.items():
                for row, subnet in every.items():
                    rows[f"{row}, {title}"] = self.measure(supernet.extract_subnet(subnet), subnet, seed)
            for row, subnet in self.narrow.items():
                set_seed(seed)
                model = LightHubertModel(self.elastic.config.cut_to(self.spaces[QUARTERS].resolve(subnet)))
                rows[f"{row}, {RANDOM}"] = self.measure(model, subnet, seed)
            return rows
        parts, is_ordered = VARIANTS[name]
        steps = int(self.arguments.passes * self.macs_of_step(None) / self.macs_of_step(parts))
        changes = {"share_feature_encoder": False, "search_space": self.space_file(parts, seed), "max_steps": steps}
        changes["student_name_or_path"] = self.order(self.space_file(QUARTERS, seed)) if is_ordered else None
        trained = load_model(self.distil(seed, **changes), head=LightHubertForPreTraining)
        subnets = self.subnets if parts is None else every | {BEST: self.best_within_budget(trained)}
        return {
            row: {"steps": steps, **self.measure(trained.hubert.extract_subnet(subnet), subnet, seed)}
            for row, subnet in subnets.items()
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
        speech = self.measures.speech
        batches = [speech.audio(each) for each in speech.batches(self.measures.train_frames)[::4]]
        batches = to_distil(batches, trained.config, self.teacher.objective)
        candidates = {str(number): subnet for number, subnet in enumerate(self.candidates(trained.search_space))}
        trained.to(self.teacher.model.device)
        losses = evaluate(trained, self.teacher, batches, candidates, build_accelerator(self.arguments.device))
        return candidates[min(losses, key=losses.__getitem__)]


def table(results: Results) -> str:
    """Markdown: a line for each subnet of each variant, mean and deviation over the seeds."""
    measures, rows = [name for name in comparisons.measures_of(results) if name != "macs"], []
    for variant, runs in results.items():
        first_run = next(iter(runs.values()))
        for name, first in ((name, row) for name, row in first_run.items() if isinstance(row, dict)):
            found = [run[name] for run in runs.values()]
            macs = f"{statistics.mean(row['macs'] for row in found) / 1e6:.1f}"
            measured = [comparisons.summary([row[name] for row in found], name[:2] != "r2") for name in measures]
            rows.append([variant, name, str(first.get("steps", "")), macs, *measured])
    return markdown_table(["", "subnet", "steps", "MMAC/s", *measures], rows)


def mean(results: Results, variant: str, subnet: str, measure: str = "r2") -> float:
    return statistics.mean(run[subnet][measure] for run in results[variant].values())


def speed_ups(narrow: NarrowFeatureEncoders, rows: Mapping[str, Any]) -> dict[str, float]:
    """How many times faster than the teacher each cut subnet is on a clip of 5 s, taking turns with all the others."""
    device, supernet = narrow.teacher.model.device, narrow.elastic
    audio = torch.from_numpy(noise(1, 5)).to(device)
    models = {"reference": narrow.teacher.model}
    models |= {name: supernet.extract_subnet(row["subnet"]).eval().to(device) for name, row in rows.items()}
    with torch.inference_mode():
        runs = {name: partial(model, audio) for name, model in models.items()}
        times = time_in_turns(runs, repeats=30, synchronize=synchronizer(device))
    return {name: median_ratio(times["reference"], times[name]) for name in rows}


def plot(narrow: NarrowFeatureEncoders, results: Results, seed: int, path: Path) -> None:
    """R2, and accuracy of the probes, against speed: subnets with all channels, and of the best elastic variant."""
    elastic = [variant for variant in results if variant.startswith("from")]
    best = max(elastic, key=lambda variant: mean(results, variant, f"middle, {HALF}"))
    labels = {"r2": "R2 of the target", "digit": "digit probe, accuracy", "speaker": "speaker probe, accuracy"}
    measures = [name for name in labels if name in comparisons.measures_of(results)]
    figure, panels = new_figure(len(measures), (4.5 * len(measures), 4))
    for variant, marker in ((FULL, "s"), (best, "o")):
        rows = {name: row for name, row in results[variant][str(seed)].items() if isinstance(row, dict)}
        speeds = speed_ups(narrow, rows)
        for axes, measure in zip(panels, measures, strict=True):
            points = [(speeds[name], mean(results, variant, name, measure)) for name in rows]
            axes.scatter(*zip(*points, strict=True), marker=marker, label=variant)
            for name, point in zip(rows, points, strict=True):
                axes.annotate(name, point, fontsize=7, xytext=(3, 3), textcoords="offset points")
    for axes, measure in zip(panels, measures, strict=True):
        axes.plot(1, mean(results, CONTROLS, f"largest, {SLICE}", measure), "k*", markersize=11, label="teacher")
        axes.set(xlabel="speed, times that of the teacher", ylabel=labels[measure])
        axes.margins(x=0.4)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=3)
    save_figure(figure, path, rect=(0, 0, 1, 0.93))


def main() -> None:
    arguments = parse(NarrowArguments, __doc__)
    runner = Runner(NarrowFeatureEncoders, arguments)
    results = runner()
    comparisons.report(runner.file.with_suffix(".md"), table(results))
    if all(results.get(name) for name in runner.kind.names(arguments)):
        path = runner.file.with_suffix(".png")
        plot(NarrowFeatureEncoders(arguments), results, arguments.seeds[0], path)


if __name__ == "__main__":
    run(main)
