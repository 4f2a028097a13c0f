"""What it costs to keep SUPERB's features in half precision, on the stand-ins of `superb.py`, which has to run first.

    python benchmarks/superb_half_precision.py --models demo/output/seed-?/supernet --subnet largest
    python benchmarks/superb_half_precision.py --models demo/teacher demo/teacher demo/teacher --retrain False

A model for each seed. A head that was trained on features in single precision is tested on those in half precision;
another is trained and tested on the latter. The control is trained and tested on features with noise of the size of
single precision's rounding, which training alone may amplify. Two tasks at a time with a thread each.
"""

import multiprocessing
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from processes import ROOT, parse, prepare_process
from tqdm.auto import tqdm

from lighthubert_training.runs.distributed import build_accelerator
from lighthubert_training.runs.options import option
from lighthubert_training.runs.tables import markdown_table
from lighthubert_training.superb.data import Part, TaskData
from lighthubert_training.superb.features import FeatureCache, FeatureDataset, Upstream
from lighthubert_training.superb.query_by_example import QueryByExample
from lighthubert_training.superb.recipes import read_settings, task_names
from lighthubert_training.superb.report import COLUMNS
from lighthubert_training.superb.tasks import TASKS
from lighthubert_training.superb.training import HeadTraining
from modeling_lighthubert.errors import run


WAYS = ("single", "same head, halved", "trained on halved", "trained on noisy")


@dataclass
class HalfPrecisionArguments:
    """What is scored, and on what."""

    models: list[str] = option(help="Models, one for each seed.")
    subnet: str | None = option(None, "Subnet of supernets, a name or a JSON file.")
    retrain: bool = option(True, "Train heads on features in half precision and on noisy ones, too.")
    superb_dir: str = option(str(ROOT / "benchmarks/output/superb"), "Output folder of superb.py.")


class NoisyFeatures(FeatureDataset):
    """Hidden states that are off by about the rounding of single precision."""

    def __getitem__(self, index: int) -> torch.Tensor:
        states = super().__getitem__(index)
        noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(index))
        return states * (1 + torch.finfo(torch.float32).eps * noise)


def scores(task: str, seed: int, model: str, arguments: HalfPrecisionArguments) -> dict[str, dict[str, float]]:
    """Test scores, for each metric in each of the `WAYS`; the first two of them without `arguments.retrain`."""
    prepare_process()
    accelerator, folder = build_accelerator("cpu"), Path(arguments.superb_dir)
    upstream = Upstream.from_pretrained(model, arguments.subnet, accelerator.device)
    data = TaskData(read_settings(task, "stand_in"), folder / "data")
    single, half = (FeatureCache(upstream, folder / "features", dtype) for dtype in (torch.float32, torch.float16))

    def ways(parts: Mapping[str, Part]) -> list[dict[str, FeatureDataset]]:
        kinds = ((FeatureDataset, single), (FeatureDataset, half), (NoisyFeatures, single))
        return [{name: kind(part.audio, upstream, cache) for name, part in parts.items()} for kind, cache in kinds]

    outcomes: list[list[dict[str, float]]] = []
    if task == "qbe":
        queries = QueryByExample(data)
        exact, halved, noisy = (queries.scores(each, accelerator)["test"] for each in ways(queries.parts))
        outcomes.append([exact, halved, halved, noisy])
    for fold in TASKS[task].load_folds(data, upstream) if task in TASKS else ():
        in_single, in_half, noisy = ways(fold.parts)
        of_fold = []
        for features in (in_single, in_half, noisy) if arguments.retrain else (in_single,):
            with tempfile.TemporaryDirectory() as scratch:
                training = HeadTraining(fold, features, Path(scratch), accelerator, {"seed": seed})
                of_fold.append(training.run()["test"])
            if features is in_single:
                training.features = in_half
                of_fold.append(fold.scores(training.outputs("test"), fold.parts["test"]))
        outcomes.append(of_fold)
    means: dict[str, dict[str, float]] = {metric: {} for metric in outcomes[0][0]}
    for at, way in enumerate(WAYS if arguments.retrain else WAYS[:2]):
        for metric in means:
            means[metric][way] = statistics.mean(fold[at][metric] for fold in outcomes)
    return means


def main() -> None:
    arguments = parse(HalfPrecisionArguments, __doc__)
    found: dict[str, list[dict[str, float]]] = {}
    with multiprocessing.get_context("spawn").Pool(2) as processes:
        jobs = [
            (task, processes.apply_async(scores, (task, seed, model, arguments)))
            for seed, model in enumerate(arguments.models)
            for task in task_names()
        ]
        for task, job in tqdm(jobs, desc="tasks"):
            for metric, ways in job.get().items():
                found.setdefault(COLUMNS[task, metric][0], []).append(ways)
    others = WAYS[1:] if arguments.retrain else WAYS[1:2]
    rows = []
    for title, seeds in found.items():
        changes = [max(abs(100 * (each[way] - each[WAYS[0]])) for each in seeds) for way in others]
        mean = statistics.mean(100 * each[WAYS[0]] for each in seeds)
        rows.append([title, *(f"{value:.2f}" for value in (mean, *changes))])
    print(f"Points: the mean of the first, {WAYS[0]}, and the largest change from it of all seeds.\n")
    print(markdown_table(("task", WAYS[0], *others), rows))


if __name__ == "__main__":
    run(main)
