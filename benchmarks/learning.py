"""What each part of the recipe is worth for small budgets: one factor varied at a time.

    python benchmarks/learning.py
    python benchmarks/learning.py --train_file digits-train.parquet --test_file digits-test.parquet

Every run distils the teacher of the demonstration by training/lighthubert_training/configs/distillation/small_budget.yaml, but for one factor, and is
measured like the demonstration: linear probes for digit and speaker, and R2 of a ridge regression from the masked
frames of held-out speech to the distillation target. Variants get the same number of passes of a subnet, so a sandwich
of three makes a third of the steps. Two runs at a time, one thread each; a run that is done is not made again, so the
benchmark goes on where it stopped.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers import AutoModel, HfArgumentParser, Wav2Vec2FeatureExtractor, set_seed
from transformers.utils import logging


ROOT = Path(__file__).resolve().parent.parent
from run_demo import (
    NUM_TARGET_LAYERS,
    Bench,
    markdown_table,
    middle_subnet,
    prepare_speech,
)

from lighthubert_training.distillation.teacher import ObjectiveArguments, Teacher
from lighthubert_training.probing import Batch
from modeling_lighthubert import LightHubertModel, SearchSpace


TEACHER, SPACE = ROOT / "demo/teacher", ROOT / "demo/search_space.json"
# what a step costs in passes of a subnet
PASSES_OF_STEP = {"largest": 1, "uniform": 1, "uniform_size": 1, "sandwich": 3}

RECIPE = yaml.safe_load((ROOT / "training/lighthubert_training/configs/distillation/small_budget.yaml").read_text())
PAPER = {"loss_frames": "masked", "mask_time_prob": 0.65}
# at the recipe's learning rate a random start diverges
RANDOM = {"student_name_or_path": "random", "share_feature_encoder": False, "learning_rate": 1e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "sampling uniform": {"sampling": "uniform"},
    "sampling sandwich": {"sampling": "sandwich"},
    "loss on masked frames": {"loss_frames": "masked"},
    "65 % masked": {"mask_time_prob": 0.65},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "feature encoder learns": {"share_feature_encoder": False},
    "after stage 1": {"stage1": True},
    "smallest alone": {"alone": True},
    "random start": RANDOM,
    "random start, 65 % masked, loss on masked frames": RANDOM | PAPER,
}
"""What differs from the recipe, as options of the training script; besides, `stage1`: the largest subnet is trained
first, and `alone`: the smallest is trained as one model."""


@dataclass
class LearningArguments:
    """What is compared, and for how long."""

    train_file: str = field(
        default=str(ROOT / "demo/speech/train.parquet"), metadata={"help": "Parquet file to train on."}
    )
    test_file: str = field(
        default=str(ROOT / "demo/speech/test.parquet"), metadata={"help": "Parquet file to test on."}
    )
    output_dir: str = field(
        default=str(ROOT / "benchmarks/output/learning"), metadata={"help": "Folder for runs and results."}
    )
    passes: int = field(default=300, metadata={"help": "Passes of a subnet; a quarter of them in stage 1, if any."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of each variant for each."})
    only: list[str] | None = field(default=None, metadata={"help": "Variants to run, by name. Default: all."})
    max_probe_recordings: int = field(default=400, metadata={"help": "Recordings of each kind to measure on."})


class Learning:
    """Runs variants, and measures what comes out.

    Attributes:
        variants: what differs from the recipe, by name.
    """

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS

    def __init__(self, arguments: LearningArguments):
        self.arguments, self.output = arguments, Path(arguments.output_dir).resolve()
        (self.output / "data").mkdir(parents=True, exist_ok=True)
        rng = random.Random(0)
        train = prepare_speech(arguments.train_file, self.output / "data", "train", 1000, rng)
        test = prepare_speech(arguments.test_file, self.output / "data", "test", 100, rng)
        self.train_file = train.file
        self.teacher = Teacher(
            AutoModel.from_pretrained(TEACHER), ObjectiveArguments(num_target_layers=NUM_TARGET_LAYERS)
        )
        self.space = SearchSpace.from_json_file(SPACE)
        self.subnets = {
            "largest": self.space.largest,
            "middle": middle_subnet(self.space),
            "smallest": self.space.smallest,
        }
        self.untrained = LightHubertModel.from_pretrained(TEACHER, search_space=self.space)
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(TEACHER)
        self.bench = Bench(train, test, self.teacher, extractor, arguments.max_probe_recordings)
        self.measuring = threading.Lock()
        self.untrained.extract_subnet("smallest").save_pretrained(self.output / "smallest-slice")

    @cached_property
    def untrained_rows(self) -> dict[str, dict[str, float]]:
        """The teacher and its slices, which no seed changes."""
        slices = {f"{name}, slice of the teacher": subnet for name, subnet in self.subnets.items()}
        return {"teacher": self.bench.measure(self.teacher.model)} | {
            name: self.bench.measure(self.untrained.extract_subnet(subnet)) for name, subnet in slices.items()
        }

    def controls(self, seed: int) -> dict[str, dict[str, float]]:
        """The teacher, its untrained slices, and random weights."""
        rows = dict(self.untrained_rows)
        for name, subnet in self.subnets.items():
            set_seed(seed)
            random_weights = LightHubertModel(self.untrained.config.cut_to(subnet))
            rows[f"{name}, random weights"] = self.bench.measure(random_weights)
        return rows

    def run(self, variant: str, seed: int) -> dict[str, dict[str, float]]:
        """Distils `variant` and measures its subnets."""
        folder, options = self.output / f"{variant.replace(' ', '-')}-{seed}", dict(self.variants[variant])
        alone, stage1 = options.pop("alone", False), options.pop("stage1", False)
        start = options.pop("student_name_or_path", None)
        passes, recipe = self.arguments.passes, RECIPE | options
        if alone:
            start = self.output / "smallest-slice"
            recipe |= {"search_space": None, "sampling": "largest"}
        elif stage1:
            first = {"sampling": "largest", "student_name_or_path": start, "max_steps": passes // 4}
            self.distil(recipe | first, seed, folder / "stage1")
            start, passes = folder / "stage1", passes - passes // 4
        steps = passes // PASSES_OF_STEP[recipe["sampling"]]
        recipe |= {"student_name_or_path": start, "max_steps": steps}
        self.distil(recipe, seed, folder / "trained")
        trained = LightHubertModel.from_pretrained(folder / "trained")
        with self.measuring:
            if alone:
                return {"smallest": self.bench.measure(trained)}
            return {name: self.bench.measure(trained.extract_subnet(subnet)) for name, subnet in self.subnets.items()}

    def distil(self, recipe: Mapping[str, Any], seed: int, folder: Path) -> None:
        """One run of the distillation script."""
        shared = {
            "train_file": self.train_file,
            "validation_file": None,
            "dataloader_num_workers": 0,
            "report_to": "none",
            "seed": seed,
            "output_dir": folder,
        }
        self.run_script("run_distillation", dict(recipe) | shared)

    @staticmethod
    def run_script(name: str, options: Mapping[str, Any]) -> None:
        """Runs a training script, with the options that are not `None`."""
        words = [f"--{option}={value}" for option, value in options.items() if value is not None]
        command = [sys.executable, str(ROOT / "training" / f"{name}.py"), *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr[-3000:]}")


def to_distil(batches: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
    """Batches with what a distillation loss needs besides: what the teacher hears, which is the same, and a number for
    the mask of each recording."""
    return [
        {
            **batch,
            "teacher_input_values": batch["input_values"],
            "visits": torch.tensor([[0, row] for row in range(len(batch["input_values"]))]),
        }
        for batch in batches
    ]


Results = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
"""Measures by variant, seed and subnet."""


def summary(values: list[float], percent: bool) -> str:
    """Mean and standard deviation."""
    scale, digits = (100, 1) if percent else (1, 3)
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def tables(results: Results) -> str:
    """Markdown: a row for each control and variant, mean and deviation over the seeds."""
    measures = [
        measure for measure in ("digit", "speaker") if measure in next(iter(results["controls"].values()))["teacher"]
    ]

    def cells(runs: list[Mapping[str, Mapping[str, float]]], names: Mapping[str, str]) -> list[str]:
        found = []
        for measure in ("r2", *measures):
            for name in names.values():
                values = [run[name][measure] for run in runs if name in run]
                found.append(summary(values, percent=measure != "r2") if values else "")
        return found

    subnets = ("largest", "middle", "smallest")
    header = ["", *(f"{measure} {name}" for measure in ("R2", *measures) for name in subnets)]
    controls = list(results["controls"].values())
    rows = [["teacher", *cells(controls, dict.fromkeys(subnets, "teacher"))]]
    for kind in ("slice of the teacher", "random weights"):
        rows.append([kind, *cells(controls, {name: f"{name}, {kind}" for name in subnets})])
    for variant in VARIANTS:
        if runs := list(results.get(variant, {}).values()):
            rows.append([variant, *cells(runs, {name: name for name in subnets})])
    return markdown_table(tuple(header), rows)


def margins(results: Results) -> str:
    """The worst seed of what distillation is asked to add."""
    lines = []
    controls = results["controls"]
    if runs := results.get("recipe"):
        gaps = [
            run["smallest"]["r2"] - controls[seed]["smallest, slice of the teacher"]["r2"]
            for seed, run in runs.items()
        ]
        ratios = [run["largest"]["r2"] / controls[seed]["teacher"]["r2"] for seed, run in runs.items()]
        lines.append(f"smallest, R2 above its untrained slice: {min(gaps):+.3f} at least (bar +0.050)")
        lines.append(f"largest, R2 over the teacher's: {min(ratios):.2f} at least (bar 0.93)")
    if runs := results.get("random start"):
        gaps = [
            run["smallest"]["digit"] - controls[seed]["smallest, random weights"]["digit"]
            for seed, run in runs.items()
        ]
        lines.append(
            f"smallest, random start, digits above random weights: {100 * min(gaps):+.1f} points at least (bar +10)"
        )
    return "\n".join(f"- {line}" for line in lines)


def run_all(learning: Learning, seeds: Sequence[int], variants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Makes every run that is not done, two at a time, and keeps each result as soon as it is there."""
    file = learning.output / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    jobs = [(variant, seed) for seed in seeds for variant in ("controls", *variants)]
    jobs = [(variant, seed) for variant, seed in jobs if str(seed) not in results.get(variant, {})]
    writing = threading.Lock()

    def work(job: tuple[str, int]) -> None:
        variant, seed = job
        if variant == "controls":
            with learning.measuring:
                rows = learning.controls(seed)
        else:
            rows = learning.run(variant, seed)
        with writing:
            results.setdefault(variant, {})[str(seed)] = rows
            file.write_text(json.dumps(results, indent=2) + "\n")
            bar.set_postfix_str(f"{variant}, seed {seed}")
            bar.update()

    with tqdm(total=len(jobs), desc="runs") as bar, ThreadPoolExecutor(max_workers=2) as workers:
        list(workers.map(work, jobs))
    return results


def main() -> None:
    (arguments,) = HfArgumentParser(LearningArguments, description=__doc__).parse_args_into_dataclasses()
    prepare_process()
    begin, learning = time.perf_counter(), Learning(arguments)
    results = run_all(learning, arguments.seeds, arguments.only or list(VARIANTS))
    report = f"{tables(results)}\n\n{margins(results)}\n"
    (learning.output / "results.md").write_text(report)
    print(f"\n{report}\n{(time.perf_counter() - begin) / 60:.0f} minutes; all in {learning.output}")


def prepare_process() -> None:
    logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
