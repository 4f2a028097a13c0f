"""All runs with one frozen model: for each task and seed a result, in a file of its own."""

import json
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lighthubert_training.runs.distributed import locked_by_main_process
from lighthubert_training.superb.data import Part, TaskData
from lighthubert_training.superb.features import FeatureCache, FeatureDataset, Features, Upstream, fill_cache
from lighthubert_training.superb.query_by_example import QueryByExample
from lighthubert_training.superb.recipes import TaskSettings
from lighthubert_training.superb.report import read_result
from lighthubert_training.superb.tasks import TASKS, Task
from lighthubert_training.superb.training import HeadTraining
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import write_json


@dataclass
class Scoring:
    """Scores one frozen model, and leaves `MODEL/TASK/seed-SEED/result.json` in `output_dir`.

    Attributes:
        data_dir, max_unreadable_share: see `TaskData`.
        sweep: learning rates to try in place of that of the settings; the best on the dev part is tested.
        variant: of the recipes, a fact for the results.
    """

    upstream: Upstream
    accelerator: Accelerator
    output_dir: Path
    data_dir: str | None = None
    max_unreadable_share: float = 0.0
    cache: FeatureCache | None = None
    seeds: Sequence[int] = (0,)
    sweep: Sequence[float] | None = None
    variant: str | None = None

    def run(self, settings: TaskSettings) -> Iterator[dict[str, Any]]:
        """New results of all seeds, on the main process. Those that are there are not computed again.

        Raises:
            UserError: a result is there that was made with another setting, or another process is making one.
        """
        folder = self.output_dir / self.upstream.name.replace(", ", "--") / settings.task
        with locked_by_main_process(folder):
            yield from self._run(settings, folder)

    def _run(self, settings: TaskSettings, folder: Path) -> Iterator[dict[str, Any]]:
        files = {seed: folder / f"seed-{seed}/result.json" for seed in self.seeds}
        setting = self.setting(settings)
        missing = {seed: file for seed, file in files.items() if not _has(file, setting)}
        if not missing:
            return
        data_dir = None if self.data_dir is None else Path(self.data_dir)
        data = TaskData(settings, data_dir, self.max_unreadable_share)
        folds: list[Task] = []
        if settings.task == "qbe":  # trains nothing, so the outcome is the same for all seeds
            query = QueryByExample(data)
            outcome = query.scores(self.features(query.parts), self.accelerator)
        else:
            folds += TASKS[settings.task].load_folds(data, self.upstream)
        features = [self.features(fold.parts) for fold in folds]
        for seed, file in missing.items():
            if folds:
                outcome = self._train_folds(folds, features, seed, file.parent)
            if self.accelerator.is_main_process:
                result = {"task": settings.task, "model": self.upstream.name, "seed": seed, **setting, **outcome}
                write_json(file, result)
                for states in file.parent.glob("fold-*"):
                    shutil.rmtree(states)
                yield result
            self.accelerator.wait_for_everyone()

    def setting(self, settings: TaskSettings) -> dict[str, Any]:
        """Everything that a result depends on, as JSON gives it back."""
        setting: dict[str, Any] = {
            "features": self.upstream.key,
            "data_dir": self.data_dir,
            "features_dtype": "float32" if self.cache is None else str(self.cache.dtype).removeprefix("torch."),
            "num_parameters": self.upstream.num_parameters,
            "variant": self.variant,
            "recipe": asdict(settings),
            "sweep": self.sweep,
        }
        if self.max_unreadable_share:
            setting["max_unreadable_share"] = self.max_unreadable_share
        return json.loads(json.dumps(setting))

    def features(self, parts: Mapping[str, Part]) -> Features:
        """Features of each part, in the cache if there is one."""
        features = {name: FeatureDataset(part.audio, self.upstream, self.cache) for name, part in parts.items()}
        fill_cache(list(features.values()), self.accelerator)
        return features

    def _train_folds(
        self, folds: Sequence[Task], features: Sequence[Features], seed: int, folder: Path
    ) -> dict[str, Any]:
        """Means over folds, each at its best learning rate."""
        outcomes = [
            self._sweep(fold, of_fold, seed, folder / f"fold-{number}")
            for number, (fold, of_fold) in enumerate(zip(folds, features, strict=True))
        ]
        if not self.accelerator.is_main_process:
            return {}
        test = {name: statistics.mean(each["test"][name] for each in outcomes) for name in outcomes[0]["test"]}
        return {"test": test, "folds": outcomes}

    def _sweep(self, task: Task, features: Features, seed: int, folder: Path) -> dict[str, Any]:
        """The outcome with the learning rate that is best on the dev part."""
        outcomes = []
        for rate in self.sweep or [task.settings.learning_rate]:
            task.settings = replace(task.settings, learning_rate=rate)
            setting = self.setting(task.settings) | {"seed": seed}
            training = HeadTraining(task, features, folder / f"{rate:g}", self.accelerator, setting)
            outcomes.append({"learning_rate": rate, **training.run()})
        if not self.accelerator.is_main_process:
            return {}
        return max(outcomes, key=lambda outcome: task.selection_score(outcome["dev"]))


def _has(file: Path, setting: Mapping[str, Any]) -> bool:
    """Whether there is a result with this setting.

    Raises:
        UserError: there is one with another.
    """
    if not file.exists() or (kept := read_result(file)) is None:
        return False
    if other := [name for name, value in setting.items() if kept.get(name) != value]:
        raise UserError(
            f"{file} was made with another {' and '.join(other)}: choose another --output_dir, or delete it"
        )
    return True
