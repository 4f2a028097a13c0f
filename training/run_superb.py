"""Scores frozen models on the ten tasks of SUPERB: a weighted sum of their layers, and a light head for each task.

    python training/run_superb.py --model_name_or_path lighthubert-small --subnets largest,a_small,best.json \\
        --data_dir superb-data --cache_dir features --output_dir superb
    python demo/make_superb_stand_ins.py --output_dir stand-ins
    python training/run_superb.py --model_name_or_path supernet --subnets largest,smallest --variant stand_in \\
        --data_dir stand-ins --cache_dir features --output_dir superb

Any model that transformers loads and that gives hidden states will do. Each run leaves a `result.json`, all of them
`table.md`, `table.csv` and `table.png`; what is done is not done again, and what was stopped goes on. Stand-ins have
the structure of SUPERB's data and none of its recordings: what is measured on them is no SUPERB result.
"""

import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import HfArgumentParser

from lighthubert_training.runs.options import parse_options
from lighthubert_training.superb.data import Part, Recipe, read_recipe, task_names
from lighthubert_training.superb.features import FeatureCache, Recordings, Upstream, fill
from lighthubert_training.superb.query_by_example import QueryByExample
from lighthubert_training.superb.report import write_report
from lighthubert_training.superb.tasks import TASKS, Task
from lighthubert_training.superb.training import HeadTraining


@dataclass
class SuperbArguments:
    """What is scored, on what, and how."""

    model_name_or_path: list[str] = field(metadata={"help": "Models that transformers loads, folders or Hub ids."})
    output_dir: str = field(metadata={"help": "Folder for results."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with a folder of data for each task; what is missing says what it has to be."},
    )
    tasks: list[str] = field(default_factory=lambda: ["all"], metadata={"help": "Names of tasks, or all."})
    subnets: list[str] | None = field(
        default=None, metadata={"help": "Of supernets: names or JSON files, with commas or spaces between."}
    )
    variant: str | None = field(
        default=None,
        metadata={
            "help": "Values in the recipes for special cases: lighthubert_base, lighthubert_small or"
            " lighthubert_stage1 (the authors' learning rates), stand_in (small data)."
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps features. Default: they are computed each time."}
    )
    features_dtype: str = field(
        default="float32", metadata={"help": "Of kept features.", "choices": ("float32", "float16")}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "A head is trained for each."})
    learning_rate: float | None = field(default=None, metadata={"help": "In place of the recipe's."})
    sweep: list[float] | None = field(
        default=None, metadata={"help": "Learning rates to try; the best on the dev part is tested."}
    )
    max_steps: int | None = field(default=None, metadata={"help": "In place of the recipe's."})
    cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})


@dataclass
class Scoring:
    """Runs of all tasks with one frozen model."""

    arguments: SuperbArguments
    upstream: Upstream
    accelerator: Accelerator

    def __post_init__(self) -> None:
        folder, dtype = self.arguments.cache_dir, getattr(torch, self.arguments.features_dtype)
        self.cache = None if folder is None else FeatureCache(self.upstream, Path(folder), dtype)
        self.data_dir = None if self.arguments.data_dir is None else Path(self.arguments.data_dir)
        self.folder = Path(self.arguments.output_dir) / self.upstream.name.replace(", ", "--")

    def recordings(self, parts: dict[str, Part]) -> dict[str, Recordings]:
        found = {name: Recordings(part.audio, self.upstream, self.cache) for name, part in parts.items()}
        fill(list(found.values()), self.accelerator)
        return found

    def run(self, recipe: Recipe) -> Iterator[dict[str, Any]]:
        """Results of all seeds. Those that are there already are not made again."""
        files = {seed: self.folder / recipe.task / f"seed-{seed}/result.json" for seed in self.arguments.seeds}
        setting = self.setting(recipe)
        missing = {seed: file for seed, file in files.items() if not _has(file, setting)}
        if not missing:
            return
        outcome_of = self.query(recipe) if recipe.task == "qbe" else self.learn(recipe)
        for seed, file in missing.items():
            outcome = outcome_of(seed, file.parent)
            if self.accelerator.is_main_process:
                result = {"task": recipe.task, "model": self.upstream.name, "seed": seed, **setting, **outcome}
                file.parent.mkdir(parents=True, exist_ok=True)
                scratch = file.with_suffix(".unfinished")
                scratch.write_text(json.dumps(result, indent=2) + "\n")
                scratch.replace(file)
                for states in file.parent.glob("fold-*"):
                    shutil.rmtree(states)
                yield result
            self.accelerator.wait_for_everyone()

    def setting(self, recipe: Recipe) -> dict[str, Any]:
        """What a result depends on, as JSON gives it back."""
        setting = {
            "features": self.upstream.key,
            "data_dir": self.arguments.data_dir,
            "features_dtype": self.arguments.features_dtype,
            "num_parameters": self.upstream.num_parameters,
            "variant": self.arguments.variant,
            "recipe": asdict(recipe),
            "sweep": self.arguments.sweep,
        }
        return json.loads(json.dumps(setting))

    def query(self, recipe: Recipe) -> Callable[[int, Path], dict[str, Any]]:
        """Nothing is drawn at random there: the outcome of one seed is that of all."""
        task = QueryByExample(recipe, self.data_dir)
        recordings = self.recordings(task.parts)
        outcome = task.scores(recordings, self.accelerator)
        return lambda seed, folder: outcome

    def learn(self, recipe: Recipe) -> Callable[[int, Path], dict[str, Any]]:
        folds = TASKS[recipe.task].load_folds(recipe, self.data_dir)
        recordings = [self.recordings(fold.parts) for fold in folds]
        return lambda seed, folder: self.train_folds(folds, recordings, seed, folder)

    def train_folds(
        self, folds: Sequence[Task], recordings: Sequence[dict[str, Recordings]], seed: int, folder: Path
    ) -> dict[str, Any]:
        """Means over folds, each at its best learning rate."""
        outcomes = [
            self.sweep(fold, of_fold, seed, folder / f"fold-{number}")
            for number, (fold, of_fold) in enumerate(zip(folds, recordings, strict=True))
        ]
        if not self.accelerator.is_main_process:
            return {}
        test = {name: statistics.mean(each["test"][name] for each in outcomes) for name in outcomes[0]["test"]}
        return {"test": test, "folds": outcomes}

    def sweep(self, task: Task, recordings: dict[str, Recordings], seed: int, folder: Path) -> dict[str, Any]:
        """The outcome with the learning rate that is best on the dev part."""
        outcomes = []
        for rate in self.arguments.sweep or [task.recipe.learning_rate]:
            task.recipe = replace(task.recipe, learning_rate=rate)
            setting = self.setting(task.recipe) | {"seed": seed}
            training = HeadTraining(task, recordings, self.upstream, folder / f"{rate:g}", self.accelerator, setting)
            outcomes.append({"learning_rate": rate, **training.run()})
        if not self.accelerator.is_main_process:
            return {}
        metric, higher_is_better = next(iter(task.higher_is_better.items()))
        return max(outcomes, key=lambda each: each["dev"][metric] * (1 if higher_is_better else -1))


def _has(file: Path, setting: Mapping[str, Any]) -> bool:
    """Whether there is a result, and of this setting.

    Raises:
        ValueError: it is of another.
    """
    if not file.exists():
        return False
    kept = json.loads(file.read_text())
    if other := [name for name, value in setting.items() if kept.get(name) != value]:
        raise ValueError(
            f"{file} was made with another {' and '.join(other)}: choose another --output_dir, or delete it"
        )
    return True


def upstreams(arguments: SuperbArguments, device: str) -> Iterator[Upstream]:
    """Each model, or each subnet of it, loaded when its turn comes."""
    subnets = [name for words in arguments.subnets or [] for name in words.split(",") if name]
    for model in arguments.model_name_or_path:
        for subnet in subnets or [None]:
            yield Upstream.from_pretrained(model, subnet, device)


def main() -> None:
    (arguments,) = parse_options(HfArgumentParser(SuperbArguments, description=__doc__))
    if arguments.cache_dir is None and arguments.features_dtype != "float32":
        raise ValueError(f"--features_dtype {arguments.features_dtype} is of features that are kept: give --cache_dir")
    accelerator = Accelerator(cpu=arguments.cpu)
    names = task_names() if arguments.tasks == ["all"] else [n for w in arguments.tasks for n in w.split(",") if n]
    recipes = [
        read_recipe(name, arguments.variant, learning_rate=arguments.learning_rate, max_steps=arguments.max_steps)
        for name in names
    ]
    for upstream in upstreams(arguments, str(accelerator.device)):
        scoring = Scoring(arguments, upstream, accelerator)
        for recipe in recipes:
            for result in scoring.run(recipe):
                scores = ", ".join(f"{name} {100 * value:.2f}" for name, value in result["test"].items())
                accelerator.print(f"{upstream.name}, {recipe.task}, seed {result['seed']}: {scores}", flush=True)
    if accelerator.is_main_process:
        print(write_report(Path(arguments.output_dir), arguments.variant, published=arguments.variant != "stand_in"))
    accelerator.end_training()


if __name__ == "__main__":
    main()
