"""What the search finds, and what it costs beside the forward passes.

    python benchmarks/search.py --speech_dir speech

A supernet is distilled from the teacher by the recipe. Then, by seed:

- NSGA-II and random search measure as many subnets by their distillation loss on training speech, and the area that
  their fronts dominate is compared. Both look for little loss at few MACs;
- evolution looks for the best subnet of the size of the uniform middle one, at most its parameters and at least 98 %
  of them, and both are measured on test speech, which the search has not used.

At last the wall time of 1000 evaluations is taken, and that of the bare forward passes for some of the same subnets,
taking turns with evaluations.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
import torch
from common import Bench, BenchArguments
from comparisons import report, summary
from processes import parse
from recordings import to_distil
from tqdm.auto import tqdm

from lighthubert_training.data.collators import Batch
from lighthubert_training.distillation.step import prepare_batch
from lighthubert_training.models import computed_once
from lighthubert_training.runs.distributed import build_accelerator
from lighthubert_training.runs.options import option
from lighthubert_training.runs.tables import markdown_table
from lighthubert_training.search.candidates import Budget, Candidates, SubnetCosts
from lighthubert_training.search.fitness import MeanLoss
from lighthubert_training.search.ledger import Ledger
from lighthubert_training.search.search import Search
from modeling_lighthubert import LightHubertForPreTraining, Subnet
from modeling_lighthubert.errors import run
from modeling_lighthubert.files import write_json
from modeling_lighthubert.loading import load_model
from modeling_lighthubert.profiling import median_ratio, time_in_turns


SIZE = 0.98
"""Least parameters of the subnet that is compared with the uniform one, of those of the latter."""


@dataclass(kw_only=True)
class SearchingArguments(BenchArguments):
    """What is searched, and how long."""

    measures: list[str] = option([], "Groups of measures: none.")
    seeds: list[int] = option([0, 1, 2, 3, 4], "Seeds, with a search for each.")
    num_evaluations: int = option(200, "Subnets that each search measures.")
    num_timed: int = option(1000, "Evaluations whose wall time is taken.")
    num_batches: int = option(4, "Batches of recordings that a search measures on.")


class Searching(Bench):
    """A supernet, and searches in it."""

    name = "search"
    arguments: SearchingArguments

    def __init__(self, arguments: SearchingArguments):
        super().__init__(arguments)
        self.output = self.output / "search"
        self.student = load_model(self.distil(0), head=LightHubertForPreTraining, device=arguments.device)
        self.student.freeze_feature_encoder()
        speech, measures = self.measures.speech, self.measures
        parts = [measures.train_frames, sum(measures.test_frames.values(), [])]
        train, test = ([speech.audio(batch) for batch in speech.batches(numbers)] for numbers in parts)
        every = -(-len(train) // arguments.num_batches)
        self.fitness, self.held_out = map(self.mean_loss, (train[::every], test))

    def mean_loss(self, batches: Sequence[Batch]) -> MeanLoss:
        """The distillation loss on these batches."""
        student, teacher, accelerator = self.student, self.teacher, build_accelerator(self.arguments.device)
        with torch.no_grad():
            batches = to_distil(batches, student.config, teacher.objective)
            prepared = [prepare_batch(student, teacher, batch, accelerator) for batch in batches]
        return MeanLoss("distillation loss", student, prepared, lambda batch: batch.loss(student, teacher))

    def search(self, name: str, seed: int, budget: Budget | None = None, **options: Any) -> Search:
        """A search that is kept in a folder of its own, so that it is made once."""
        candidates = Candidates(self.space, SubnetCosts(self.student.base_model), budget or Budget())
        options = {"num_evaluations": self.arguments.num_evaluations} | options
        with closing(Ledger(self.output / f"{name}-{seed}")) as ledger:
            search = Search(candidates, self.fitness, ledger, seed=seed, **options)
            search.run()
        return search

    def error_on_test(self, subnet: Subnet) -> float:
        *_, error = self.held_out.errors(subnet)
        return error


def compare_fronts(searching: Searching) -> list[dict[str, float]]:
    """Hypervolume of both searches, by seed: the fraction that the front dominates of the box between the smallest and
    the largest subnet, in error and in MACs."""
    corners = [searching.space.smallest, searching.space.largest]
    errors = [list(searching.fitness.errors(subnet))[-1] for subnet in corners]
    macs = [SubnetCosts(searching.student.base_model)(subnet)["macs"] for subnet in corners]

    def hypervolume(search: Search) -> float:
        area, error = 0.0, errors[0]
        for each in search.front("macs"):
            if search.error(each) < error:
                area += (error - search.error(each)) * (macs[1] - search.costs[each.number]["macs"])
                error = search.error(each)
        return area / (errors[0] - errors[1]) / (macs[1] - macs[0])

    rows = []
    for seed in searching.arguments.seeds:
        drawn = searching.search("random", seed, population_size=searching.arguments.num_evaluations)
        bred = searching.search("nsga2", seed, objectives=["macs"], population_size=20)
        rows.append({"random": hypervolume(drawn), "nsga2": hypervolume(bred)})
    return rows


def compare_with_uniform(searching: Searching) -> list[dict[str, float]]:
    """Loss on test speech of the subnet that was found and of the uniform one, by seed."""
    uniform, rows = searching.subnets["middle"], []
    costs = SubnetCosts(searching.student.base_model)
    size = costs(uniform)["params"]
    for seed in searching.arguments.seeds:
        budget = Budget({"params": (SIZE * size, size)})
        found = searching.search("sized", seed, budget, population_size=20).best().subnet
        macs = costs(found)["macs"] / costs(uniform)["macs"]
        errors = {"found": searching.error_on_test(found), "uniform": searching.error_on_test(uniform)}
        rows.append({**errors, "parameters": costs(found)["params"] / size, "macs": macs})
    return rows


def time_search(searching: Searching) -> dict[str, float]:
    """Minutes for `num_timed` evaluations, and what an evaluation takes over its forward passes."""
    begin = time.perf_counter()
    number = searching.arguments.num_timed
    evaluations = searching.search(f"timed-{begin:.0f}", 0, objectives=["macs"], num_evaluations=number).evaluations
    minutes, seconds = (time.perf_counter() - begin) / 60, sum(each.seconds for each in evaluations)
    within = []
    for each in tqdm(evaluations[:: max(1, len(evaluations) // 50)], desc="timing"):
        runs = {
            "evaluation": lambda subnet=each.subnet: list(searching.fitness.errors(subnet)),
            "forward passes": partial(forward_passes, searching, each.subnet),
        }
        times = time_in_turns(runs, repeats=1, warm_up=0)
        within.append(median_ratio(times["evaluation"], times["forward passes"]))
    ratios = {"evaluation over forward passes": statistics.median(within)}
    return {"minutes": minutes, **ratios, "search over evaluations": 60 * minutes / seconds}


@torch.no_grad()
def forward_passes(searching: Searching, subnet: Subnet) -> None:
    """The student's outputs for all batches, with convolutions computed before, and no loss."""
    student = searching.student
    student.select_unchecked(subnet)
    for prepared in searching.fitness.batches:
        batch, encoder = prepared.batch, student.base_model.feature_extractor
        with computed_once(encoder, prepared.conv_features):
            student(batch["input_values"], batch["attention_mask"], prepared.mask)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    rows = [[name, summary([row[name] for row in results["fronts"]], True), ""] for name in ("random", "nsga2")]
    rows += [[name, "", summary([row[name] for row in results["sized"]], False)] for name in ("uniform", "found")]
    return markdown_table(("", "hypervolume, %", "loss on test speech"), rows)


def findings(results: dict[str, Any]) -> list[str]:
    """What the searches gained, and what they took."""
    fronts, sized, timed = results["fronts"], results["sized"], results["timed"]
    won = sum(row["nsga2"] > row["random"] for row in fronts)
    better = sum(row["found"] < row["uniform"] for row in sized)
    return [
        f"NSGA-II dominates more than random search in {won} of {len(fronts)} seeds",
        f"the found subnet is better than the uniform one in {better} of {len(sized)} seeds, with"
        f" {statistics.mean(row['parameters'] for row in sized):.3f} times its parameters and"
        f" {statistics.mean(row['macs'] for row in sized):.3f} times its MACs",
        f"{timed['minutes']:.1f} minutes for {results['num_timed']} evaluations; an evaluation takes"
        f" {timed['evaluation over forward passes']:.3f} times its forward passes, the search"
        f" {timed['search over evaluations']:.3f} times its evaluations",
    ]


def main() -> None:
    searching = Searching(parse(SearchingArguments, __doc__))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results: dict[str, Any] = {"fronts": compare_fronts(searching), "sized": compare_with_uniform(searching)}
    results |= {"timed": time_search(searching), "num_timed": searching.arguments.num_timed}
    write_json(searching.output / "results.json", results)
    report(searching.output / "results.md", table(results), findings(results))


if __name__ == "__main__":
    run(main)
