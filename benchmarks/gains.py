"""What a distilled subnet gains over what one has without distilling, and over other ways of distilling.

    python benchmarks/gains.py --speech_dir speech --held_out_speaker theo --held_out_language it

A supernet is distilled once for all. For its smallest and its middle subnet there are all controls: random weights;
the slice of the teacher; the teacher's feature encoder below a random transformer; the same shape distilled alone in
as many passes; and DistilHuBERT's and STaRHuBERT's way at the same cost. Each is measured by R2 of the target, linear
probes of frozen features, a phone probe, fine-tuning with few labels, and two tasks of SUPERB (`measures.py`).
"""

from collections.abc import Sequence
from typing import Any

import comparisons
from common import SUBNETS, TRAINED_ALONE, UNTRAINED, BenchArguments, Table
from comparisons import Results
from processes import parse
from runner import Runner

from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert.errors import run
from modeling_lighthubert.loading import load_model


SUPERNET, TEACHER = "distilled once for all", "teacher"
SHAPES = ("middle", "smallest")
KINDS = (SUPERNET, *TRAINED_ALONE, *UNTRAINED)
OVERVIEW = (
    *("r2", "r2, held-out speaker", "r2, held-out language", "r2 of masked frames"),
    *("digit", "keyword", "speaker", "language", "slots", "per", "cer, 1 min", "cer, 10 min", "wer, 10 min"),
    *("ks accuracy, people", "sf f1, people"),
)
"""Measures of the first table."""


class Gains(Table):
    """A supernet and all its controls."""

    name = "gains"

    @classmethod
    def names(cls, arguments: BenchArguments) -> list[str]:
        controls = [f"{shape}, {kind}" for kind in (*UNTRAINED, *TRAINED_ALONE) for shape in SHAPES]
        return [SUPERNET, TEACHER, *controls]

    @classmethod
    def cost(cls, name: str, arguments: BenchArguments) -> tuple[int, int]:
        trained = name == SUPERNET or name.partition(", ")[2] in TRAINED_ALONE
        return arguments.passes if trained else 0, len(SUBNETS) if name == SUPERNET else 1

    def run(self, name: str, seed: int) -> dict[str, dict[str, Any]]:
        if name == SUPERNET:
            supernet = load_model(self.distil(seed))
            return {row: self.measure(supernet.extract_subnet(row), seed) for row in SUBNETS}
        if name == TEACHER:
            return {TEACHER: self.measure(self.untrained.extract_subnet("largest"), seed)}
        shape, _, kind = name.partition(", ")
        make = self.control if kind in UNTRAINED else self.distil_alone
        return {shape: self.measure(make(kind, self.subnets[shape], seed), seed)}


def rows_of(results: Results) -> dict[str, tuple[str, str]]:
    """Run and row of each line of the table, by its title."""
    lines = {TEACHER: (TEACHER, TEACHER), f"largest, {SUPERNET}": (SUPERNET, "largest")}
    for shape in SHAPES:
        for kind in KINDS:
            title = f"{shape}, {kind}"
            lines[title] = (SUPERNET if kind == SUPERNET else title, shape)
    return {
        title: (made, row)
        for title, (made, row) in lines.items()
        if any(row in rows for rows in results.get(made, {}).values())
    }


def overview(results: Results, measures: Sequence[str]) -> str:
    """Markdown: the mean of each model."""
    rows = []
    for title, (made, row) in rows_of(results).items():
        values = {measure: list(comparisons.over_seeds(results, made, row, measure).values()) for measure in measures}
        rows.append([title, *(comparisons.mean_alone(each, measure) for measure, each in values.items())])
    return markdown_table(["", *measures], rows)


def table(results: Results, shape: str, measures: Sequence[str]) -> str:
    """Markdown: mean and every seed of each measure, of the models of a shape and of the teacher."""
    lines = {title: line for title, line in rows_of(results).items() if title.split(", ")[0] in (shape, TEACHER)}
    rows = []
    for measure in measures:
        values = (list(comparisons.over_seeds(results, *line, measure).values()) for line in lines.values())
        rows.append([measure, *(comparisons.mean_and_each(each, measure) for each in values)])
    return markdown_table(["", *(title.removeprefix(f"{shape}, ") for title in lines)], rows)


def findings(results: Results, measures: list[str]) -> list[str]:
    """For each shape and control: in how many measures the distilled subnet is better, and by how much."""
    lines, rows = [], rows_of(results)
    for shape in SHAPES:
        ours = rows.get(f"{shape}, {SUPERNET}")
        for kind in KINDS[1:]:
            theirs = rows.get(f"{shape}, {kind}")
            if ours is None or theirs is None:
                continue
            found = {}
            for measure in measures:
                pair = (comparisons.over_seeds(results, *line, measure) for line in (ours, theirs))
                if margin := comparisons.margin(*pair, measure):
                    found[measure] = margin
            better = sum(margin.relative > 0 for margin in found.values())
            always, never = ([name for name, margin in found.items() if margin.verdict == sign] for sign in (1, -1))
            errors = [
                f"{abs(margin.relative):.0%} {'fewer' if margin.relative > 0 else 'more'} {name}"
                for name, margin in found.items()
                if comparisons.is_error(name)
            ]
            lines.append(
                f"{shape}, {SUPERNET}, against {kind}: better in the mean in {better} of {len(found)} measures, and in"
                f" every seed in {len(always)}; worse in every seed in {', '.join(never) or 'none'}; errors in the"
                f" mean: {', '.join(errors) or 'none measured'}"
            )
    return lines


def main() -> None:
    arguments = parse(BenchArguments, __doc__)
    runner = Runner(Gains, arguments)
    results = runner()
    measures = comparisons.measures_of(results)
    tables = [overview(results, [measure for measure in OVERVIEW if measure in measures])]
    tables += [table(results, shape, measures) for shape in ("largest", *SHAPES)]
    comparisons.report(runner.file.with_suffix(".md"), "\n\n".join(tables), findings(results, measures))


if __name__ == "__main__":
    run(main)
