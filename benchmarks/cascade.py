"""What a cascade of subnets saves: word errors, MACs and time, against the largest subnet for all recordings.

    python benchmarks/cascade.py --speech_dir speech --held_out_speaker theo

For each seed a supernet is distilled, and fine-tuned once for all on strings of digits and on all that is transcribed.
Every other test recording chooses the least confidence; all figures are of the others. The plot has the whole curve of
these, which no choice has a part in.
"""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comparisons
import numpy as np
from common import BenchArguments, Table
from comparisons import Results
from measures import TEXT
from processes import parse
from runner import Runner

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.strings import SAMPLING_RATE, join_words, read_parquet
from lighthubert_training.error_rates import word_error_rate
from lighthubert_training.recognition.cascade import Calibration, CascadeRecognizer
from lighthubert_training.recognition.recognizer import Recognizer
from lighthubert_training.runs.options import option
from lighthubert_training.runs.plots import new_figure, save_figure
from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert.errors import UserError, run
from modeling_lighthubert.loading import load_model
from modeling_lighthubert.profiling import macs_per_second, median_ratio


CASCADES = ("smallest,largest", "middle,largest", "smallest,middle,largest")
TASKS = ("digits", "prompts")
ALLOWED = 0.005
"""Word error rate that a cascade may lose against the largest subnet."""


@dataclass(kw_only=True)
class CascadeArguments(BenchArguments):
    """What is fine-tuned, and for how long."""

    measures: list[str] = option([], "None: error rates are what is measured.")
    steps: int = option(1000, "Steps of each fine-tuning.")
    num_random_subnets: int = option(1, "Random subnets of each step, beside the largest and the smallest.")
    repeats: int = option(3, "Times that recognition is timed.")


class Cascades(Table):
    """Fine-tuned supernets, and what cascades of their subnets cost and lose."""

    name = "cascade"
    arguments: CascadeArguments

    @classmethod
    def names(cls, arguments: BenchArguments) -> list[str]:
        return list(TASKS)

    @classmethod
    def cost(cls, name: str, arguments: BenchArguments) -> tuple[int, int]:
        assert isinstance(arguments, CascadeArguments)
        return arguments.passes + arguments.steps * (2 + arguments.num_random_subnets), 0

    def files(self, task: str) -> Mapping[str, Sequence[Path]]:
        """Parquet files with `text`, by part."""
        if task == "prompts":
            return self.text_files
        files = {part: self.output / f"cascade/strings-{part}.parquet" for part in ("train", "test")}
        for (part, file), count in zip(files.items(), (2000, 300), strict=True):
            words = self.arguments.files.get(("digits", part))
            if words is None:
                raise UserError(f"--speech_dir {self.arguments.speech_dir} has no digits-{part}.parquet")
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                join_words(read_parquet(words), count, random.Random(0)).to_parquet(file)
        return {part: [file] for part, file in files.items()}

    def run(self, name: str, seed: int) -> dict[str, dict[str, Any]]:
        folder, files = self.output / "cascade" / f"{name}-{seed}", self.files(name)
        options = {"once_for_all": True, "num_random_subnets": self.arguments.num_random_subnets}
        self.fine_tune(self.distil(seed), folder, seed, files, max_steps=self.arguments.steps, **options)
        rows = [row for file in files["test"] for row in read_parquet(file)]
        waveforms = [load_waveform(row["audio"], SAMPLING_RATE) for row in rows]
        texts = [TEXT.normalize(row["text"]) for row in rows]
        halves = [(waveforms[half::2], texts[half::2]) for half in (0, 1)]
        return {cascade: self.cascade(folder, cascade, *halves) for cascade in CASCADES}

    def cascade(
        self,
        model: Path,
        names: str,
        chosen_on: tuple[Sequence[np.ndarray], Sequence[str]],
        tested_on: tuple[Sequence[np.ndarray], Sequence[str]],
    ) -> dict[str, Any]:
        """Costs and errors on `tested_on` at the threshold that is chosen on the other recordings."""
        recognizer = CascadeRecognizer.from_pretrained(model, names.split(","))
        calibration, test = Calibration(recognizer), Calibration(recognizer)
        calibration.add(*chosen_on)
        test.add(*tested_on)
        recognizer.min_confidence = calibration.choose(max_wer=calibration.curve()[-1].wer + ALLOWED).min_confidence
        for stage in recognizer.stages:
            stage.seconds = 0.0
        largest = Recognizer.from_pretrained(model, subnet="largest")
        runs, times = {"cascade": recognizer, "largest": largest}, {"cascade": [], "largest": []}
        texts: dict[str, list[str]] = {}
        for _ in range(self.arguments.repeats):
            for name, each in runs.items():
                start = time.perf_counter()
                texts[name] = [transcript.text for transcript in each.transcribe(tested_on[0])]
                times[name].append(time.perf_counter() - start)
        supernet = load_model(model)
        alone = macs_per_second(supernet, supernet.search_space.largest)
        return {
            **{f"wer, {name}": word_error_rate(tested_on[1], found) for name, found in texts.items()},
            "wer, first": test.curve()[0].wer,
            "min_confidence": recognizer.min_confidence,
            "share of macs": recognizer.macs_per_second / alone,
            "share of time": 1 / median_ratio(times["largest"], times["cascade"]),
            "curve": [[point.macs / alone, point.wer] for point in test.curve()],
        }


def table(results: Results) -> str:
    """Markdown: mean and every seed of each cascade."""
    columns = ("wer, first", "wer, largest", "wer, cascade", "share of macs", "share of time", "min_confidence")
    rows = []
    for task in (task for task in TASKS if task in results):
        for cascade in CASCADES:
            values = (list(comparisons.over_seeds(results, task, cascade, name).values()) for name in columns)
            rows.append([f"{task}: {cascade}", *(comparisons.mean_and_each(each, "wer") for each in values)])
    return markdown_table(["", *columns], rows)


def plot(results: Results, path: Path) -> None:
    """Word error rate against the share of the largest subnet's MACs, at every threshold, in the mean of the seeds."""
    tasks = [task for task in TASKS if task in results]
    figure, all_axes = new_figure(len(tasks))
    for axes, task in zip(all_axes, tasks, strict=True):
        for cascade in CASCADES:
            curves = np.array([rows[cascade]["curve"] for rows in results[task].values()]).mean(0)
            axes.plot(100 * curves[:, 0], 100 * curves[:, 1], label=cascade.replace(",", ", "))
        of_largest = statistics.mean(rows[CASCADES[0]]["wer, largest"] for rows in results[task].values())
        axes.axhline(100 * of_largest, color="grey", linestyle=":", label="largest alone")
        axes.set(title=task, xlabel="MACs, % of the largest subnet's", ylabel="word error rate, %")
        axes.legend()
    save_figure(figure, path)


def main() -> None:
    runner = Runner(Cascades, parse(CascadeArguments, __doc__))
    results = runner()
    comparisons.report(runner.file.with_suffix(".md"), table(results))
    plot(results, runner.file.with_suffix(".png"))


if __name__ == "__main__":
    run(main)
