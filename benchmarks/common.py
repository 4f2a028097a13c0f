"""One bench for all tables of learning: a teacher, every untrained and trained control of its subnets, and what all of
them are measured by.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
import yaml
from filelock import FileLock
from measures import TEXT, MeasureArguments, Measures
from processes import ROOT, run_script
from recordings import distillation_files, write_superb_data
from torch import nn
from transformers import set_seed

from lighthubert_training.data.strings import read_parquet
from lighthubert_training.distillation.arguments import ObjectiveArguments
from lighthubert_training.distillation.teacher import build_teacher
from lighthubert_training.runs.options import option
from modeling_lighthubert import LightHubertModel, Subnet
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import whole_files, write_text
from modeling_lighthubert.loading import load_config, load_model, parse_search_space
from modeling_lighthubert.profiling import macs_per_second


FOLDER = ROOT / "benchmarks"
RECIPE = yaml.safe_load((FOLDER / "teacher/distillation.yaml").read_text(encoding="utf-8"))
SUBNETS = ("largest", "middle", "smallest")
RANDOM, ENCODER = "random weights", "teacher's feature encoder, random transformer"
SLICE, ORDERED = "slice of the teacher", "slice of the teacher, in order"
ALONE, DISTILHUBERT, STAR = "distilled alone", "DistilHuBERT's way", "STaRHuBERT's way"
UNTRAINED, TRAINED_ALONE = (RANDOM, ENCODER, SLICE, ORDERED), (ALONE, DISTILHUBERT, STAR)


@dataclass(kw_only=True)
class BenchArguments(MeasureArguments):
    """What is distilled, for how long, and what becomes of it."""

    teacher_name_or_path: str = option(str(FOLDER / "teacher"), "HuBERT to distil.")
    search_space: str = option(str(FOLDER / "teacher/search_space.json"), "JSON file: the subnets to train.")
    output_dir: str = option(str(FOLDER / "output"), "Folder for runs.")
    results_file: str | None = option(None, "JSON file of results. Default: that of the benchmark in results/.")
    passes: int = option(1200, "Passes of a subnet that each distillation has.")
    seeds: list[int] = option([0, 1, 2], "One run of each kind for each.")
    only: list[str] | None = option(None, "Runs to make, by name. Default: all.")
    num_processes: int = option(2, "Runs that are made at a time.")
    num_workers: int = option(0, "Processes that decode audio for each distillation.")


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
            options = {"model_name_or_path": folder, "data_dir": data, "tasks": tasks, "seeds": seed}
            options["device"] = self.arguments.device
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
        if kind in (SLICE, ORDERED):
            return (self.ordered if kind == ORDERED else self.untrained).extract_subnet(subnet)
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
        weights = self.ordered.extract_subnet(full).state_dict()
        model.load_state_dict(
            {name: weights[name][tuple(map(slice, weight.shape))] for name, weight in model.state_dict().items()}
        )
        return model.eval()

    def distil(self, seed: int, **changes: Any) -> Path:
        """Distils by the recipe with `changes`, from the ordered teacher unless they say otherwise. What was distilled
        before is kept, by its options and the teacher's weights, so that benchmarks share it; a run that was killed
        goes on.

        Returns:
            The folder of the student.
        """
        options = self.recipe | {"teacher_name_or_path": self.arguments.teacher_name_or_path}
        options |= {"search_space": self.arguments.search_space, "max_steps": self.arguments.passes}
        if "student_name_or_path" not in changes:
            changes["student_name_or_path"] = self.order(self.arguments.search_space)
        options |= {"train_file": self.train_files, "seed": seed} | changes
        space = options["search_space"] and Path(options["search_space"]).read_text(encoding="utf-8")
        described = [weights_digest(self.untrained), *sorted((options | {"search_space": space}).items(), key=str)]
        digest = hashlib.sha256(repr(described).encode()).hexdigest()[:12]
        folder, options["teacher_cache_dir"] = self.output / "distilled" / digest, self.output / "teacher"
        options |= {"device": self.arguments.device, "dataloader_num_workers": self.arguments.num_workers}
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "model.safetensors").exists():
                run_script(
                    "training/run_distillation.py", output_dir=folder, resume_from_checkpoint="latest", **options
                )
        return folder

    def distil_alone(self, kind: str, subnet: Subnet, seed: int, **changes: Any) -> LightHubertModel:
        """One model of the cost of `subnet`, distilled by itself: one of `TRAINED_ALONE`."""
        model = self.first_layers(subnet) if kind == DISTILHUBERT else self.control(ORDERED, subnet, seed)
        depth, options = self.space.largest.num_hidden_layers, {}
        if kind == DISTILHUBERT:  # layers 4, 8 and 12 of 12, L1 and cosine, no masks
            layers = [round(depth * layer / 12) for layer in (4, 8, 12)]
            options = {"target": "hidden_states", "target_layers": layers, "target_norm": "none", "cosine_weight": 1.0}
            options |= {"mask_time_prob": 0.0, "loss_frames": "all"}
        elif kind == STAR:  # relations between the frames of every layer, no masks
            options = {"temporal_relation_weight": 1.0, "prediction_weight": 0.0}
            options |= {"mask_time_prob": 0.0, "loss_frames": "all"}
        options |= {"search_space": None, "sampling": "largest"}
        start = {"student_name_or_path": self.save(model)}
        return load_model(self.distil(seed, **start | options | changes), head=LightHubertModel)

    @cached_property
    def text_files(self) -> dict[str, list[Path]]:
        """Parquet files with `text` and `language`, by part."""
        found: dict[str, list[Path]] = {"train": [], "test": []}
        for (_, part), file in self.arguments.files.items():
            if {"text", "language"} <= set(read_parquet(file, ["audio"]).column_names):
                found[part].append(file)
        if not all(found.values()):
            raise UserError(f"--speech_dir {self.arguments.speech_dir} has no files with text and language")
        return found

    def fine_tune(
        self, model: Path, folder: Path, seed: int, files: Mapping[str, Sequence[Path]], **options: Any
    ) -> None:
        """Fine-tunes with CTC into `folder`; a run that was killed goes on.

        Args:
            files: Parquet files with `text` for the parts `train` and `test`.
        """
        shared = {"config": "ctc_small_budget", "text_case": TEXT.text_case, "chars_to_ignore": TEXT.chars_to_ignore}
        shared |= {"train_file": files["train"], "validation_file": files["test"], "max_eval_samples": 10}
        shared |= {"per_device_train_batch_size": 8, "learning_rate": self.arguments.ctc_learning_rate}
        shared |= {"model_name_or_path": model, "output_dir": folder, "seed": seed, "resume_from_checkpoint": "latest"}
        run_script("training/run_speech_recognition_ctc.py", **shared | options)

    @cached_property
    def ordered(self) -> LightHubertModel:
        """The teacher as a supernet with its channels, heads and FFN units in the order of their importance."""
        return load_model(self.order(self.arguments.search_space), head=LightHubertModel, dtype=torch.float32)

    def order(self, search_space: str | Path) -> Path:
        """The folder of the ordered teacher for a search space, a file. It is made once: delete it after a change of
        how channels are put in order."""
        described = weights_digest(self.untrained) + Path(search_space).read_text(encoding="utf-8")
        folder = self.output / "ordered" / hashlib.sha256(described.encode()).hexdigest()[:12]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                options = {"model_name_or_path": self.arguments.teacher_name_or_path, "search_space": search_space}
                options |= {"train_file": self.train_files, "device": self.arguments.device}
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
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def names(cls, arguments: BenchArguments) -> list[str]:
        """Names of the runs, in the order in which they are made."""

    @classmethod
    def cost(cls, name: str, arguments: BenchArguments) -> tuple[int, int]:
        """Passes of a subnet that a run trains, and models that it measures, about: its time is told beforehand by
        them."""
        return arguments.passes, len(SUBNETS)

    @abstractmethod
    def run(self, name: str, seed: int) -> dict[str, dict[str, Any]]:
        """Makes a run, and measures what comes out of it, by name."""


def weights_digest(model: nn.Module) -> str:
    """Twelve hexadecimal digits that stand for the weights of a model, compared in float32."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
