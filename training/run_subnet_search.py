"""Finds the best subnet for a budget, and what each more costs.

    python training/run_subnet_search.py --model_name_or_path supernet --validation_file test.parquet \\
        --teacher_name_or_path facebook/hubert-base-ls960 --max_params 27M --objectives macs --output_dir search
    python training/run_subnet_search.py --model_name_or_path asr-supernet --validation_file test.parquet \\
        --fitness ctc --max_macs 2.5G --algorithm evolution --output_dir search

`best.json` is the best subnet, for `set_subnet` and `--subnet`. `subnets.json` names those that lose least for what
they cost by their size; it is put beside the weights of a supernet in a folder, where `set_subnet("27M")` and
`extract_subnet(max_params=27e6)` find it, and its card shows them. The same command goes on with a search that was
stopped. Started a second time at the same time, it makes the search with two processes.
"""

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from transformers import AutoFeatureExtractor

from lighthubert_training.cards.render import NUM_AVAILABLE, NUM_RECORDINGS
from lighthubert_training.cards.supernet import SUBNETS_PLOT, show_measured_subnets
from lighthubert_training.data.collators import DistillationCollator
from lighthubert_training.data.recordings import Recording
from lighthubert_training.data.sources import DataArguments, count_recordings
from lighthubert_training.distillation.arguments import ObjectiveArguments
from lighthubert_training.distillation.step import PreparedBatch, prepare_batch
from lighthubert_training.distillation.teacher import build_teacher, check_frame_rates, masking_options
from lighthubert_training.runs.distributed import DEVICE_HELP, build_accelerator, choose_device
from lighthubert_training.runs.options import OptionParser, option, parse_options, parse_size
from lighthubert_training.search import building
from lighthubert_training.search.candidates import Budget, Candidates, SubnetCosts
from lighthubert_training.search.fitness import MeanLoss
from lighthubert_training.search.latency import LatencyTable
from lighthubert_training.search.ledger import Ledger
from lighthubert_training.search.report import FEWEST_SUBNETS, FurtherTraining, write_report, write_results
from lighthubert_training.search.search import Search
from modeling_lighthubert import LightHubertForPreTraining, LightHubertPreTrainedModel
from modeling_lighthubert.errors import UserError, run, user_error
from modeling_lighthubert.files import whole_file, write_json
from modeling_lighthubert.loading import load_config, load_processor
from modeling_lighthubert.measured_subnets import COSTS, SUBNETS_FILE, MeasuredSubnets
from modeling_lighthubert.search_space import search_space_from


@dataclass
class SearchArguments:
    """What is searched, by which error and costs, and for how long."""

    model_name_or_path: str = option(help="Supernet to search: distilled, or fine-tuned once for all.")
    output_dir: str = option(help="Folder for the search and its results.")
    fitness: str = option(
        "distillation",
        "Error of a subnet: the distillation loss (needs no labels), the character error rate of a CTC"
        " model, or the error of a linear probe for --label_column_name.",
        choices=("distillation", "ctc", "probe"),
    )
    teacher_name_or_path: str | None = option(
        None, "Teacher that the supernet was distilled from, for the distillation loss."
    )
    text_column_name: str = option("text", "Column with the transcripts, for ctc.")
    label_column_name: str = option("label", "Column with the labels, for probe.")
    algorithm: str = option(
        "nsga2",
        "Search algorithm: nsga2 finds the least error at every cost in --objectives, evolution (the"
        " paper's) the least error; random draws subnets.",
        choices=("nsga2", "evolution", "random"),
    )
    objectives: list[str] = option(["macs"], "Costs that nsga2 minimises beside the error.", choices=tuple(COSTS))
    max_params: str | None = option(None, "Most parameters of the cut model, such as 27M.")
    min_params: str | None = option(None, "Least parameters of the cut model.")
    max_macs: str | None = option(None, "Most MACs per second of audio, such as 2.5G.")
    min_macs: str | None = option(None, "Least MACs per second of audio.")
    max_latency_ms: str | None = option(None, "Most milliseconds for a clip on the device. They are measured first.")
    min_latency_ms: str | None = option(None, "Least milliseconds for a clip on the device.")
    latency_seconds: float = option(5.0, "Length of the clip, in seconds.")
    hubert_exportable: bool = option(False, "Search only subnets that a stock HuBERT can hold exactly.")
    num_evaluations: int = option(1000, "Number of subnets to measure, by all processes.")
    population_size: int = option(50, "Number of subnets in a generation.")
    successive_halving: bool = option(
        False,
        "Successive halving: drop a subnet after a quarter or half of the data if its error is above the"
        " median of those that cost no more.",
    )
    per_device_eval_batch_size: int = option(8, "Number of recordings in a batch.")
    report: bool = option(
        False,
        "Write report.md: which choices matter, which subnets are on the front, and how well their error"
        " predicts that after further training, on the training part of the data (not for probe).",
    )
    report_subnets: int = option(8, f"Number of subnets to train further, at least {FEWEST_SUBNETS}.")
    report_steps: int = option(100, "Steps of further training of each.")
    report_learning_rate: float = option(5e-4, "Peak learning rate of further training.")
    seed: int = option(0, "Random seed.")
    device: str | None = option(None, DEVICE_HELP)

    def __post_init__(self) -> None:
        if self.num_evaluations < 1 or self.population_size < 2:
            raise ValueError(
                f"num_evaluations={self.num_evaluations} has to be at least 1, population_size={self.population_size}"
                " at least 2"
            )
        if self.report and (self.report_subnets < FEWEST_SUBNETS or self.report_steps < 1):
            raise ValueError(
                f"report_subnets={self.report_subnets} has to be at least {FEWEST_SUBNETS}, for a correlation that is"
                f" no chance, and report_steps={self.report_steps} at least 1"
            )
        if self.fitness == "distillation" and self.teacher_name_or_path is None:
            raise ValueError("the distillation loss needs --teacher_name_or_path; ctc and probe do without")

    @property
    def budget(self) -> Budget:
        """
        Raises:
            UserError: a limit is no number.
        """
        limits = {}
        for name in COSTS:
            least, most = (getattr(self, f"{end}_{name}") for end in ("min", "max"))
            if least is not None or most is not None:
                limits[name] = (parse_size(least or "0"), parse_size(most or "inf"))
        return Budget(limits, self.hubert_exportable)

    @property
    def dtype(self) -> str:
        """Of the supernet: that of the checkpoint, or, where subnets are trained further, fp32."""
        return "float32" if self.report else "auto"

    @property
    def needs_latency(self) -> bool:
        return "latency_ms" in {*self.objectives, *self.budget.limits}


FREE_TO_CHANGE = {"output_dir", "num_evaluations", "device", "preprocessing_num_workers", "max_unreadable_share"}
"""Options that do not change what is searched, so that a search may go on with other values."""
REPORT_OPTIONS = {"report", "report_subnets", "report_steps", "report_learning_rate"}
"""Options of the report, which are free to change, too."""
TRAINING_SPEECH = {"train_file", "train_split_name", "max_train_samples"}
"""Options that change only a search by linear probes; the others use that speech for the report."""


def build_fitness(
    arguments: SearchArguments, objective: ObjectiveArguments, data: DataArguments
) -> tuple[Any, Sequence[Any]]:
    """The fitness with its model, and the batches that its subnets are trained further on for the report, if any.

    Raises:
        UserError: the model is no supernet, or lacks what the fitness needs; or there is no speech.
    """
    name, size, device = arguments.model_name_or_path, arguments.per_device_eval_batch_size, arguments.device
    if arguments.fitness == "distillation":
        return build_distillation_loss(arguments, objective, data)
    if arguments.fitness == "probe":
        return building.build_probe_error(name, choose_device(device), data, arguments.label_column_name, size), ()
    column = arguments.text_column_name
    fitness = building.build_ctc_error(name, choose_device(device), data, column, size, arguments.dtype)
    if not arguments.report:
        return fitness, ()
    return fitness, building.ctc_training_batches(fitness, data, column, size, arguments.report_steps, arguments.seed)


def build_distillation_loss(
    arguments: SearchArguments, objective: ObjectiveArguments, data: DataArguments
) -> tuple[MeanLoss, Sequence[PreparedBatch]]:
    """The loss of `run_distillation.py`, on held-out speech and for further training."""
    name, size, device = arguments.model_name_or_path, arguments.per_device_eval_batch_size, arguments.device
    accelerator = build_accelerator(choose_device(device))
    teacher, teacher_extractor = build_teacher(arguments.teacher_name_or_path, objective=objective)
    teacher.to(accelerator.device)
    spec_augment = masking_options(load_config(name))
    student = building.load_supernet(
        name, LightHubertForPreTraining, str(accelerator.device), arguments.dtype, **spec_augment
    )
    student.freeze_feature_encoder()
    extractor = load_processor(name, AutoFeatureExtractor)
    check_frame_rates(student, teacher, (extractor, teacher_extractor))
    masking = {"mask_time_prob": objective.mask_time_prob, "mask_time_length": objective.mask_time_length}

    def batches(training: bool, seed: int, num_batches: int | None = None) -> Sequence[PreparedBatch]:
        collate = DistillationCollator(extractor, teacher_extractor, student.config, **masking, seed=seed)
        recordings = building.read_batches(data, training, extractor.sampling_rate, size, None, num_batches, seed)

        @torch.no_grad()
        def prepare(batch: list[Recording]) -> PreparedBatch:
            return prepare_batch(student, teacher, building.to_model(collate(batch), student), accelerator)

        return building.LazyBatches(recordings, prepare)

    def loss(batch: PreparedBatch) -> torch.Tensor:
        return batch.loss(student, teacher)

    fitness = MeanLoss("distillation loss", student, list(batches(training=False, seed=0)), loss)
    return fitness, batches(True, arguments.seed, arguments.report_steps) if arguments.report else ()


def find_latency_table(arguments: SearchArguments, model: LightHubertPreTrainedModel) -> LatencyTable:
    """The table in `latency.json` of the output folder, which is measured if it is not there yet.

    Raises:
        UserError: it was measured on another device.
    """
    file = Path(arguments.output_dir) / "latency.json"
    if not file.exists():
        table = LatencyTable.measure(model, arguments.latency_seconds)
        table.to_json_file(file)
        print(f"whole models differ by {table.error:.1%} in the median from the latencies in {file}")
    table = LatencyTable.from_json_file(file)
    if table.device != model.device.type:
        raise UserError(
            f"{file} was measured on {table.device}, not {model.device.type}: choose that --device, or delete the file"
        )
    return table


def put_beside_weights(folder: Path, supernet: Path) -> None:
    """Puts what a search has found into the folder of its supernet: `subnets.json`, and a table and a plot in its
    card.

    Raises:
        UserError: the folder cannot be written to.
    """
    with user_error(f"{supernet} keeps its earlier {SUBNETS_FILE}, if any: "):
        space = search_space_from(load_config(supernet).search_space)
        measured = MeasuredSubnets.from_json_file(folder / SUBNETS_FILE, space)
        write_json(supernet / SUBNETS_FILE, measured.to_dict())
        with whole_file(supernet / SUBNETS_PLOT) as unfinished:
            shutil.copyfile(folder / "front.png", unfinished)
        show_measured_subnets(measured, supernet)


def main() -> None:
    kinds = (SearchArguments, ObjectiveArguments, DataArguments)
    parser = OptionParser(kinds, description=__doc__)
    arguments, objective, data = parsed = parse_options(parser)
    free = FREE_TO_CHANGE | REPORT_OPTIONS | (set() if arguments.fitness == "probe" else TRAINING_SPEECH)
    settings = {name: value for part in parsed for name, value in asdict(part).items() if name not in free}
    budget, folder, cost = arguments.budget, Path(arguments.output_dir), arguments.objectives[0]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    fitness, batches = build_fitness(arguments, objective, data)
    model = fitness.model
    shipped = model if arguments.fitness == "ctc" else model.base_model  # prediction heads are no part of the model
    latency = find_latency_table(arguments, shipped) if arguments.needs_latency else None
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
        counts = {NUM_RECORDINGS: fitness.num_recordings, NUM_AVAILABLE: count_recordings(data)}
        best = write_results(search, folder, cost, counts)["best"]
        if arguments.report:
            schedule = (arguments.report_steps, arguments.report_learning_rate, arguments.seed)
            training = FurtherTraining(model, fitness.loss, batches, *schedule) if batches else None
            write_report(search, folder, cost, training, arguments.report_subnets)
    costs = ", ".join(f"{best[name]:,.0f} {text}" for name, text in COSTS.items() if name in best)
    print(f"{fitness.name} {best['error']:.4f}, {costs}")
    print(f"best.json, {SUBNETS_FILE}, front.png and evaluations.csv are in {folder}")
    if (supernet := Path(arguments.model_name_or_path)).is_dir():
        put_beside_weights(folder, supernet)
        print(f"{SUBNETS_FILE} is in {supernet}, too")
    else:
        print(f"upload {folder / SUBNETS_FILE} to {supernet}: its subnets can be asked for by name then")


if __name__ == "__main__":
    run(main)
