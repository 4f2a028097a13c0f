"""Finds the best subnet for a budget, and what each more costs.

    python training/run_subnet_search.py --model_name_or_path supernet --validation_file test.parquet \\
        --teacher_name_or_path facebook/hubert-base-ls960 --max_params 27M --objectives macs --output_dir search
    python training/run_subnet_search.py --model_name_or_path asr-supernet --validation_file test.parquet \\
        --fitness ctc --max_macs 2.5G --algorithm evolution --output_dir search

`best.json` is the best subnet, for `set_subnet` and `--subnet`. The same command goes on with a search that was
stopped, and started once more at the same time it makes the search with two processes.
"""

import csv
import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
import torch
from accelerate import Accelerator
from run_distillation import build_teacher, check_frame_rates
from transformers import AutoFeatureExtractor, AutoModelForCTC, HfArgumentParser, Wav2Vec2Processor

from lighthubert_training.data.batches import DistillationCollator, Recording
from lighthubert_training.data.sources import UNREADABLE, DataArguments, load_speech, load_waveform
from lighthubert_training.distillation.arguments import DistillationArguments
from lighthubert_training.distillation.step import prepare_lesson
from lighthubert_training.distillation.teacher import ObjectiveArguments
from lighthubert_training.probing import make_batches
from lighthubert_training.recognition.data import CTCCollator
from lighthubert_training.runs.options import parse_recipe
from lighthubert_training.search.candidates import COSTS, Budget, Candidates, SubnetCosts
from lighthubert_training.search.fitness import CTCError, DistillationLoss, Fitness, ProbeError
from lighthubert_training.search.latency import LatencyTable
from lighthubert_training.search.ledger import Evaluation, Ledger
from lighthubert_training.search.report import FurtherTraining, write_report
from lighthubert_training.search.search import Search
from modeling_lighthubert import (
    LightHubertForCTC,
    LightHubertForPreTraining,
    LightHubertModel,
    LightHubertPreTrainedModel,
)


matplotlib.use("Agg")
from matplotlib import pyplot


@dataclass
class SearchArguments:
    """What is searched, by what, and how long."""

    model_name_or_path: str = field(metadata={"help": "Supernet: distilled, or fine-tuned once for all."})
    output_dir: str = field(metadata={"help": "Folder for the search and its results."})
    fitness: str = field(
        default="distillation",
        metadata={
            "help": "Error of a subnet: distillation loss (no labels needed), character error rate of a CTC model, or"
            " the error of a linear probe for --label_column_name.",
            "choices": ("distillation", "ctc", "probe"),
        },
    )
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Model that the supernet was distilled from, for the distillation loss."}
    )
    text_column_name: str = field(default="text", metadata={"help": "Column with the transcripts, for ctc."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the labels, for probe."})
    algorithm: str = field(
        default="nsga2",
        metadata={
            "help": "nsga2 looks for the least error at every cost in --objectives, evolution for the least error (the"
            " paper's), random draws.",
            "choices": ("nsga2", "evolution", "random"),
        },
    )
    objectives: list[str] = field(
        default_factory=lambda: ["macs"],
        metadata={"help": "Costs that nsga2 minimises beside the error.", "choices": tuple(COSTS)},
    )
    max_params: str | None = field(default=None, metadata={"help": "Most parameters of the cut model, such as 27M."})
    min_params: str | None = field(default=None, metadata={"help": "Least parameters."})
    max_macs: str | None = field(default=None, metadata={"help": "Most MACs per second of audio, such as 2.5G."})
    min_macs: str | None = field(default=None, metadata={"help": "Least MACs."})
    max_latency_ms: str | None = field(
        default=None,
        metadata={"help": "Most milliseconds for a clip on this machine, by a table of parts that is measured first."},
    )
    min_latency_ms: str | None = field(default=None, metadata={"help": "Least milliseconds."})
    latency_seconds: float = field(default=5.0, metadata={"help": "Length of the clip."})
    hubert_exportable: bool = field(
        default=False, metadata={"help": "Only subnets that a stock HuBERT can hold exactly."}
    )
    num_evaluations: int = field(default=1000, metadata={"help": "Subnets to measure, by all processes together."})
    population_size: int = field(default=50, metadata={"help": "Subnets of a generation."})
    successive_halving: bool = field(
        default=False,
        metadata={"help": "Stop where a quarter or half of the data says that a subnet is worse than half of others."},
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Recordings in a batch."})
    report: bool = field(
        default=False,
        metadata={
            "help": "Write report.md: which choices matter, what the front is made of, and how well the error of"
            " subnets foretells that after further training, on the training part of the data (not for probe)."
        },
    )
    report_subnets: int = field(default=8, metadata={"help": "Subnets that are trained further, at least 3."})
    report_steps: int = field(default=100, metadata={"help": "Steps of that, for each."})
    report_learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of that."})
    seed: int = field(default=0, metadata={"help": "Of everything random."})

    def __post_init__(self) -> None:
        if self.num_evaluations < 1 or self.population_size < 2:
            raise ValueError(
                f"num_evaluations={self.num_evaluations} has to be at least 1, population_size={self.population_size}"
                " at least 2"
            )
        if self.report and (self.report_subnets < 3 or self.report_steps < 1):
            raise ValueError(
                f"report_subnets={self.report_subnets} has to be at least 3, report_steps={self.report_steps} at"
                " least 1"
            )
        if self.fitness == "distillation" and self.teacher_name_or_path is None:
            raise ValueError("the distillation loss needs --teacher_name_or_path; ctc and probe do without")

    @property
    def budget(self) -> Budget:
        """Raises ValueError: a limit that is no number."""
        limits = {}
        for name in COSTS:
            least, most = (getattr(self, f"{end}_{name}") for end in ("min", "max"))
            if least is not None or most is not None:
                limits[name] = (number(least or "0"), number(most or "inf"))
        return Budget(limits, self.hubert_exportable)

    @property
    def needs_latency(self) -> bool:
        return "latency_ms" in {*self.objectives, *self.budget.limits}


FREE_TO_CHANGE = {
    *("output_dir", "num_evaluations", "preprocessing_num_workers"),
    *("report", "report_subnets", "report_steps", "report_learning_rate"),
}
"""Options that do not change what is searched."""
OF_TRAINING_SPEECH = {"train_file", "train_split_name", "max_train_samples"}
"""Options that change a search by linear probes alone; the others train on that speech for the report."""


def number(text: str) -> float:
    """`27M` as 27 million, `2.5G` as 2.5 thousand million."""
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1.0)
    try:
        return float(text if scale == 1.0 else text[:-1]) * scale
    except ValueError:
        raise ValueError(f"{text!r} is no number: give one such as 500k, 27M or 2.5G") from None


def readable_recordings(
    data_arguments: DataArguments, training: bool, sampling_rate: int, column: str | None = None
) -> tuple[list[np.ndarray], list[Any]]:
    """Waveforms and, of a column, its values. What cannot be read is left out, and counted.

    Raises:
        ValueError: no data, or nothing that can be read.
    """
    speech = load_speech(data_arguments, training, () if column is None else (column,))
    if speech is None:
        raise ValueError("there is no speech to measure on: name it with --validation_file or --eval_split_name")
    waveforms, values, unreadable = [], [], 0
    for row in speech:
        try:
            waveforms.append(load_waveform(row[data_arguments.audio_column_name], sampling_rate))
            values.append(None if column is None else row[column])
        except UNREADABLE:
            unreadable += 1
    if unreadable:
        print(f"{unreadable} of {len(speech)} recordings cannot be read, and are left out")
    if not waveforms:
        raise ValueError("none of the recordings can be read")
    return waveforms, values


def build_fitness(
    arguments: SearchArguments, objective: ObjectiveArguments, data_arguments: DataArguments
) -> tuple[LightHubertPreTrainedModel, Fitness, FurtherTraining | None]:
    """The supernet, how good its subnets are, and what trains them further for the report, if any does.

    Raises:
        ValueError: a model without the head that the fitness needs.
    """
    if arguments.fitness == "distillation":
        return distillation_loss(arguments, objective, data_arguments)
    if arguments.fitness == "ctc":
        return ctc_error(arguments, data_arguments)
    source, size = arguments.model_name_or_path, arguments.per_device_eval_batch_size
    model, extractor = LightHubertModel.from_pretrained(source), AutoFeatureExtractor.from_pretrained(source)
    parts = []
    for training in (True, False):
        waveforms, labels = readable_recordings(
            data_arguments, training, extractor.sampling_rate, arguments.label_column_name
        )
        parts.append((make_batches(waveforms, extractor, size), labels))
    return model, ProbeError(model, *parts), None


def further_training(
    arguments: SearchArguments,
    model: LightHubertPreTrainedModel,
    batches: Sequence[Any],
    loss: Callable[[Any], torch.Tensor],
) -> FurtherTraining:
    return FurtherTraining(
        model, loss, batches, arguments.report_steps, arguments.report_learning_rate, arguments.seed
    )


def ctc_error(
    arguments: SearchArguments, data_arguments: DataArguments
) -> tuple[LightHubertForCTC, CTCError, FurtherTraining | None]:
    """Of a model that was fine-tuned once for all; further training is with CTC."""
    source, size = arguments.model_name_or_path, arguments.per_device_eval_batch_size
    try:
        processor = Wav2Vec2Processor.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{source} is no CTC model with its processor: fine-tune it first ({error})") from error
    model = AutoModelForCTC.from_pretrained(source)
    extractor = processor.feature_extractor

    def transcribed(training: bool) -> tuple[list[np.ndarray], list[Any]]:
        return readable_recordings(data_arguments, training, extractor.sampling_rate, arguments.text_column_name)

    waveforms, references = transcribed(training=False)
    fitness = CTCError(model, processor, make_batches(waveforms, extractor, size), references)
    if not arguments.report:
        return model, fitness, None
    items = [
        {"input_values": waveform, "labels": processor.tokenizer(text).input_ids, "name": ""}
        for waveform, text in zip(*transcribed(training=True), strict=True)
    ]
    random.Random(arguments.seed).shuffle(items)
    collator = CTCCollator(processor)
    batches = [collator(items[start : start + size]) for start in range(0, len(items), size)]

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        return model(batch["input_values"], batch["attention_mask"], labels=batch["labels"]).loss

    return model, fitness, further_training(arguments, model, batches, loss)


def distillation_loss(
    arguments: SearchArguments, objective: ObjectiveArguments, data_arguments: DataArguments
) -> tuple[LightHubertForPreTraining, DistillationLoss, FurtherTraining | None]:
    """As `run_distillation.py` measures it; further training is distillation."""
    teacher, teacher_extractor = build_teacher(
        DistillationArguments(arguments.output_dir, arguments.teacher_name_or_path), objective
    )
    student, report = LightHubertForPreTraining.from_pretrained(arguments.model_name_or_path, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{arguments.model_name_or_path} lacks {missing}: the distillation loss needs a supernet with its"
            " prediction heads, as run_distillation.py leaves it"
        )
    extractor = AutoFeatureExtractor.from_pretrained(arguments.model_name_or_path)
    check_frame_rates(student, teacher, (extractor, teacher_extractor))
    collator = DistillationCollator(extractor, teacher_extractor, student.base_model.samples_per_first_frame)
    accelerator, size = Accelerator(cpu=True), arguments.per_device_eval_batch_size

    def batches(training: bool) -> list[dict[str, torch.Tensor]]:
        waveforms, _ = readable_recordings(data_arguments, training, extractor.sampling_rate)
        recordings = [Recording((0, index), str(index), waveform) for index, waveform in enumerate(waveforms)]
        if training:
            random.Random(arguments.seed).shuffle(recordings)
        made = (collator(recordings[start : start + size]) for start in range(0, len(recordings), size))
        return [batch for batch in made if "visits" in batch]

    fitness = DistillationLoss(student, teacher, batches(training=False), accelerator)
    if not arguments.report:
        return student, fitness, None
    lessons = [
        prepare_lesson(student, teacher, batch, arguments.seed, accelerator)
        for batch in batches(training=True)[: arguments.report_steps]
    ]
    return student, fitness, further_training(arguments, student, lessons, lambda each: each.loss(student, teacher))


def latency_table(arguments: SearchArguments, model: LightHubertPreTrainedModel, folder: Path) -> LatencyTable:
    """`latency.json` in the folder of the search, measured if it is not there yet."""
    file = folder / "latency.json"
    if not file.exists():
        table = LatencyTable.measure(model, arguments.latency_seconds)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_json_file(file)
        print(f"whole models differ by {table.error:.1%} in the median from the latencies in {file}")
    return LatencyTable.from_json_file(file)


def named_subnets(search: Search, model: LightHubertPreTrainedModel) -> dict[str, dict[str, float]]:
    """Error and costs of the subnets that have a name, within the budget or not."""
    rows = {}
    for name, subnet in model.search_space.named.items():
        *_, error = search.fitness.errors(subnet)
        rows[name] = {"error": error} | search.candidates.costs(subnet)
    return rows


def write_results(search: Search, model: LightHubertPreTrainedModel, folder: Path, cost: str) -> dict[str, Any]:
    """`best.json`, `front.json`, `results.json`, `evaluations.csv` and `front.png`."""

    def row_of(evaluation: Evaluation) -> dict[str, Any]:
        return {"error": search.error(evaluation)} | search.candidates.costs(evaluation.subnet)

    best, named = search.best(), named_subnets(search, model)
    best.subnet.to_json_file(folder / "best.json")
    front = [row_of(each) | {"subnet": each.subnet.to_dict()} for each in search.front(cost)]
    (folder / "front.json").write_text(json.dumps(front, indent=2) + "\n")
    results = {
        "fitness": search.fitness.name,
        "num_evaluations": len(search.evaluations),
        "seconds": sum(each.seconds for each in search.evaluations),
        "best": row_of(best) | {"subnet": best.subnet.to_dict()},
        "named": named,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    with (folder / "evaluations.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", *row_of(best), "on_all_data", "seconds", "subnet"])
        for each in search.evaluations:
            complete = len(each.errors) == search.fitness.num_shares
            writer.writerow(
                [each.number, *row_of(each).values(), complete, each.seconds, each.subnet.to_json_string()]
            )
    plot_front(search, named, cost, folder / "front.png")
    return results


def plot_front(search: Search, named: Mapping[str, Mapping[str, float]], cost: str, path: Path) -> None:
    """Error against cost of all that was measured, the front, and the subnets with a name."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5))

    def points(evaluations: Sequence[Evaluation]) -> list[tuple[float, float]]:
        return [(search.candidates.costs(each.subnet)[cost], search.error(each)) for each in evaluations]

    axes.scatter(*zip(*points(search.complete), strict=True), s=8, alpha=0.4, label="measured")
    axes.plot(*zip(*points(search.front(cost)), strict=True), "k.-", label="front")
    for name, row in named.items():
        axes.plot(row[cost], row["error"], "r*")
        axes.annotate(name, (row[cost], row["error"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel=COSTS[cost], ylabel=search.fitness.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    kinds = (SearchArguments, ObjectiveArguments, DataArguments)
    arguments, objective, data_arguments = parsed = parse_recipe(HfArgumentParser(kinds, description=__doc__))
    free = FREE_TO_CHANGE | (set() if arguments.fitness == "probe" else OF_TRAINING_SPEECH)
    settings = {name: value for part in parsed for name, value in asdict(part).items() if name not in free}
    budget, folder = arguments.budget, Path(arguments.output_dir)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    model, fitness, training = build_fitness(arguments, objective, data_arguments)
    if model.search_space is None:
        raise ValueError(f"{arguments.model_name_or_path} is no supernet: there is nothing to choose")
    shipped = model if arguments.fitness == "ctc" else model.base_model  # prediction heads are no part of the model
    latency = latency_table(arguments, shipped, folder) if arguments.needs_latency else None
    candidates = Candidates(model.search_space, SubnetCosts(shipped, latency), budget)
    is_random = arguments.algorithm == "random"
    with closing(Ledger(folder)) as ledger:
        ledger.check_settings(settings)
        search = Search(
            candidates,
            fitness,
            ledger,
            objectives=arguments.objectives if arguments.algorithm == "nsga2" else (),
            population_size=max(2, arguments.num_evaluations) if is_random else arguments.population_size,
            num_evaluations=arguments.num_evaluations,
            successive_halving=arguments.successive_halving,
            seed=arguments.seed,
        )
        search.run()
        results = write_results(search, model, folder, arguments.objectives[0])
        if arguments.report:
            write_report(
                search, model.search_space, folder, arguments.objectives[0], training, arguments.report_subnets
            )
    best = results["best"]
    costs = ", ".join(f"{best[name]:,.0f} {text}" for name, text in COSTS.items() if name in best)
    print(f"{fitness.name} {best['error']:.4f}, {costs}")
    print(f"best.json, front.json, front.png and evaluations.csv are in {folder}")


if __name__ == "__main__":
    main()
