"""What it costs to keep SUPERB's features in half precision, on the stand-ins of `superb.py`, which has to run first.

    python benchmarks/superb_half_precision.py --models demo/output/seed-?/supernet --subnet largest
    python benchmarks/superb_half_precision.py --models demo/teacher demo/teacher demo/teacher --retrain False

A model for each seed. A head that was trained on whole features is tested on halved ones; another is trained and
tested on halved ones. The control is trained and tested on features with noise of the size of single precision's
rounding: training alone can make much of that. Two tasks at a time with a thread each.
"""

import multiprocessing
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from run_demo import markdown_table
from superb import ROOT  # and what it puts on the path
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from lighthubert_training.superb.data import Part, read_recipe, task_names
from lighthubert_training.superb.features import FeatureCache, Recordings, Upstream
from lighthubert_training.superb.query_by_example import QueryByExample
from lighthubert_training.superb.report import COLUMNS
from lighthubert_training.superb.tasks import TASKS
from lighthubert_training.superb.training import HeadTraining


WAYS = ("whole", "same head, halved", "trained on halved", "trained on noisy")


@dataclass
class HalfPrecisionArguments:
    """What is scored, and on what."""

    models: list[str] = field(metadata={"help": "Models, one for each seed."})
    subnet: str | None = field(default=None, metadata={"help": "Of supernets: a name or a JSON file."})
    retrain: bool = field(default=True, metadata={"help": "Train heads on halved and on noisy features, too."})
    superb_dir: str = field(
        default=str(ROOT / "benchmarks/output/superb"), metadata={"help": "What superb.py wrote: data and features."}
    )


class NoisyRecordings(Recordings):
    """Hidden states that are off by about the rounding of single precision."""

    def __getitem__(self, index: int) -> torch.Tensor:
        states = super().__getitem__(index)
        noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(index))
        return states * (1 + torch.finfo(torch.float32).eps * noise)


def scores(task: str, seed: int, model: str, arguments: HalfPrecisionArguments) -> dict[str, dict[str, float]]:
    """Test scores, for each metric in each of the `WAYS`; the first two of them without `arguments.retrain`."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    upstream, folder = Upstream.from_pretrained(model, arguments.subnet), Path(arguments.superb_dir)
    whole, half = (FeatureCache(upstream, folder / "features", dtype) for dtype in (torch.float32, torch.float16))

    def ways(parts: dict[str, Part]) -> list[dict[str, Recordings]]:
        kinds = ((Recordings, whole), (Recordings, half), (NoisyRecordings, whole))
        return [{name: kind(part.audio, upstream, cache) for name, part in parts.items()} for kind, cache in kinds]

    recipe, accelerator = read_recipe(task, "stand_in"), Accelerator(cpu=True)
    outcomes: list[list[dict[str, float]]] = []
    if task == "qbe":
        queries = QueryByExample(recipe, folder / "data")
        exact, halved, noisy = (queries.scores(each, accelerator)["test"] for each in ways(queries.parts))
        outcomes.append([exact, halved, halved, noisy])
    else:
        for fold in TASKS[task].load_folds(recipe, folder / "data"):
            of_fold = []
            for recordings, tested in zip(ways(fold.parts), (True, False, False), strict=True):
                if not (tested or arguments.retrain):
                    break
                with tempfile.TemporaryDirectory() as scratch:
                    training = HeadTraining(fold, recordings, upstream, Path(scratch), accelerator, {"seed": seed})
                    of_fold.append(training.run()["test"])
                if tested:
                    training.recordings = ways(fold.parts)[1]
                    of_fold.append(fold.scores(training.outputs("test"), fold.parts["test"]))
            outcomes.append(of_fold)
    return {
        metric: {
            way: statistics.mean(fold[at][metric] for fold in outcomes)
            for at, way in enumerate(WAYS if arguments.retrain else WAYS[:2])
        }
        for metric in outcomes[0][0]
    }


def main() -> None:
    (arguments,) = HfArgumentParser(HalfPrecisionArguments, description=__doc__).parse_args_into_dataclasses()
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
        changes = [max(abs(100 * (each[way] - each["whole"])) for each in seeds) for way in others]
        whole = statistics.mean(100 * each["whole"] for each in seeds)
        rows.append([title, *(f"{value:.2f}" for value in (whole, *changes))])
    print(f"Points: the mean of the first, {WAYS[0]}, and the largest change from it of all seeds.\n")
    print(markdown_table(("task", WAYS[0], *others), rows))


if __name__ == "__main__":
    main()
