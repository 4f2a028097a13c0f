"""What benchmarks share: one bench with every control, for all tables of learning; runs, two at a time, whose results
are kept; and small measures of this process.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from datasets import disable_progress_bars
from filelock import FileLock
from measures import MeasureArguments, Measures
from recordings import distillation_files, write_superb_data
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.utils import logging

from lighthubert_training.data.collators import Batch
from lighthubert_training.data.strings import SAMPLING_RATE
from lighthubert_training.distillation.arguments import ObjectiveArguments
from lighthubert_training.distillation.teacher import build_teacher
from lighthubert_training.runs.options import OptionParser, option, parse_options
from lighthubert_training.runs.tables import mean_and_deviation
from modeling_lighthubert import LightHubertModel, Subnet
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import whole_files, write_json, write_text
from modeling_lighthubert.loading import load_config, load_model, parse_search_space
from modeling_lighthubert.profiling import macs_per_second


ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
RECIPE = yaml.safe_load((FOLDER / "teacher/distillation.yaml").read_text(encoding="utf-8"))
SUBNETS = ("largest", "middle", "smallest")
RANDOM, SLICE, ENCODER = "random weights", "slice of the teacher", "teacher's feature encoder, random transformer"
ALONE, DISTILHUBERT, STAR = "distilled alone", "DistilHuBERT's way", "STaRHuBERT's way"
UNTRAINED, TRAINED_ALONE = (RANDOM, SLICE, ENCODER), (ALONE, DISTILHUBERT, STAR)
A_SMALL = Subnet.uniform(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
Results = Mapping[str, Mapping[str, Any]]
"""Results by the name of the run and its seed."""


@dataclass(kw_only=True)
class BenchArguments(MeasureArguments):
    """What is distilled, for how long, and what becomes of it."""

    teacher_name_or_path: str = option(str(FOLDER / "teacher"), "HuBERT to distil.")
    search_space: str = option(str(FOLDER / "teacher/search_space.json"), "JSON file: the subnets to train.")
    output_dir: str = option(str(FOLDER / "output"), "Folder for runs.")
    results_file: str | None = option(None, "JSON file of results. Default: that of the benchmark in results/.")
    passes: int = option(300, "Passes of a subnet that each distillation has.")
    seeds: list[int] = option([0, 1, 2], "One run of each kind for each.")
    only: list[str] | None = option(None, "Runs to make, by name. Default: all.")


@dataclass
class SpeechArguments:
    """Recordings of single words, or strings of them."""

    train_file: str = option(str(ROOT / "demo/speech/train.parquet"), "Parquet file to train on.")
    test_file: str = option(str(ROOT / "demo/speech/test.parquet"), "Parquet file to test on.")


def parse(kind: type, description: str | None) -> Any:
    """Options of a benchmark, as `kind`; this process computes with one thread."""
    prepare_process()
    return parse_options(OptionParser(kind, description=description))[0]


class Bench:
    """One teacher, its untrained and trained controls, and what all of them are measured by.

    Attributes:
        untrained: the teacher as a supernet, whose subnets are its slices.
    """

    def __init__(self, arguments: BenchArguments):
        self.arguments, self.output = arguments, Path(arguments.output_dir).resolve()
        # two thirds of the layers, as 8 of 12
        depth = load_config(arguments.teacher_name_or_path).num_hidden_layers
        self.recipe = RECIPE | {"num_target_layers": round(depth * 2 / 3)}
        objective = ObjectiveArguments(num_target_layers=self.recipe["num_target_layers"])
        self.teacher, extractor = build_teacher(arguments.teacher_name_or_path, "float32", objective)
        self.space = parse_search_space(arguments.search_space)
        self.subnets = {name: self.space.named[name] for name in SUBNETS}
        options = {"head": LightHubertModel, "dtype": torch.float32, "search_space": self.space}
        self.untrained = load_model(arguments.teacher_name_or_path, **options)
        self.measures = Measures(arguments, self.teacher, extractor)
        self.train_files = distillation_files(arguments, self.output / "data")

    def measure(self, model: LightHubertModel, seed: int) -> dict[str, float]:
        """All measures of a cut model that are asked for. Those of `superb` and `stand_ins` are keyword spotting and
        slot filling by `run_superb.py`, on this speech and on generated speech."""
        row, folders = self.measures(model, seed), {"superb": "people", "stand_ins": "stand-ins"}
        for name in [folders[group] for group in self.arguments.measures if group in folders]:
            data, folder = self.superb_data(name), self.save(model)
            scores, tasks = folder / f"{name}-{seed}", [task for task in ("ks", "sf") if (data / task).exists()]
            options = {"model_name_or_path": folder, "data_dir": data, "tasks": tasks, "seeds": seed, "device": "cpu"}
            with TemporaryDirectory(dir=self.output) as features:
                options |= {"cache_dir": features, "features_dtype": "float16", "variant": "stand_in"}
                run_script("training/run_superb.py", output_dir=scores, **options)
            for file in scores.glob("*/*/seed-*/result.json"):
                result = json.loads(file.read_text(encoding="utf-8"))
                for measure, value in result["test"].items():
                    row[f"{result['task']} {measure.rpartition('_')[2]}, {name}"] = value
        return row

    def superb_data(self, name: str) -> Path:
        """Data of SUPERB's tasks, of people or generated, which are made once."""
        folder = self.output / "superb" / name
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "made").exists():
                if name == "people":
                    write_superb_data(self.measures.speech.recordings, folder)
                else:
                    run_script("demo/make_superb_stand_ins.py", output_dir=folder)
                write_text(folder / "made", "")
        return folder

    def control(self, kind: str, subnet: Subnet, seed: int) -> LightHubertModel:
        """An untrained model of the shape of `subnet`: one of `UNTRAINED`."""
        if kind == SLICE:
            return self.untrained.extract_subnet(subnet)
        set_seed(seed)
        model = LightHubertModel(self.untrained.config.cut_to(subnet))
        if kind == ENCODER:
            model.feature_extractor.load_state_dict(self.untrained.feature_extractor.state_dict())
        return model.eval()

    def first_layers(self, subnet: Subnet) -> LightHubertModel:
        """The first layers of the teacher, as wide as they are, at the cost in MACs of `subnet`: as many as fit with
        at least half of their FFN units, and as many units as fit; the smallest such model if none fits."""
        full, budget = self.space.largest, macs_per_second(self.untrained, subnet)
        size, step = full.intermediate_size[0], full.hidden_size // 12
        shapes = [
            Subnet.uniform(full.hidden_size, depth, full.num_attention_heads[0], units, full.head_dim)
            for depth in range(1, full.num_hidden_layers + 1)
            for units in range(step, size + 1, step)
            if depth == 1 or 2 * units >= size
        ]
        with torch.device("meta"):
            costs = [macs_per_second(LightHubertModel(self.untrained.config.cut_to(shape))) for shape in shapes]
        fitting = [shape for shape, cost in zip(shapes, costs, strict=True) if cost <= budget]
        shape = fitting[-1] if fitting else shapes[0]
        model = LightHubertModel(self.untrained.config.cut_to(shape))
        weights = self.untrained.extract_subnet(full).state_dict()
        model.load_state_dict(
            {name: weights[name][tuple(map(slice, weight.shape))] for name, weight in model.state_dict().items()}
        )
        return model.eval()

    def distil(self, seed: int, **changes: Any) -> Path:
        """Distils by the recipe with `changes`, unless that was done before, and goes on with what a run that was
        killed has left. Runs are kept by their options and the teacher's weights, so that benchmarks share them.

        Returns:
            The folder of the student.
        """
        options = self.recipe | {"teacher_name_or_path": self.arguments.teacher_name_or_path}
        options |= {"search_space": self.arguments.search_space, "max_steps": self.arguments.passes}
        options |= {"train_file": self.train_files, "seed": seed} | changes
        described = repr([weights_digest(self.untrained), *sorted(options.items(), key=str)])
        digest = hashlib.sha256(described.encode()).hexdigest()[:12]
        folder, options["teacher_cache_dir"] = self.output / "distilled" / digest, self.output / "teacher"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "model.safetensors").exists():
                run_script(
                    "training/run_distillation.py", output_dir=folder, resume_from_checkpoint="latest", **options
                )
        return folder

    def distil_alone(self, kind: str, subnet: Subnet, seed: int, **changes: Any) -> LightHubertModel:
        """One model of the cost of `subnet`, distilled by itself: one of `TRAINED_ALONE`."""
        model = self.first_layers(subnet) if kind == DISTILHUBERT else self.control(SLICE, subnet, seed)
        depth, options = self.space.largest.num_hidden_layers, {}
        if kind == DISTILHUBERT:  # layers 4, 8 and 12 of 12, L1 and cosine, no masks
            layers = [round(depth * layer / 12) for layer in (4, 8, 12)]
            options = {"target": "hidden_states", "target_layers": layers, "target_norm": "none", "cosine_weight": 1.0}
            options |= {"mask_time_prob": 0.0, "loss_frames": "all"}
        elif kind == STAR:  # relations between the frames of every layer, no masks
            options = {"temporal_relation_weight": 1.0, "prediction_weight": 0.0}
            options |= {"mask_time_prob": 0.0, "loss_frames": "all"}
        start = {"student_name_or_path": self.save(model), "search_space": None, "sampling": "largest"}
        return load_model(self.distil(seed, **start, **options, **changes), head=LightHubertModel)

    def ordered(self, search_space: str | Path) -> Path:
        """The teacher as a supernet of a search space, a file, with its channels, heads and FFN units in the order of
        their importance. It is made once: delete its folder after a change of how they are put in order."""
        described = weights_digest(self.untrained) + Path(search_space).read_text(encoding="utf-8")
        folder = self.output / "ordered" / hashlib.sha256(described.encode()).hexdigest()[:12]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                options = {"model_name_or_path": self.arguments.teacher_name_or_path, "search_space": search_space}
                options |= {"train_file": self.train_files, "device": "cpu"}
                run_script("training/order_channels.py", output_dir=folder, **options)
        return folder

    def save(self, model: LightHubertModel) -> Path:
        """A folder with a model and its feature extractor, by the weights of the model."""
        folder = self.output / "models" / weights_digest(model)
        with FileLock(folder.with_suffix(".lock")), whole_files(folder) as unfinished:
            model.save_pretrained(unfinished)
            self.measures.speech.extractor.save_pretrained(unfinished)
        return folder


class Table(Bench, ABC):
    """A bench whose runs make a table.

    Attributes:
        name: of the benchmark.
        minutes: what a run is taken to last on one of two cores, by name or of any, before one was made.
    """

    name: ClassVar[str]
    minutes: ClassVar[Mapping[str, float]] = {}

    @classmethod
    @abstractmethod
    def names(cls, arguments: BenchArguments) -> list[str]:
        """Names of the runs, in the order in which they are made."""

    @abstractmethod
    def run(self, name: str, seed: int) -> dict[str, dict[str, Any]]:
        """Makes a run, and measures what comes out of it, by name."""


class Runner:
    """Makes the runs of a benchmark that have no result yet, two at a time in processes with one thread each, and
    keeps each result as soon as it is there. A group of measures may be asked for later: what was distilled is kept.

    Attributes:
        file: of the results, JSON, with the arguments that they were made with.
        results: rows of measures by run and seed.
        seconds: by run and seed: what each part of it took, by the groups of measures that were taken in it.
    """

    FREE = ("output_dir", "results_file", "seeds", "only", "measures")
    """Options that change no result."""

    def __init__(self, kind: type[Table], arguments: BenchArguments):
        self.kind, self.arguments = kind, arguments
        self.file = Path(arguments.results_file or FOLDER / f"results/{kind.name}.json")
        self.options = {name: value for name, value in asdict(arguments).items() if name not in self.FREE}
        for name in ("teacher_name_or_path", "search_space", "speech_dir"):
            self.options[name] = Path(self.options[name]).name
        self.options["teacher_weights"] = weights_digest(load_model(arguments.teacher_name_or_path))
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
            print(f"{len(jobs)} runs, about {self.hours(jobs):.1f} hours on two cores", flush=True)
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
        """What the jobs take, by what those took that were made before, or else by `minutes`."""

        def seconds(job: Job) -> float:
            known = [made.get(" ".join(job.groups)) for made in self.seconds.get(job.name, {}).values()]
            guess = 60 * self.kind.minutes.get(job.name, self.kind.minutes.get("any", 10.0))
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
    """Makes runs, two at a time, and hands each result to `keep` as soon as it is there. The first that fails ends the
    others that have not begun; one that has begun is finished and kept."""
    context, count = get_context("spawn"), min(2, len(jobs))
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


def weights_digest(model: nn.Module) -> str:
    """Twelve hexadecimal digits that stand for the weights of a model on the CPU, compared in float32."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.float().numpy().tobytes())
    return digest.hexdigest()[:12]


def run_script(script: str, **options: Any) -> None:
    """Runs `script` from the top folder, with one thread and its options that are not `None`; a list is several words.
    Its output is added to `run.log` in its `output_dir`.

    Raises:
        UserError: the script says that an option is wrong.
        RuntimeError: it failed otherwise.
    """
    words = []
    for name, value in options.items():
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    command, environment = [sys.executable, str(ROOT / script), *words], os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode == 2:
        raise UserError(finished.stderr.splitlines()[-1].removeprefix("error: "))
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr[-3000:]}")
    with (Path(options["output_dir"]) / "run.log").open("a", encoding="utf-8") as log:
        log.write(finished.stdout + finished.stderr)


def report(file: Path, table: str, findings: Sequence[str] = ()) -> None:
    """Prints a table and a list of findings, in Markdown, and writes them to a file."""
    text = "\n".join([table, "", *(f"- {finding}" for finding in findings)]).rstrip() + "\n"
    write_text(file, text)
    print(text, f"all in {file.parent}", sep="\n")


def prepare_process() -> None:
    """One thread, and no messages of libraries between the results."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def summary(values: Sequence[float], percent: bool) -> str:
    """Mean and standard deviation, in percent or as they are."""
    return mean_and_deviation(values, 1, 100) if percent else mean_and_deviation(values, 3)


def mean_alone(values: Sequence[float], measure: str) -> str:
    """The mean: of R2 as it is, of other measures in percent."""
    digits, scale = (3, 1) if measure.startswith("r2") else (1, 100)
    return f"{scale * np.mean(values):.{digits}f}" if values else ""


def mean_and_each(values: Sequence[float], measure: str) -> str:
    """The mean, and every seed; the value alone where it is the same for all."""
    each = [mean_alone([value], measure) for value in values]
    mean = mean_alone(values, measure)
    return mean if len(set(each)) == 1 and len(each) > 1 else f"{mean} ({' '.join(each)})" if values else ""


def measures_of(results: Results) -> list[str]:
    """Names of all measures."""
    made = (row for runs in results.values() for run in runs.values() for row in run.values())
    return list(dict.fromkeys(name for row in made for name, value in row.items() if isinstance(value, float)))


def is_error(measure: str) -> bool:
    """Whether less of a measure is better."""
    return bool({"wer", "cer", "per"} & set(measure.replace(",", "").split()))


def over_seeds(results: Results, run: str, row: str, measure: str) -> dict[str, float]:
    """A measure by seed, of the row of that name in a run."""
    runs = results.get(run, {})
    return {seed: made[row][measure] for seed, made in sorted(runs.items()) if measure in made.get(row, {})}


@dataclass(frozen=True)
class Margin:
    """How much better one model is than another in a measure, by seeds that both have.

    Attributes:
        gains: of each seed, positive where it is better.
        relative: mean of the gains over the size of the mean of the other.
    """

    gains: Sequence[float]
    relative: float

    @property
    def verdict(self) -> int:
        """1 if it is better in every seed, -1 if it is worse in every seed, else 0: no order can be told."""
        return int(all(gain > 0 for gain in self.gains)) - int(all(gain < 0 for gain in self.gains))


def margin(ours: Mapping[str, float], theirs: Mapping[str, float], measure: str) -> Margin | None:
    """Of two rows; `None` without seeds that both have."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    sign = -1 if is_error(measure) else 1
    gains = [sign * (ours[seed] - theirs[seed]) for seed in seeds]
    return Margin(gains, float(np.mean(gains) / abs(np.mean([theirs[seed] for seed in seeds]))))


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
