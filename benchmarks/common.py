"""What several benchmarks need: the demonstration's teacher, distilled by the recipe for small budgets with something
changed; runs of scripts, two at a time, whose results are kept; and small measures of this process.
"""

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor, set_seed
from transformers.utils import logging

from lighthubert_training.data.collators import Batch
from lighthubert_training.data.strings import SAMPLING_RATE, prepare_speech
from lighthubert_training.distillation.arguments import ObjectiveArguments
from lighthubert_training.distillation.teacher import Teacher
from lighthubert_training.probing import ProbeBench
from lighthubert_training.runs.options import RECIPES, OptionParser, option, parse_options
from lighthubert_training.runs.tables import mean_and_deviation
from modeling_lighthubert import LightHubertModel, SearchSpace, Subnet
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import write_json, write_text
from modeling_lighthubert.loading import load_model


ROOT = Path(__file__).resolve().parent.parent
TEACHER, SPACE = ROOT / "demo/teacher", ROOT / "demo/search_space.json"
RECIPE = yaml.safe_load((RECIPES / "distillation/small_budget.yaml").read_text(encoding="utf-8"))
SUBNETS = ("largest", "middle", "smallest")
SLICE, CONTROL = "slice of the teacher", "random weights"
A_SMALL = Subnet.uniform(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
Results = Mapping[str, Mapping[str, Any]]
"""Results by the name of the run and its seed."""


@dataclass
class SpeechArguments:
    """The speech of a benchmark."""

    train_file: str = option(str(ROOT / "demo/speech/train.parquet"), "Parquet file to train on.")
    test_file: str = option(str(ROOT / "demo/speech/test.parquet"), "Parquet file to test on.")


@dataclass
class LearningArguments(SpeechArguments):
    """What is compared, and for how long."""

    output_dir: str = option(str(ROOT / "benchmarks/output/learning"), "Folder for runs and results.")
    passes: int = option(300, "Passes of a subnet; a quarter of them in stage 1, if any.")
    seeds: list[int] = option([0, 1, 2], "One run of each variant for each.")
    only: list[str] | None = option(None, "Variants to run, by name. Default: all.")
    max_probe_recordings: int = option(400, "Recordings of each kind to measure on.")


def parse(kind: type, description: str | None) -> Any:
    """Options of a benchmark that runs in one thread, as `kind`."""
    prepare_process()
    return parse_options(OptionParser(kind, description=description))[0]


class Learning:
    """Distils variants of the demonstration's teacher, and measures students and controls by probes and R2.

    Attributes:
        variants: by name; a subclass says in `run` how each is made.
        space, subnets: the search space of the demonstration, and what is measured of it, by name.
        untrained: supernets that hold the teacher's weights, by what their slices are called.
        random_subnets: names of the subnets whose shapes are measured with random weights.
        measuring: held while this process measures or draws weights, so that two runs do not meet.
    """

    variants: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, arguments: LearningArguments):
        self.arguments, self.output = arguments, Path(arguments.output_dir).resolve()
        if unknown := set(arguments.only or ()) - set(self.variants):
            raise UserError(f"--only {' '.join(sorted(unknown))}: choose from {', '.join(map(repr, self.variants))}")
        rng = random.Random(0)
        train = prepare_speech(arguments.train_file, self.output / "data", "train", 1000, rng)
        test = prepare_speech(arguments.test_file, self.output / "data", "test", 100, rng)
        self.train_file = train.file
        self.teacher = Teacher(load_model(TEACHER), ObjectiveArguments(num_target_layers=RECIPE["num_target_layers"]))
        self.space = SearchSpace.from_json_file(SPACE)
        self.subnets = {name: self.space.named[name] for name in SUBNETS}
        self.untrained = {SLICE: load_model(TEACHER, head=LightHubertModel, search_space=self.space)}
        self.random_subnets = list(SUBNETS)
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(TEACHER)
        self.bench = ProbeBench(train, test, self.teacher, extractor, arguments.max_probe_recordings)
        self.measuring = threading.Lock()

    def distil(self, changes: Mapping[str, Any], seed: int, folder: Path) -> None:
        """Distils by the recipe with `changes`, and goes on with what an earlier run left in `folder`."""
        data = {"train_file": self.train_file, "validation_file": None, "dataloader_num_workers": 0}
        run = {"seed": seed, "output_dir": folder, "report_to": "none", "resume_from_checkpoint": "latest"}
        run_script("training/run_distillation.py", **(RECIPE | dict(changes) | data | run))

    def measure(self, model: PreTrainedModel, subnet: Subnet) -> dict[str, Any]:
        """R2 and accuracies of a cut model."""
        return self.bench.measure(model)

    @cached_property
    def untrained_rows(self) -> dict[str, dict[str, Any]]:
        """The teacher and its slices, which no seed changes."""
        rows = {"teacher": self.measure(self.teacher.model, self.space.largest)}
        for name, subnet in self.subnets.items():
            for kind, supernet in self.untrained.items():
                rows[f"{name}, {kind}"] = self.measure(supernet.extract_subnet(subnet), subnet)
        return rows

    def controls(self, seed: int) -> dict[str, dict[str, Any]]:
        """The teacher, its untrained slices, and random weights."""
        rows, config = dict(self.untrained_rows), self.untrained[SLICE].config
        for name in self.random_subnets:
            set_seed(seed)
            model = LightHubertModel(config.cut_to(self.subnets[name]))
            rows[f"{name}, {CONTROL}"] = self.measure(model, self.subnets[name])
        return rows

    def run(self, variant: str, seed: int) -> dict[str, dict[str, Any]]:
        """Distils `variant` and measures its subnets, by name."""
        raise NotImplementedError

    def run_all(self) -> dict[str, dict[str, Any]]:
        """Measures of controls and variants, all or those of `--only`, for every seed."""

        def work(name: str, seed: int) -> dict[str, dict[str, Any]]:
            if name != "controls":
                return self.run(name, seed)
            with self.measuring:
                return self.controls(seed)

        names = ["controls", *(self.arguments.only or self.variants)]
        jobs = [(name, seed) for seed in self.arguments.seeds for name in names]
        return run_all(self.output / "results.json", jobs, work)


def run_script(script: str, **options: Any) -> None:
    """Runs `script` from the top folder, with one thread and its options that are not `None`. Its output is added to
    `run.log` in its `output_dir`.

    Raises:
        UserError: the script says that an option is wrong.
        RuntimeError: it failed otherwise.
    """
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    command, environment = [sys.executable, str(ROOT / script), *words], os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode == 2:
        raise UserError(finished.stderr.splitlines()[-1].removeprefix("error: "))
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr[-3000:]}")
    with (Path(options["output_dir"]) / "run.log").open("a", encoding="utf-8") as log:
        log.write(finished.stdout + finished.stderr)


def run_all(file: Path, jobs: Sequence[tuple[str, int]], work: Callable[[str, int], Any]) -> dict[str, dict[str, Any]]:
    """Does `work` for each name and seed in `jobs` that has no result in `file` yet, two at a time, keeps each result
    as soon as it is there, and returns all results in the file."""
    results: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    jobs = [(name, seed) for name, seed in jobs if str(seed) not in results.get(name, {})]
    with tqdm(total=len(jobs), desc="runs") as bar, ThreadPoolExecutor(2) as workers:
        running = {workers.submit(work, *job): job for job in jobs}
        try:
            for finished in as_completed(running):
                name, seed = running[finished]
                results.setdefault(name, {})[str(seed)] = finished.result()
                write_json(file, results)
                bar.set_postfix_str(f"{name}, seed {seed}")
                bar.update()
        finally:
            workers.shutdown(cancel_futures=True)  # of a run that failed the message comes at once
    return results


def report(folder: Path, table: str, findings: Sequence[str] = ()) -> None:
    """Prints a table and a list of findings, in Markdown, and writes them to `results.md`."""
    text = "\n".join([table, "", *(f"- {finding}" for finding in findings)]).rstrip() + "\n"
    write_text(folder / "results.md", text)
    print(text, f"all in {folder}", sep="\n")


def prepare_process() -> None:
    """One thread, and no messages of libraries between the results."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def summary(values: Sequence[float], percent: bool) -> str:
    """Mean and standard deviation, in percent or as they are."""
    return mean_and_deviation(values, 1, 100) if percent else mean_and_deviation(values, 3)


def measures_of(results: Results) -> dict[str, str]:
    """Titles of R2, and of the probes that the data has labels for, by name."""
    teacher = next(iter(results["controls"].values()))["teacher"]
    return {name: {"r2": "R2"}.get(name, name) for name in ("r2", "digit", "speaker") if name in teacher}


def to_distil(batches: Sequence[Batch]) -> list[Batch]:
    """Batches with what a distillation loss needs besides: the input of the teacher, which is that of the student, and
    an item for the mask of each recording."""

    def complete(batch: Batch) -> Batch:
        audio = batch["input_values"]
        items = torch.tensor([[0, row] for row in range(len(audio))])
        return {**batch, "teacher_input_values": audio, "items": items}

    return list(map(complete, batches))


def noise(batch_size: int, seconds: float) -> np.ndarray:
    """Audio that is always the same, float32, (batch_size, num_samples)."""
    return np.random.default_rng(0).standard_normal((batch_size, int(seconds * SAMPLING_RATE)), dtype=np.float32)


def process_memory(kind: str) -> float:
    """Mebibytes that this process holds (`VmRSS`), or held at most (`VmHWM`), on Linux. `getrusage` would count what
    its parent held as well."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[kind].split()[0]) / 2**10
