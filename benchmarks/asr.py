"""What one fine-tuning for speech recognition is worth that serves every subnet.

    python benchmarks/asr.py --speech_dir speech

For each seed a supernet is distilled by the recipe of the benchmarks and fine-tuned with CTC on all that is
transcribed: once for all, with and without in-place distillation, and each subnet alone, cut first, in the same number
of steps. What distillation itself is worth is in `gains.py`.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import comparisons
import numpy as np
from common import BenchArguments, Table
from comparisons import Results
from measures import TEXT
from processes import parse
from runner import Runner

from lighthubert_training.error_rates import character_error_rate, word_error_rate
from lighthubert_training.recognition.recognizer import Recognizer
from lighthubert_training.runs.options import option
from lighthubert_training.runs.plots import new_figure, save_figure
from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert.errors import run
from modeling_lighthubert.profiling import macs_per_second


ONCE_FOR_ALL = {"once for all": 0.0, "once for all, taught by the largest": 0.1}
"""Weight of in-place distillation of each."""


@dataclass(kw_only=True)
class RecognitionArguments(BenchArguments):
    """What is distilled and fine-tuned, for how long, and what becomes of it."""

    measures: list[str] = option([], "None: error rates are what is measured.")
    steps: int = option(1000, "Steps of each fine-tuning.")
    num_random_subnets: int = option(20, "Random subnets to transcribe with, once for all.")
    num_random_alone: int = option(20, "How many of them are fine-tuned alone, too.")


class Recognition(Table):
    """Fine-tuned supernets and subnets, and their error rates."""

    name = "asr"
    arguments: RecognitionArguments

    def __init__(self, arguments: RecognitionArguments):
        super().__init__(arguments)
        draw = Random("evaluation")
        self.subnets |= {f"random_{n}": self.space.sample(draw) for n in range(arguments.num_random_subnets)}

    @classmethod
    def names(cls, arguments: BenchArguments) -> list[str]:
        assert isinstance(arguments, RecognitionArguments)
        alone = ["smallest", "middle", "largest", *(f"random_{n}" for n in range(arguments.num_random_alone))]
        return [*ONCE_FOR_ALL, *(f"{name} alone" for name in alone)]

    @classmethod
    def cost(cls, name: str, arguments: BenchArguments) -> tuple[int, int]:
        assert isinstance(arguments, RecognitionArguments)
        return arguments.steps * (6 if name in ONCE_FOR_ALL else 1), 0  # six subnets a step

    def subnet_file(self, name: str, folder: Path) -> Path:
        file = folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        self.subnets[name].to_json_file(file)
        return file

    def run(self, name: str, seed: int) -> dict[str, dict[str, Any]]:
        """Fine-tunes, and transcribes the test recordings with every subnet of the run."""
        slug = "".join(each if each.isalnum() else "-" for each in f"{name}-{seed}")
        folder, row, once_for_all = self.output / "asr" / slug, name.removesuffix(" alone"), name in ONCE_FOR_ALL
        options: dict[str, Any] = {"max_steps": self.arguments.steps}
        if once_for_all:
            options |= {"once_for_all": True, "distillation_weight": ONCE_FOR_ALL[name]}
        else:
            options["subnet"] = self.subnet_file(row, folder)
        self.fine_tune(self.distil(seed), folder, seed, self.text_files, **options)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        seconds = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
        files = {each: str(self.subnet_file(each, folder)) for each in self.subnets} if once_for_all else {row: None}
        rows = {each: self.error_rates(folder, file) for each, file in files.items()}
        return {each: {"training_seconds": seconds, **rates} for each, rates in rows.items()}

    def error_rates(self, folder: Path, subnet: str | None) -> dict[str, float]:
        """Error rates on the test recordings."""
        recognizer, numbers = Recognizer.from_pretrained(folder, subnet=subnet), self.measures.transcribed("test")
        speech = self.measures.speech
        waveforms = [speech.recordings[number].waveform.astype(np.float32) for number in numbers]
        texts = [transcript.text for transcript in recognizer.transcribe(waveforms)]
        references = [TEXT.normalize(text) for text in speech.labels(numbers, "text")]
        return {"wer": word_error_rate(references, texts), "cer": character_error_rate(references, texts)}


def rates(results: Results, kind: str, subnet: str, measure: str = "wer") -> dict[str, float]:
    """Error rates by seed."""
    return comparisons.over_seeds(results, kind, subnet, measure)


def mean_rates(results: Results, kind: str, subnets: Sequence[str], measure: str) -> list[float]:
    """For each seed, the mean of the subnets that there is a run of; `kind` may have a place for their name."""
    found = [rates(results, kind.format(name), name, measure) for name in subnets]
    seeds = sorted({seed for each in found for seed in each})
    return [statistics.mean(each[seed] for each in found if seed in each) for seed in seeds]


def table(results: Results, subnets: Sequence[str]) -> str:
    """Markdown: error rates of each subnet, fine-tuned alone and once for all."""
    kinds = {"alone": "{} alone"} | {kind: kind for kind in ONCE_FOR_ALL}
    columns = [("WER", kind) for kind in kinds] + [("CER", kind) for kind in ("alone", "once for all")]
    drawn = [name for name in subnets if name.startswith("random")]
    rows, shown = [], {name: [name] for name in subnets if name not in drawn}
    for title, names in [*shown.items(), ("random, mean", drawn)]:
        found = [mean_rates(results, kinds[kind], names, measure.lower()) for measure, kind in columns]
        rows.append([title, *(comparisons.summary(values, percent=True) for values in found)])
    return markdown_table(["", *(f"{measure} {kind}" for measure, kind in columns)], rows)


def margins(results: Results, subnets: Sequence[str]) -> list[str]:
    """What one fine-tuning for all subnets costs, in the mean of the seeds."""
    lines = []
    alone = {name: rates(results, f"{name} alone", name) for name in subnets if f"{name} alone" in results}
    for kind in [kind for kind in ONCE_FOR_ALL if kind in results and alone]:
        gaps = {}
        for name, own in alone.items():
            together = rates(results, kind, name)
            gaps[name] = statistics.mean(together[seed] - own[seed] for seed in together.keys() & own.keys())
        largest = max(gaps, key=gaps.__getitem__)
        cost = statistics.mean(rates(results, kind, largest, "training_seconds").values())
        each = [statistics.mean(rates(results, f"{name} alone", name, "training_seconds").values()) for name in alone]
        lines.append(
            f"{kind}: {100 * statistics.mean(gaps.values()):+.1f} points of WER against {len(alone)} subnets alone in"
            f" the mean, {100 * gaps[largest]:+.1f} at most ({largest}); {cost / sum(each):.2f} of their training time"
            f" together, {cost / statistics.mean(each):.1f} times that of one"
        )
    stuck = [f"{name} ({seed})" for name, own in alone.items() for seed, rate in own.items() if rate > 0.9]
    return [*lines, f"alone, blanks to the end: {', '.join(stuck) or 'none'}"]


def plot(results: Results, macs: Mapping[str, float], path: Path) -> None:
    """Word error rate against MACs: every subnet of the supernets, and those fine-tuned alone."""
    figure, (axes,) = new_figure()
    kinds = {kind: [(name, kind) for name in macs] for kind in ONCE_FOR_ALL if kind in results}
    kinds["each alone"] = [(name, f"{name} alone") for name in macs if f"{name} alone" in results]
    for (label, pairs), marker in zip(kinds.items(), ("o", "s", "x")):
        means = [statistics.mean(rates(results, kind, name).values()) for name, kind in pairs]
        points = [(macs[name] / 1e6, 100 * mean) for (name, _), mean in zip(pairs, means, strict=True)]
        if points:
            axes.scatter(*zip(*points), label=label, marker=marker, s=25)
    axes.set(xlabel="million MACs per second of audio", ylabel="word error rate, %")
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    arguments = parse(RecognitionArguments, __doc__)
    runner = Runner(Recognition, arguments)
    results, recognition = runner(), Recognition(arguments)
    subnets = list(recognition.subnets)
    comparisons.report(runner.file.with_suffix(".md"), table(results, subnets), margins(results, subnets))
    macs = {name: macs_per_second(recognition.untrained, subnet) for name, subnet in recognition.subnets.items()}
    plot(results, macs, runner.file.with_suffix(".png"))


if __name__ == "__main__":
    run(main)
