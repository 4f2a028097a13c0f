"""What a narrower feature encoder costs in quality, and which recipe makes the most of it.

    python benchmarks/narrow_ear.py
    python benchmarks/narrow_ear.py --train_file digits-train.parquet --test_file digits-test.parquet

As `learning.py`: every run distils the teacher of the demonstration by training/lighthubert_training/configs/distillation/small_budget.yaml, and is
measured by probes and R2. Here the convolutions learn, and in all variants but the first subnets choose their channels
as well. All variants have the same budget, in MACs: forward and backward passes of student and teacher, of `--passes`
steps with the full ear. `within 40 %` is the best of subnets at no more than 40 % of the MACs of the middle one: that
with the least loss, on training speech, of random ones. Controls are slices of the teacher, with channels in order of
importance and not, and random weights.
"""

import dataclasses
import random
import statistics
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator
from inference import Runner, alternating_times, noise, speed_up
from learning import (
    RECIPE,
    ROOT,
    TEACHER,
    Learning,
    LearningArguments,
    Results,
    prepare_process,
    run_all,
    summary,
    to_distil,
)
from run_demo import markdown_table
from transformers import HfArgumentParser, PreTrainedModel, set_seed

from lighthubert_training.distillation.step import evaluate
from lighthubert_training.sampling import draw_subnets
from modeling_lighthubert import LightHubertForPreTraining, LightHubertModel, SearchSpace, Subnet
from modeling_lighthubert.profiling import profile_subnet


matplotlib.use("Agg")
from matplotlib import pyplot


QUARTERS, HALVES = (1, 2, 3, 4), (2, 3, 4)
WARM = {"parts": HALVES, "warm_up": 100, "feature_encoder_learning_rate": 1e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "full ear": {},
    "from a quarter": {"parts": QUARTERS},
    "from a quarter, ordered": {"parts": QUARTERS, "ordered": True},
    "from a half, ordered": {"parts": HALVES, "ordered": True},
    "from a half, ordered, shrinking from the middle": {
        "parts": HALVES,
        "ordered": True,
        "progressive_shrinking_ratio": 0.5,
    },
    "from a half, warmed up": WARM,
    "from a half, ordered, warmed up": WARM | {"ordered": True},
    "from a half, ordered, warmed up, frozen": {
        "parts": HALVES,
        "ordered": True,
        "warm_up": 100,
        "freeze_feature_encoder": True,
    },
}
"""What differs from the recipe, as options of the training script; besides, `parts`: quarters of the channels that
subnets choose from for each convolution, `ordered`: by importance first, and `warm_up`: steps in which convolutions
and projection of narrow ears learn to give what those of the teacher do."""
BUDGET = 0.4
"""MACs, of those of the middle subnet with the full ear."""


@dataclasses.dataclass
class EarArguments(LearningArguments):
    """What is compared, and for how long."""

    output_dir: str = dataclasses.field(
        default=str(ROOT / "benchmarks/output/narrow_ear"), metadata={"help": "Folder for runs and results."}
    )
    num_candidates: int = dataclasses.field(
        default=40, metadata={"help": "Random subnets to choose the best within the budget from."}
    )


class NarrowEar(Learning):
    """Runs variants of the ear, and measures what comes out."""

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS

    def __init__(self, arguments: EarArguments):
        super().__init__(arguments)
        self.num_candidates = arguments.num_candidates
        self.spaces = {None: self.space} | {parts: self.elastic_space(parts) for parts in (QUARTERS, HALVES)}
        for parts, space in self.spaces.items():
            space.to_json_file(self.space_file(parts))
        widest = self.teacher.model.config.conv_dim
        half = tuple(width // 2 for width in widest)
        self.narrow = {
            f"{name}, half the ear": dataclasses.replace(self.subnets[name], conv_dim=half)
            for name in ("middle", "smallest")
        }
        self.supernet = LightHubertModel.from_pretrained(TEACHER, search_space=self.spaces[QUARTERS])
        self.ordered = self.output / "ordered"
        if not (self.ordered / "model.safetensors").exists():
            options = {"model_name_or_path": TEACHER, "search_space": self.space_file(QUARTERS)}
            options |= {"train_file": self.train_file, "output_dir": self.ordered}
            self.run_script("order_channels", options)

    def elastic_space(self, parts: tuple[int, ...]) -> SearchSpace:
        """With those quarters of the teacher's channels to choose from, for each convolution."""
        widest = self.teacher.model.config.conv_dim
        choices = tuple(tuple(width * part // 4 for part in parts) for width in widest)
        return dataclasses.replace(self.space, conv_dim=choices)

    def space_file(self, parts: tuple[int, ...] | None) -> Path:
        return self.output / f"search_space{'-'.join(map(str, ('', *(parts or ()))))}.json"

    def macs(self, subnet: Subnet) -> float:
        """MACs per second of audio."""
        return sum(self.macs_of_parts(subnet))

    def macs_of_parts(self, subnet: Subnet) -> tuple[float, float]:
        """Of the convolutions, and of the rest."""
        with torch.device("meta"):
            model = LightHubertModel(self.supernet.config.cut_to(self.spaces[QUARTERS].resolve(subnet)))
        costs = profile_subnet(model, seconds=1.0)
        of_convolutions = sum(cost.macs for cost in costs if cost.part == "feature encoder")
        return of_convolutions, sum(cost.macs for cost in costs) - of_convolutions

    def macs_of_step(self, parts: tuple[int, ...] | None, frozen: bool = False, warms_up: bool = False) -> float:
        """MACs of a training step for a second of audio, in the mean over what is drawn: a backward pass takes twice
        its forward pass, the teacher has none. In a warm-up, student and teacher have their convolutions alone."""
        drawn = (draw_subnets(self.spaces[parts], RECIPE["sampling"], 0, step)[0] for step in range(100))
        teacher, of_student = self.macs_of_parts(self.space.largest), []
        for ear, rest in map(self.macs_of_parts, drawn):
            of_student.append((1 if frozen else 3) * ear + (0 if warms_up else 3 * rest))
        return statistics.mean(of_student) + (teacher[0] if warms_up else sum(teacher))

    def controls(self, seed: int) -> dict[str, dict[str, float]]:
        """Untrained slices of the teacher, and random weights."""
        rows = dict(self.untrained_rows)
        for name, subnet in self.narrow.items():
            set_seed(seed)
            random_weights = LightHubertModel(self.supernet.config.cut_to(subnet))
            rows[f"{name}, random weights"] = self.measured(random_weights, subnet)
        return rows

    @cached_property
    def untrained_rows(self) -> dict[str, dict[str, float]]:
        ordered = LightHubertModel.from_pretrained(self.ordered)
        rows = {"teacher": self.measured(self.teacher.model, self.space.largest)}
        for name, subnet in (self.subnets | self.narrow).items():
            rows[f"{name}, slice of the teacher"] = self.measured(self.supernet.extract_subnet(subnet), subnet)
            rows[f"{name}, slice, ordered"] = self.measured(ordered.extract_subnet(subnet), subnet)
        return rows

    def measured(self, model: PreTrainedModel, subnet: Subnet) -> dict[str, Any]:
        """Cost and quality of a cut model, and what it is."""
        return {"subnet": subnet.to_dict(), "macs": self.macs(subnet)} | self.bench.measure(model)

    def folder(self, variant: str, seed: int) -> Path:
        return self.output / f"{variant.replace(' ', '-').replace(',', '')}-{seed}"

    def run(self, variant: str, seed: int) -> dict[str, dict[str, float]]:
        """Distils `variant` and measures its subnets."""
        folder, options = self.folder(variant, seed), dict(VARIANTS[variant])
        parts, warm_up, start = options.pop("parts", None), options.pop("warm_up", 0), None
        if options.pop("ordered", False):
            start = self.ordered
        recipe = RECIPE | {"share_feature_encoder": False, "search_space": self.space_file(parts)}
        budget = self.arguments.passes * self.macs_of_step(None)
        if warm_up:
            first = {"target": "feature_encoder", "max_steps": warm_up, "student_name_or_path": start}
            start = folder.with_name(f"{folder.name}-warm")
            self.distil(recipe | first, seed, start)
            budget -= warm_up * self.macs_of_step(parts, warms_up=True)
        steps = int(budget / self.macs_of_step(parts, options.get("freeze_feature_encoder", False)))
        self.distil(recipe | options | {"student_name_or_path": start, "max_steps": steps}, seed, folder)
        trained = LightHubertForPreTraining.from_pretrained(folder)
        with self.measuring:
            subnets = dict(self.subnets)
            if parts is not None:
                subnets |= self.narrow | {"within 40 %": self.best_within_budget(trained)}
            return {
                name: {"steps": steps} | self.measured(trained.hubert.extract_subnet(subnet), subnet)
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
        losses = evaluate(trained, self.teacher, batches, candidates, Accelerator(cpu=True))
        return candidates[min(losses, key=losses.__getitem__)]


def table(results: Results) -> str:
    """Markdown: a line for each subnet of each variant, mean and deviation over the seeds."""
    measures = [name for name in ("r2", "digit", "speaker") if name in any_run(results)["teacher"]]
    rows = []
    for variant, runs in results.items():
        for name in next(iter(runs.values())):
            found = [run[name] for run in runs.values()]
            steps = found[0].get("steps", "")
            cells = [variant, name, str(steps), f"{statistics.mean(row['macs'] for row in found) / 1e6:.1f}"]
            rows.append(cells + [summary([row[each] for row in found], percent=each != "r2") for each in measures])
    return markdown_table(
        ("", "subnet", "steps", "MMAC/s", *("R2" if each == "r2" else each for each in measures)), rows
    )


def any_run(results: Results) -> Mapping[str, Mapping[str, float]]:
    """Of the controls."""
    return next(iter(results["controls"].values()))


def mean(results: Results, variant: str, subnet: str, measure: str = "r2") -> float:
    return statistics.mean(run[subnet][measure] for run in results[variant].values())


def margins(results: Results) -> str:
    """What the benchmark asks for, in the mean of the seeds."""
    lines = []
    for variant in [name for name in results if name.startswith("from")]:
        half = "middle, half the ear"
        gaps = [f"{mean(results, variant, half) - mean(results, 'full ear', 'middle'):+.3f} in R2 (bar -0.030)"]
        for probe in ("digit", "speaker"):
            if probe in any_run(results)["teacher"]:
                gap = mean(results, variant, half, probe) - mean(results, "full ear", "middle", probe)
                gaps.append(f"{100 * gap:+.1f} points of {probe} (bar -4)")
        gain = mean(results, variant, "within 40 %") - mean(results, "full ear", "smallest")
        lines.append(
            f"{variant}: middle with half the ear against the full one: {', '.join(gaps)}; within 40 % of the MACs"
            f" against the smallest with the full ear, {gain:+.3f} in R2 (bar 0)"
        )
    return "\n".join(f"- {line}" for line in lines)


def speed_ups(ear: NarrowEar, variant: str, rows: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, float]:
    """How many times faster than the teacher each cut subnet hears a clip of 5 s, taking turns with all the others."""
    trained = LightHubertModel.from_pretrained(ear.folder(variant, seed))

    def listening(model: PreTrainedModel) -> Runner:
        @torch.inference_mode()
        def run(audio: np.ndarray) -> None:
            model(torch.from_numpy(audio))

        return run

    runners = {name: listening(trained.extract_subnet(row["subnet"]).eval()) for name, row in rows.items()}
    times = alternating_times({"reference": listening(ear.teacher.model)} | runners, noise(1, 5), repeats=30)
    return {name: speed_up(times, name) for name in rows}


def plot(ear: NarrowEar, results: Results, seed: int, path: Path) -> None:
    """R2, and accuracy of the probes, against speed: subnets with the full ear, and of the best elastic variant."""
    elastic = [variant for variant in results if variant.startswith("from")]
    best = max(elastic, key=lambda variant: mean(results, variant, "middle, half the ear"))
    labels = {"r2": "R2 of the target", "digit": "digit probe, accuracy", "speaker": "speaker probe, accuracy"}
    measures = [measure for measure in labels if measure in any_run(results)["teacher"]]
    figure, panels = pyplot.subplots(1, len(measures), figsize=(4.5 * len(measures), 4), squeeze=False)
    for variant, marker in (("full ear", "s"), (best, "o")):
        rows = results[variant][str(seed)]
        speeds = speed_ups(ear, variant, rows, seed)
        for axes, measure in zip(panels[0], measures, strict=True):
            points = [(speeds[name], mean(results, variant, name, measure)) for name in rows]
            axes.scatter(*zip(*points, strict=True), marker=marker, label=variant)
            for name, point in zip(rows, points, strict=True):
                axes.annotate(name, point, fontsize=7, xytext=(3, 3), textcoords="offset points")
    for axes, measure in zip(panels[0], measures, strict=True):
        axes.plot(1, mean(results, "controls", "teacher", measure), "k*", markersize=11, label="teacher")
        axes.set(xlabel="speed, times that of the teacher", ylabel=labels[measure])
        axes.margins(x=0.25)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="upper center", ncols=3)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    (arguments,) = HfArgumentParser(EarArguments, description=__doc__).parse_args_into_dataclasses()
    prepare_process()
    begin, ear = time.perf_counter(), NarrowEar(arguments)
    results = run_all(ear, arguments.seeds, arguments.only or list(VARIANTS))
    report = f"{table(results)}\n\n{margins(results)}\n"
    (ear.output / "results.md").write_text(report)
    plot(ear, results, arguments.seeds[0], ear.output / "quality-against-speed.png")
    print(f"\n{report}\n{(time.perf_counter() - begin) / 60:.0f} minutes; all in {ear.output}")


if __name__ == "__main__":
    main()
