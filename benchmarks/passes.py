"""What once for all costs, over the passes of distillation, and what recovery gives back.

    python benchmarks/passes.py --speech_dir speech --held_out_speaker theo --held_out_language it

A supernet is distilled for more and more passes, and so is its smallest and its middle subnet alone, with the same
number of passes each. Recovery cuts a subnet out of the supernet of `--passes` and distils it further by itself.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comparisons
from common import ALONE, SUBNETS, BenchArguments, Table
from comparisons import Results
from processes import parse
from runner import Runner

from lighthubert_training.runs.options import option
from lighthubert_training.runs.plots import new_figure, save_figure
from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert.errors import run
from modeling_lighthubert.loading import load_model


SUPERNET, SHAPES = "once for all", ("middle", "smallest")


@dataclass(kw_only=True)
class PassesArguments(BenchArguments):
    """What is distilled, for how long, and what becomes of it."""

    measures: list[str] = option(["r2", "probes"], "Groups of measures.")
    all_passes: list[int] = option([300, 600, 1200, 3000], "Passes of a subnet that distillations have.")
    recovery_steps: list[int] = option([60, 120, 300, 600], "Steps of recovery.")


class Passes(Table):
    """Distillations of several lengths, and recoveries."""

    name = "passes"
    arguments: PassesArguments

    @classmethod
    def names(cls, arguments: BenchArguments) -> list[str]:
        assert isinstance(arguments, PassesArguments)
        runs = [(kind, n) for n in arguments.all_passes for kind in (SUPERNET, *(f"{s}, {ALONE}" for s in SHAPES))]
        recoveries = [recovery(shape, steps) for steps in arguments.recovery_steps for shape in SHAPES]
        return [*(f"{kind}, {passes} passes" for kind, passes in runs), *recoveries]

    @classmethod
    def cost(cls, name: str, arguments: BenchArguments) -> tuple[int, int]:
        return int(name.split()[-2]), len(SUBNETS) if name.startswith(SUPERNET) else 1

    def run(self, name: str, seed: int) -> dict[str, dict[str, Any]]:
        shape, kind, *rest = name.split(", ")
        if kind == "recovered":
            steps = int(rest[0].split()[0])
            start = {"student_name_or_path": self.distil(seed), "subnet": shape, "search_space": None}
            recovered = self.distil(seed, **start, sampling="largest", max_steps=steps)
            return {shape: self.measure(load_model(recovered), seed)}
        passes = int(name.split()[-2])
        if shape == SUPERNET:
            supernet = load_model(self.distil(seed, max_steps=passes))
            return {row: self.measure(supernet.extract_subnet(row), seed) for row in SUBNETS}
        model = self.distil_alone(ALONE, self.subnets[shape], seed, max_steps=passes)
        return {shape: self.measure(model, seed)}


def recovery(shape: str, steps: int) -> str:
    """Name of a recovery."""
    return f"{shape}, recovered, {steps} steps"


def table(results: Results, measures: list[str]) -> str:
    """Markdown: mean and every seed of each run and subnet."""
    rows = []
    for name, runs in results.items():
        for row in next(iter(runs.values())):
            values = [list(comparisons.over_seeds(results, name, row, measure).values()) for measure in measures]
            cells = (comparisons.mean_and_each(each, measure) for each, measure in zip(values, measures, strict=True))
            rows.append([name, row, *cells])
    return markdown_table(["", "subnet", *measures], rows)


def plot(results: Results, arguments: PassesArguments, path: Any) -> None:
    """R2 over passes: in the supernet, alone, and recovered after the passes of the supernet."""
    figure, panels = new_figure(len(SHAPES), (10, 4.5))
    for axes, shape in zip(panels, SHAPES, strict=True):
        lines: Mapping[str, list[tuple[int, str, str]]] = {
            f"{shape}, in the supernet": [(n, f"{SUPERNET}, {n} passes", shape) for n in arguments.all_passes],
            f"{shape}, alone": [(n, f"{shape}, {ALONE}, {n} passes", shape) for n in arguments.all_passes],
            "largest, in the supernet": [(n, f"{SUPERNET}, {n} passes", "largest") for n in arguments.all_passes],
            f"{shape}, recovered": [
                (arguments.passes + n, recovery(shape, n), shape) for n in arguments.recovery_steps
            ],
        }
        for label, runs in lines.items():
            found = [(passes, comparisons.over_seeds(results, name, row, "r2")) for passes, name, row in runs]
            points = [(passes, statistics.mean(values.values())) for passes, values in found if values]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set(xlabel="passes of a subnet", ylabel="R2 of the target", xscale="log")
        axes.set_xticks(arguments.all_passes, labels=map(str, arguments.all_passes), minor=False)
        axes.minorticks_off()
        axes.legend(fontsize="small")
    save_figure(figure, path)


def main() -> None:
    arguments = parse(PassesArguments, __doc__)
    runner = Runner(Passes, arguments)
    results = runner()
    comparisons.report(runner.file.with_suffix(".md"), table(results, comparisons.measures_of(results)))
    plot(results, arguments, runner.file.with_suffix(".png"))


if __name__ == "__main__":
    run(main)
