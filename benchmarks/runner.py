"""Makes the runs of a benchmark, several at a time, and keeps their results."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from common import FOLDER, RECIPE, BenchArguments, Table, weights_digest
from measures import SECONDS_OF_GROUP
from processes import prepare_process
from tqdm.auto import tqdm

from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import write_json
from modeling_lighthubert.loading import load_model


SECONDS_OF_PASS = 0.8
"""Of one of two cores, in the benchmarks' recipe."""


class Runner:
    """Makes the runs of a benchmark that have no result yet, some at a time in processes with one thread each, and
    keeps each result as soon as it is there. A group of measures may be asked for later: what was distilled is kept.

    Attributes:
        file: of the results, JSON, with the arguments that they were made with.
        results: rows of measures by run and seed.
        seconds: by run and seed: what each part of it took, by the groups of measures that were taken in it.
    """

    FREE = ("output_dir", "results_file", "seeds", "only", "measures", "device", "num_processes", "num_workers")
    """Options that change no result."""

    def __init__(self, kind: type[Table], arguments: BenchArguments):
        self.kind, self.arguments = kind, arguments
        self.file = Path(arguments.results_file or FOLDER / f"results/{kind.name}.json")
        self.options = {name: value for name, value in asdict(arguments).items() if name not in self.FREE}
        for name in ("teacher_name_or_path", "speech_dir"):
            self.options[name] = Path(self.options[name]).name
        self.options["teacher_weights"] = weights_digest(load_model(arguments.teacher_name_or_path))
        self.options["search_space"] = json.loads(Path(arguments.search_space).read_text(encoding="utf-8"))
        self.options["recipe"] = RECIPE
        self.results: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, dict[str, dict[str, int]]] = {}
        if self.file.exists():
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            if changed := [name for name in self.options if kept["arguments"].get(name) != self.options[name]]:
                raise UserError(
                    f"{self.file} has results with another {', '.join(changed)}: give the same, or another"
                    " --results_file"
                )
            self.results, self.seconds = kept["results"], kept["seconds"]

    def __call__(self) -> dict[str, dict[str, Any]]:
        """Results of all runs in the file, by name and seed."""
        known, only = self.kind.names(self.arguments), self.arguments.only
        if unknown := set(only or ()) - set(known):
            raise UserError(f"--only {' '.join(sorted(unknown))}: choose from {', '.join(map(repr, known))}")
        jobs = [job for seed in self.arguments.seeds for name in only or known if (job := self.job(name, seed))]
        if jobs:
            print(f"{len(jobs)} runs, about {self.hours(jobs):.1f} hours on two cores of a CPU", flush=True)
            run_all(self.kind, self.arguments, jobs, self.keep)
        return self.results

    def job(self, name: str, seed: int) -> "Job | None":
        """What is left of a run: all of it, or groups of measures."""
        if (made := self.seconds.get(name, {}).get(str(seed))) is None:
            return Job(name, seed, tuple(self.arguments.measures))
        known = " ".join(made).split()
        missing = tuple(group for group in self.arguments.measures if group not in known)
        return Job(name, seed, missing) if missing else None

    def hours(self, jobs: Sequence["Job"]) -> float:
        """What the jobs take, by what those took that were made before, or else by their `cost`."""

        def seconds(job: Job) -> float:
            known = [made.get(" ".join(job.groups)) for made in self.seconds.get(job.name, {}).values()]
            passes, models = self.kind.cost(job.name, self.arguments)
            guess = passes * SECONDS_OF_PASS + models * sum(SECONDS_OF_GROUP[group] for group in job.groups)
            return float(np.mean([each for each in known if each is not None] or [guess]))

        return sum(map(seconds, jobs)) / 7200

    def keep(self, job: "Job", seconds: float, rows: Mapping[str, Mapping[str, Any]]) -> None:
        self.seconds.setdefault(job.name, {}).setdefault(str(job.seed), {})[" ".join(job.groups)] = round(seconds)
        made = self.results.setdefault(job.name, {}).setdefault(str(job.seed), {})
        for row, measured in rows.items():
            made.setdefault(row, {}).update(measured)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"arguments": self.options, "seconds": self.seconds, "results": self.results})


@dataclass(frozen=True)
class Job:
    """A run, and the groups of measures that are taken of what comes out of it."""

    name: str
    seed: int
    groups: tuple[str, ...]


_bench: Table | None = None
"""Of a worker process."""


def _start(kind: type[Table], arguments: BenchArguments) -> None:
    global _bench
    prepare_process()
    _bench = kind(arguments)


def _work(job: Job) -> tuple[float, dict[str, dict[str, Any]]]:
    assert _bench is not None
    begin, _bench.arguments.measures = time.perf_counter(), list(job.groups)
    rows = _bench.run(job.name, job.seed)
    return time.perf_counter() - begin, rows


def run_all(
    kind: type[Table],
    arguments: BenchArguments,
    jobs: Sequence[Job],
    keep: Callable[[Job, float, dict[str, dict[str, Any]]], None],
) -> None:
    """Makes runs, `num_processes` at a time, and hands each result to `keep` as soon as it is there. The first that
    fails ends the others that have not begun; one that has begun is finished and kept."""
    context, count = get_context("spawn"), min(arguments.num_processes, len(jobs))
    with (
        tqdm(total=len(jobs), desc="runs") as bar,
        ProcessPoolExecutor(count, context, initializer=_start, initargs=(kind, arguments)) as workers,
    ):
        running = {workers.submit(_work, job): job for job in jobs}
        left, failure = set(running), None
        try:
            while left:
                finished, left = wait(left, return_when=FIRST_COMPLETED)
                for future in finished:
                    if error := future.exception():
                        failure = failure or error
                        left = {each for each in left if not each.cancel()}
                        continue
                    job = running[future]
                    keep(job, *future.result())
                    bar.set_postfix_str(f"{job.name}, seed {job.seed}")
                    bar.update()
        finally:
            workers.shutdown(cancel_futures=True)
    if failure is not None:
        raise failure
