"""What fine-tuning for speech recognition is worth: each subnet alone, or all of them at once.

    python benchmarks/asr.py
    python benchmarks/asr.py --train_file digits-train.parquet --test_file digits-test.parquet --held_out_speaker theo

For each seed a supernet is distilled by training/lighthubert_training/configs/distillation/small_budget.yaml and fine-tuned by
training/lighthubert_training/configs/recognition/ctc_small_budget.yaml, on strings of words of one speaker with pauses of random length: once for all,
with and without in-place distillation, and each subnet alone, cut first, in the same number of steps. The control has
the shape of the middle subnet and random weights. With `--held_out_speaker` a second round leaves that speaker out of
all training, and transcribes nobody else. Two processes make the runs, with one thread each; a run that is done is not
made again, so the benchmark goes on where it stopped. What scripts print is in `run.log` of each run.
"""

import importlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import Audio, disable_progress_bars, load_dataset
from learning import summary
from tqdm.auto import tqdm
from transformers import AutoModelForCTC, HfArgumentParser, set_seed
from transformers.utils import logging


ROOT = Path(__file__).resolve().parent.parent
from run_demo import SAMPLING_RATE, markdown_table, middle_subnet, prepare_speech

from lighthubert_training.data.sources import load_waveform
from lighthubert_training.error_rates import CharacterErrorRate, WordErrorRate
from lighthubert_training.recognition.recognizer import Recognizer
from modeling_lighthubert import LightHubertModel, SearchSpace
from modeling_lighthubert.profiling import macs_per_second


matplotlib.use("Agg")
from matplotlib import pyplot


SPACE = ROOT / "demo/search_space.json"
ONCE_FOR_ALL = {"once for all": 0.0, "once for all, taught by the largest": 0.1}
"""Weight of in-place distillation of each."""


def run_script(name: str, recipe: str, folder: Path, seed: int, steps: int, **options: Any) -> float:
    """Runs a training script by its recipe in this process, as from the top folder, and returns its seconds."""
    options |= {"output_dir": folder, "seed": seed, "max_steps": steps, "report_to": "none"}
    words = [
        "--config",
        f"training/lighthubert_training/configs/{'recognition' if recipe.startswith('ctc') else 'distillation'}/{recipe}.yaml",
    ]
    words += [f"--{option}={value}" for option, value in options.items()]
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    sys.argv = [f"training/{name}.py", *words]
    main_of_script = importlib.import_module(name).main
    start = time.perf_counter()
    with (folder / "run.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        main_of_script()
    return time.perf_counter() - start


@dataclass
class RecognitionArguments:
    """What is compared, and for how long."""

    train_file: str = field(
        default=str(ROOT / "demo/speech/train.parquet"), metadata={"help": "Parquet file to train on."}
    )
    test_file: str = field(
        default=str(ROOT / "demo/speech/test.parquet"), metadata={"help": "Parquet file to test on."}
    )
    output_dir: str = field(
        default=str(ROOT / "benchmarks/output/asr"), metadata={"help": "Folder for runs and results."}
    )
    held_out_speaker: str | None = field(default=None, metadata={"help": "Speaker to hold out in a second round."})
    distillation_steps: int = field(default=300, metadata={"help": "Steps that make the supernet."})
    steps: int = field(default=600, metadata={"help": "Steps of each fine-tuning."})
    num_random_subnets: int = field(default=20, metadata={"help": "Random subnets to transcribe with, once for all."})
    num_random_alone: int = field(default=20, metadata={"help": "How many of them are fine-tuned alone, too."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of each kind for each."})


class Recognition:
    """Runs of one round, all speakers or all but one, and their error rates."""

    def __init__(self, arguments: RecognitionArguments, held_out_speaker: str | None = None):
        self.arguments, self.held_out_speaker = arguments, held_out_speaker
        self.output = Path(arguments.output_dir).resolve() / (held_out_speaker or "all")
        (self.output / "data").mkdir(parents=True, exist_ok=True)
        rng = random.Random(0)
        self.train = prepare_speech(
            self._speakers(arguments.train_file, "train"), self.output / "data", "train", 2000, rng
        )
        self.test = prepare_speech(self._speakers(arguments.test_file, "test"), self.output / "data", "test", 200, rng)
        strings = load_dataset("parquet", data_files=str(self.test.strings_file), split="train")
        self.references = list(strings["text"])
        audio = strings.cast_column("audio", Audio(decode=False))["audio"]
        self.waveforms = [load_waveform(recording, SAMPLING_RATE) for recording in audio]
        self.space, draw = SearchSpace.from_json_file(SPACE), random.Random("evaluation")
        self.subnets = {
            "smallest": self.space.smallest,
            "middle": middle_subnet(self.space),
            "largest": self.space.largest,
            **{f"random_{number}": self.space.sample(draw) for number in range(arguments.num_random_subnets)},
        }
        (self.output / "subnets").mkdir(exist_ok=True)
        for name, subnet in self.subnets.items():
            self.subnet_file(name).write_text(json.dumps(subnet.to_dict()))

    def subnet_file(self, name: str) -> Path:
        return self.output / "subnets" / f"{name}.json"

    def _speakers(self, file: str, part: str) -> str:
        """The file, or one of it without (or of nobody but) the speaker that is held out."""
        if self.held_out_speaker is None:
            return file
        chosen = self.output / "data" / f"{part}-speakers.parquet"
        rows = load_dataset("parquet", data_files=file, split="train")
        rows = rows.filter(
            lambda speaker: (speaker == self.held_out_speaker) == (part == "test"), input_columns="speaker"
        )
        rows.to_parquet(chosen)
        return str(chosen)

    @property
    def kinds(self) -> list[str]:
        """Runs by name. With a speaker held out, only those that say what a new voice costs."""
        if self.held_out_speaker is not None:
            return ["once for all", "middle alone"]
        named = [f"{name} alone" for name in ("smallest", "middle", "largest")]
        drawn = [f"random_{number} alone" for number in range(self.arguments.num_random_alone)]
        once_for_all, *others = ONCE_FOR_ALL
        return [once_for_all, *named, "middle from random weights", *others, *drawn]

    def supernet(self, seed: int) -> Path:
        return self.output / f"supernet-{seed}"

    def distil(self, seed: int) -> float:
        """Makes the supernet, and returns its seconds."""
        return run_script(
            "run_distillation", "small_budget", self.supernet(seed), seed, self.arguments.distillation_steps,
            train_file=self.train.file, dataloader_num_workers=0, resume_from_checkpoint="latest",
        )  # fmt: skip

    def fine_tune(self, kind: str, seed: int) -> dict[str, Any]:
        """Fine-tunes, and transcribes the test recordings with every subnet that the run made."""
        start, folder = self.supernet(seed), self.output / f"{kind.replace(' ', '-').replace(',', '')}-{seed}"
        options: dict[str, Any] = {"train_file": self.train.strings_file, "validation_file": self.test.strings_file}
        options["max_eval_samples"] = 10  # the error rates below are of all
        name = kind.split()[0]
        if kind in ONCE_FOR_ALL:
            options |= {"once_for_all": True, "distillation_weight": ONCE_FOR_ALL[kind]}
        elif kind.endswith("random weights"):
            set_seed(seed)
            start = self.output / f"random-weights-{seed}"
            supernet = LightHubertModel.from_pretrained(self.supernet(seed))
            LightHubertModel(supernet.config.cut_to(self.subnets[name])).save_pretrained(start)
            options["freeze_feature_encoder"] = False  # nothing is there to be kept
        else:
            options["subnet"] = self.subnet_file(name)
        options["model_name_or_path"] = start
        seconds = run_script(
            "run_speech_recognition_ctc", "ctc_small_budget", folder, seed, self.arguments.steps, **options
        )
        names = list(self.subnets) if kind in ONCE_FOR_ALL else [name]
        return {"seconds": seconds} | {
            each: self.measure(folder, self.subnet_file(each) if kind in ONCE_FOR_ALL else None) for each in names
        }

    def measure(self, folder: Path, subnet_file: Path | None) -> dict[str, float]:
        """Error rates on the test recordings."""
        recognizer = Recognizer.from_pretrained(str(folder), subnet=subnet_file and str(subnet_file))
        predictions = [transcript.text for transcript in recognizer.transcribe(self.waveforms)]
        texts = {"predictions": predictions, "references": self.references}
        return WordErrorRate().compute(**texts) | CharacterErrorRate().compute(**texts)

    def macs(self, seed: int) -> dict[str, float]:
        """MACs per second of audio of every subnet."""
        model = AutoModelForCTC.from_pretrained(self.output / f"once-for-all-{seed}")
        return {name: macs_per_second(model, subnet) for name, subnet in self.subnets.items()}


Results = Mapping[str, Mapping[str, Any]]
"""Of each kind of run and seed: `seconds`, and error rates by subnet."""


def rates(results: Results, kind: str, subnet: str, measure: str = "wer") -> dict[str, float]:
    """By seed."""
    return {seed: run[subnet][measure] for seed, run in sorted(results.get(kind, {}).items())}


def mean_rates(results: Results, kind: str, subnets: Sequence[str], measure: str) -> list[float]:
    """For each seed, the mean of the subnets that there is a run of; `kind` may have a place for their name."""
    found = [rates(results, kind.format(name), name, measure) for name in subnets]
    seeds = sorted({seed for each in found for seed in each})
    return [statistics.mean(each[seed] for each in found if seed in each) for seed in seeds]


def gap(results: Results, kind: str, subnet: str) -> float:
    """Word error rate of a subnet, once for all over alone, in the mean of the seeds that have both."""
    together, alone = rates(results, kind, subnet), rates(results, f"{subnet} alone", subnet)
    return statistics.mean(together[seed] - alone[seed] for seed in together.keys() & alone.keys())


def table(results: Results, subnets: Sequence[str]) -> str:
    """Markdown: error rates of each subnet, fine-tuned alone, once for all, and from random weights."""
    kinds = {"alone": "{} alone"} | {kind: kind for kind in ONCE_FOR_ALL} | {"random": "{} from random weights"}
    header = ["", "WER alone", *(f"WER {kind}" for kind in ONCE_FOR_ALL), "WER from random weights"]
    header += ["CER alone", "CER once for all", "CER from random weights"]
    columns = [(kind, "wer") for kind in kinds.values()]
    columns += [(kind, "cer") for name, kind in kinds.items() if name in ("alone", "once for all", "random")]
    drawn = [name for name in subnets if name.startswith("random")]
    rows, shown = [], {name: [name] for name in subnets if name not in drawn}
    for title, names in [*shown.items(), ("random, mean", drawn)]:
        found = [mean_rates(results, kind, names, measure) for kind, measure in columns]
        rows.append([title, *(summary(values, percent=True) if values else "" for values in found)])
    return markdown_table(tuple(header), rows)


def margins(results: Results, subnets: Sequence[str]) -> str:
    """What the benchmark asks for."""
    lines = []
    own, control = rates(results, "middle alone", "middle"), rates(results, "middle from random weights", "middle")
    if own and control:
        ratio = statistics.mean(own.values()) / statistics.mean(control.values())
        worse = sum(own[seed] >= control[seed] for seed in own)
        lines.append(
            f"middle, distilled against random weights: {ratio:.2f} of its word errors in the mean (bar 0.50),"
            f" no better in {worse} of {len(own)} seeds (bar 0)"
        )
    alone = [name for name in subnets if f"{name} alone" in results]
    for kind in ONCE_FOR_ALL:
        if kind not in results or not alone:
            continue
        gaps = {name: gap(results, kind, name) for name in alone}
        largest = max(gaps, key=gaps.__getitem__)
        cost = statistics.mean(run["seconds"] for run in results[kind].values())
        each = [statistics.mean(run["seconds"] for run in results[f"{name} alone"].values()) for name in alone]
        lines.append(
            f"{kind}: {100 * statistics.mean(gaps.values()):+.1f} points of WER against {len(alone)} subnets alone in"
            f" the mean, {100 * gaps[largest]:+.1f} at most ({largest}; bar +3.0); {cost / sum(each):.2f} of their"
            f" time together (bar 0.33), {cost / statistics.mean(each):.1f} times that of one"
        )
    last = {name: rates(results, f"{name} alone", name) for name in alone}
    stuck = [f"{name} ({seed})" for name, found in last.items() for seed, rate in found.items() if rate > 0.9]
    lines.append(f"alone, at the blanks to the end: {', '.join(stuck) or 'none'}")
    return "\n".join(f"- {line}" for line in lines)


def plot(results: Results, macs: Mapping[str, float], path: Path) -> None:
    """Word error rate against MACs: every subnet of the supernets, and those fine-tuned alone."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    kinds = {kind: [(name, kind) for name in macs] for kind in ONCE_FOR_ALL if kind in results}
    kinds["each alone"] = [(name, f"{name} alone") for name in macs if f"{name} alone" in results]
    for (label, pairs), marker in zip(kinds.items(), ("o", "s", "x")):
        means = [statistics.mean(rates(results, kind, name).values()) for name, kind in pairs]
        points = [(macs[name] / 1e6, 100 * mean) for (name, _), mean in zip(pairs, means, strict=True)]
        if points:
            axes.scatter(*zip(*points), label=label, marker=marker, s=25)
    axes.set(xlabel="million MACs per second of audio", ylabel="word error rate, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def prepare_process() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def run_all(recognition: Recognition, seeds: Sequence[int]) -> Results:
    """Makes every run that is not done, and keeps each result as soon as it is there."""
    file = recognition.output / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    jobs = [(kind, seed) for kind in recognition.kinds for seed in seeds]
    jobs = [(kind, seed) for kind, seed in jobs if str(seed) not in results.get(kind, {})]
    seeds = [seed for seed in seeds if not (recognition.supernet(seed) / "model.safetensors").exists()]
    new_processes = multiprocessing.get_context("spawn")
    with (
        tqdm(total=len(seeds) + len(jobs), desc="runs") as bar,
        ProcessPoolExecutor(2, mp_context=new_processes, initializer=prepare_process) as workers,
    ):
        for _ in workers.map(recognition.distil, seeds):
            bar.update()
        running = {workers.submit(recognition.fine_tune, *job): job for job in jobs}
        try:
            for finished in as_completed(running):
                kind, seed = running[finished]
                results.setdefault(kind, {})[str(seed)] = finished.result()
                file.write_text(json.dumps(results, indent=2) + "\n")
                bar.set_postfix_str(f"{kind}, seed {seed}")
                bar.update()
        finally:
            workers.shutdown(cancel_futures=True)  # of a run that failed the message comes at once
    return results


def main() -> None:
    (arguments,) = HfArgumentParser(RecognitionArguments, description=__doc__).parse_args_into_dataclasses()
    prepare_process()
    begin = time.perf_counter()
    for speaker in dict.fromkeys([None, arguments.held_out_speaker]):
        recognition = Recognition(arguments, speaker)
        results = run_all(recognition, arguments.seeds)
        report = f"{table(results, list(recognition.subnets))}\n"
        if speaker is None:
            report += f"\n{margins(results, list(recognition.subnets))}\n"
        (recognition.output / "results.md").write_text(report)
        plot(results, recognition.macs(arguments.seeds[0]), recognition.output / "wer-against-macs.png")
        print(f"\n{'all speakers' if speaker is None else f'{speaker}, never heard in training'}\n\n{report}")
    print(f"{(time.perf_counter() - begin) / 60:.0f} minutes; all in {arguments.output_dir}")


if __name__ == "__main__":
    main()
