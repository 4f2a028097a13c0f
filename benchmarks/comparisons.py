"""Results of runs over seeds: their means, and whether one model is better than another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighthubert_training.runs.tables import mean_and_deviation
from modeling_lighthubert.files import write_text


Results = Mapping[str, Mapping[str, Any]]
"""Results by the name of the run and its seed."""


def report(file: Path, table: str, findings: Sequence[str] = ()) -> None:
    """Prints a table and a list of findings, in Markdown, and writes them to a file."""
    text = "\n".join([table, "", *(f"- {finding}" for finding in findings)]).rstrip() + "\n"
    write_text(file, text)
    print(text, f"all in {file.parent}", sep="\n")


def summary(values: Sequence[float], percent: bool) -> str:
    """Mean and standard deviation, in percent or as they are."""
    return mean_and_deviation(values, 1, 100) if percent else mean_and_deviation(values, 3)


def mean_alone(values: Sequence[float], measure: str) -> str:
    """The mean: of R2 as it is, of other measures in percent."""
    digits, scale = (3, 1) if measure.startswith("r2") else (1, 100)
    return f"{scale * np.mean(values):.{digits}f}" if values else ""


def mean_and_each(values: Sequence[float], measure: str) -> str:
    """The mean, and every seed; the value alone where it is the same for all."""
    each = [mean_alone([value], measure) for value in values]
    mean = mean_alone(values, measure)
    return mean if len(set(each)) == 1 and len(each) > 1 else f"{mean} ({' '.join(each)})" if values else ""


def measures_of(results: Results) -> list[str]:
    """Names of all measures."""
    made = (row for runs in results.values() for run in runs.values() for row in run.values())
    return list(dict.fromkeys(name for row in made for name, value in row.items() if isinstance(value, float)))


def is_error(measure: str) -> bool:
    """Whether less of a measure is better."""
    return bool({"wer", "cer", "per"} & set(measure.replace(",", "").split()))


def over_seeds(results: Results, run: str, row: str, measure: str) -> dict[str, float]:
    """A measure by seed, of the row of that name in a run."""
    runs = results.get(run, {})
    return {seed: made[row][measure] for seed, made in sorted(runs.items()) if measure in made.get(row, {})}


@dataclass(frozen=True)
class Margin:
    """How much better one model is than another in a measure, by seeds that both have.

    Attributes:
        gains: of each seed, positive where it is better.
        relative: mean of the gains over the size of the mean of the other.
    """

    gains: Sequence[float]
    relative: float

    @property
    def verdict(self) -> int:
        """1 if it is better in every seed, -1 if it is worse in every seed, else 0: no order can be told."""
        return int(all(gain > 0 for gain in self.gains)) - int(all(gain < 0 for gain in self.gains))


def margin(ours: Mapping[str, float], theirs: Mapping[str, float], measure: str) -> Margin | None:
    """Of two rows; `None` without seeds that both have."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    sign = -1 if is_error(measure) else 1
    gains = [sign * (ours[seed] - theirs[seed]) for seed in seeds]
    return Margin(gains, float(np.mean(gains) / abs(np.mean([theirs[seed] for seed in seeds]))))
