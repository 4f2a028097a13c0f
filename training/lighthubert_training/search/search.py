"""The search: new subnets are bred from the best ones, which Optuna's NSGA-II selects, and the ledger keeps their
errors."""

import random
import statistics
import time
from collections.abc import Sequence

import optuna
from tqdm.auto import tqdm

from lighthubert_training.search.candidates import Candidates
from lighthubert_training.search.fitness import Fitness
from lighthubert_training.search.ledger import Evaluation, Ledger
from modeling_lighthubert import Subnet


NUM_PROPOSALS = 100
"""Bred subnets in a row that may be measured already. After them as many are drawn at random, and if those are
measured too, everything that the budget allows counts as measured."""
NUM_RIVALS = 8
"""Least number of evaluations that one is compared with, before it is stopped for being worse than their median."""


class Selection(optuna.samplers.NSGAIISampler):
    """Selects the parents of a generation from the generations before it: by domination, then by crowding distance;
    with one objective, the best. It samples no values: `Candidates` breeds the subnets."""

    def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        self.get_trial_generation(study, trial)


class Search:
    """Measures subnets until there are `num_evaluations`.

    Optuna's study is kept in memory: in SQLite, it takes 0.2 s a trial, as long as an evaluation of a small model. A
    process rebuilds it from the ledger when it starts, and reads the evaluations of other processes before each
    proposal.

    Args:
        objectives: names of the costs that are minimised beside the error.
        population_size: size of a generation. A first generation without end is random search.
        num_evaluations: number of subnets to measure, by all processes and earlier runs together.
        successive_halving: stop an evaluation if its error after a stage is above the median of its rivals, the
            subnets that cost no more.
        seed: of the proposals.
    """

    def __init__(
        self,
        candidates: Candidates,
        fitness: Fitness,
        ledger: Ledger,
        objectives: Sequence[str] = (),
        population_size: int = 50,
        num_evaluations: int = 1000,
        successive_halving: bool = False,
        seed: int = 0,
    ):
        self.candidates, self.fitness, self.ledger = candidates, fitness, ledger
        self.objectives, self.num_evaluations = list(objectives), num_evaluations
        self.successive_halving, self.seed = successive_halving, seed
        self.evaluations: list[Evaluation] = []
        self.costs: dict[int, dict[str, float]] = {}
        self.population_size, self.selection = population_size, Selection(population_size=population_size)
        directions = [optuna.study.StudyDirection.MINIMIZE] * (1 + len(self.objectives))
        self.study = optuna.create_study(directions=directions, sampler=self.selection)

    def run(self) -> None:
        """Makes evaluations, with a progress bar of those of all processes. It ends when all are finished: it waits
        for those of other processes, and takes over those of processes that die."""
        with tqdm(total=self.num_evaluations, desc="searching") as bar:
            while (claimed := self.claim()) is not None or len(self.evaluations) < len(self.ledger):
                if claimed is None:
                    time.sleep(0.1)
                    continue
                self.measure(*claimed)
                self.catch_up()
                bar.n = len(self.evaluations)
                bar.set_postfix({self.fitness.name: f"{min(map(self.error, self.evaluations)):.4g}"})

    def claim(self) -> tuple[int, Subnet] | None:
        """Number and subnet of the next evaluation: one that a dead process left, or a new one. `None` if there are
        enough, or if no new subnets are found."""
        if (left := self.ledger.take_over()) is not None:
            return left
        self.catch_up()
        generation = len(self.evaluations) // self.population_size
        parents = self.selection.get_parent_population(self.study, generation)
        subnets = [self.evaluations[number].subnet for number in sorted(parent.number for parent in parents)]
        rng = random.Random(f"{self.seed}-{len(self.ledger)}")
        for number in range(2 * NUM_PROPOSALS):
            breeds = subnets and number < NUM_PROPOSALS
            subnet = self.candidates.child(subnets, rng) if breeds else self.candidates.draw(rng)
            if (claimed := self.ledger.claim(subnet, self.num_evaluations)) is not None:
                return claimed, subnet
        return None

    def measure(self, number: int, subnet: Subnet) -> None:
        """Makes one evaluation."""
        start, errors = time.perf_counter(), []
        rivals = self.rivals(subnet) if self.successive_halving else []
        for error in self.fitness.errors(subnet):
            errors.append(error)
            others = [each.errors[len(errors) - 1] for each in rivals if len(each.errors) >= len(errors)]
            if len(others) >= NUM_RIVALS and error > statistics.median(others):
                break
        self.ledger.finish(number, errors, time.perf_counter() - start)

    def rivals(self, subnet: Subnet) -> list[Evaluation]:
        """Finished evaluations of subnets that cost no more."""
        costs = self.candidates.costs(subnet)
        return [
            each
            for each in self.evaluations
            if all(cost <= costs[name] for name, cost in self.costs[each.number].items())
        ]

    def catch_up(self) -> None:
        """Tells the study the evaluations that were finished since the last call."""
        for each in self.ledger.finished(after=len(self.evaluations)):
            self.evaluations.append(each)
            self.costs[each.number] = costs = self.candidates.costs(each.subnet)
            self.study.tell(self.study.ask(), [self.error(each), *(costs[name] for name in self.objectives)])

    def error(self, evaluation: Evaluation) -> float:
        """The error on all data. To that of a stopped evaluation is added how much the error of complete ones rose
        from its last stage to the end, in the median."""
        last = len(evaluation.errors) - 1
        if last == self.fitness.num_stages - 1:
            return evaluation.errors[last]
        added = [each.errors[-1] - each.errors[last] for each in self.complete]
        return evaluation.errors[last] + statistics.median(added)

    @property
    def complete(self) -> list[Evaluation]:
        """Evaluations on all data."""
        return [each for each in self.evaluations if len(each.errors) == self.fitness.num_stages]

    def best(self) -> Evaluation:
        """The one with the least error on all data."""
        return min(self.complete, key=self.error)

    def front(self, cost: str) -> list[Evaluation]:
        """Evaluations on all data with less error than all that cost as much or less, cheapest first."""
        found: list[Evaluation] = []
        by_cost = sorted(self.complete, key=lambda each: (self.costs[each.number][cost], self.error(each)))
        for each in by_cost:
            if not found or self.error(each) < self.error(found[-1]):
                found.append(each)
        return found
