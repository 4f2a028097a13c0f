"""The paper's size on the device at hand: steps of a published recipe, plain and compiled; inference; and a search.

    python benchmarks/paper_size.py
    python benchmarks/paper_size.py --device cpu --batch_seconds 17.5 --batch_sizes 1

Teacher and student have the shapes of the recipe and random weights, and audio is noise: neither changes the cost.
What is compared takes turns within each repeat, and a large matrix product in the precision of the rows is among it;
times are medians. FLOP are counted as `lighthubert distill --estimate` does, and a share is that of the rate of the
product. Compiled are the encoder layers, each on its own, as `--torch_compile` does. Memory is what
torch's allocator counts at most, beside what the estimate tells. Waits are the times that a GPU is waited for. A
search measures the recipe's loss of random subnets, in fp32, in stages, on a quarter, half and all of the audio.
"""

import random
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from processes import device_name, in_process_of_its_own, peak_memory, synchronizer
from recordings import noise, to_distil
from shapes import REFERENCE, build, gigamacs
from transformers import HubertConfig, HubertModel
from transformers.utils import logging

from lighthubert_training.data.sources import DataArguments
from lighthubert_training.distillation.arguments import DistillationArguments, ObjectiveArguments
from lighthubert_training.distillation.building import build_config, build_optimizer
from lighthubert_training.distillation.estimate import PEAK_FLOPS, batch_shape, estimate, student_flops
from lighthubert_training.distillation.loop import compile_layers, compiling
from lighthubert_training.distillation.step import prepare_batch, training_step
from lighthubert_training.distillation.teacher import Teacher
from lighthubert_training.runs.distributed import DEVICE_HELP, build_accelerator, choose_device
from lighthubert_training.runs.options import OptionParser, option, parse_options
from lighthubert_training.runs.tables import markdown_table
from lighthubert_training.sampling import draw_subnets
from lighthubert_training.search.fitness import MeanLoss
from modeling_lighthubert import LightHubertForPreTraining, Subnet
from modeling_lighthubert.errors import run
from modeling_lighthubert.files import write_json
from modeling_lighthubert.loading import parse_device
from modeling_lighthubert.profiling import median_ratio, time_in_turns


MODELS = (REFERENCE, "a_small", "a_small, half the channels", "smallest of tiny_to_base")
PARTS = ("training", "inference", "search")
NUM_EVALUATIONS = 200
PRECISIONS, FLOATS = ("no", "fp16", "bf16"), ("float32", "float16", "bfloat16")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMPILED = ", compiled"
PRODUCT = {"cuda": 8192, "cpu": 2048}
"""Rows and columns of the matrices whose product gives the rate of a device."""


@dataclass
class PaperSizeArguments:
    """What is measured."""

    recipe: str = option("stage2_small", "Recipe of distillation.", choices=("stage1", "stage2_base", "stage2_small"))
    device: str | None = option(None, DEVICE_HELP)
    batch_seconds: float | None = option(None, "Seconds of a batch of training. Default: those of the recipe.")
    mixed_precision: str | None = option(None, "Precision of the student. Default: the recipe's.", choices=PRECISIONS)
    teacher_dtype: str | None = option(None, "Precision of the teacher. Default: that of the recipe.", choices=FLOATS)
    torch_compile: bool = option(True, "Measure compiled layers, too: some ten seconds for each size of a layer.")
    batch_sizes: list[int] = option([1, 8, 64], "Numbers of clips in a batch of inference.")
    clip_seconds: float = option(10.0, "Seconds of a clip of inference.")
    dtypes: list[str] = option(["float32", "bfloat16"], "Precisions of inference.", choices=FLOATS)
    search_minutes: float = option(10.0, "Minutes of audio that a search measures subnets on.")
    repeats: int = option(10, "Timed rounds.")
    parts: list[str] = option(list(PARTS), "What to measure.", choices=PARTS)
    results_file: str | None = option(None, "JSON file to write all figures to.")


def read_recipe(options: PaperSizeArguments) -> tuple[DistillationArguments, ObjectiveArguments]:
    """The recipe with the changes that were asked for, from the teacher's weights."""
    parser = OptionParser((DistillationArguments, ObjectiveArguments, DataArguments))
    words = ["--config", options.recipe, "--output_dir", "none", "--student_name_or_path", "random"]
    arguments, objective, _ = parse_options(parser, "distillation", words)
    changes = {
        "per_device_train_batch_seconds": options.batch_seconds,
        "mixed_precision": options.mixed_precision,
        "teacher_dtype": options.teacher_dtype,
    }
    return replace(arguments, **{name: value for name, value in changes.items() if value is not None}), objective


def multiply(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A matrix product, and its FLOP."""
    size = PRODUCT[device.type]
    one, other = torch.randn(2, size, size, device=device, dtype=dtype)
    return partial(torch.mm, one, other), 2 * size**3


def count_waits(step: Callable[[], object], device: torch.device) -> int | None:
    """How often `step` waits for the GPU; `None` on another device, which is never waited for."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


class Training:
    """A student and a teacher of the size of HuBERT Base, and a batch of a recipe.

    Attributes:
        told: what `--estimate` says of the recipe.
        drawn: steps for which subnets were drawn.
    """

    def __init__(self, arguments: DistillationArguments, objective: ObjectiveArguments, accelerator: Accelerator):
        self.arguments, self.accelerator, self.device = arguments, accelerator, accelerator.device
        teacher_config = HubertConfig(layerdrop=0.0)
        with tempfile.TemporaryDirectory() as folder:
            teacher_config.save_pretrained(folder)
            named = replace(arguments, teacher_name_or_path=folder, student_name_or_path="random")
            config = build_config(named, objective, teacher_config)
        on_gpu = self.device.type == "cuda"
        self.told = in_process_of_its_own(estimate, config, teacher_config, arguments, objective, on_gpu)
        torch.manual_seed(0)
        dtype = torch.float32 if arguments.teacher_dtype == "auto" else getattr(torch, arguments.teacher_dtype)
        self.teacher = Teacher(HubertModel(teacher_config).to(self.device, dtype), objective)
        student = LightHubertForPreTraining(config).trim().train()
        self.student = accelerator.prepare_model(student, evaluation_mode=True)
        self.optimizer = build_optimizer(arguments, self.student)
        size, seconds = batch_shape(arguments)
        audio = torch.from_numpy(noise(size, seconds))
        batch = {"input_values": audio, "attention_mask": torch.ones(audio.shape, dtype=torch.long)}
        self.batch = send_to_device(to_distil([batch], config, objective)[0], self.device)
        self.drawn = 0

    def step(self, subnet: Subnet | None = None) -> None:
        """A step of the training script, by default of the next subnets that the recipe draws."""
        arguments, subnets = self.arguments, [subnet]
        if subnet is None:
            subnets = self.draw(self.drawn)
            self.drawn += 1
        share = arguments.share_feature_encoder
        training_step(self.student, self.teacher, [self.batch], subnets, self.accelerator, share)
        self.accelerator.clip_grad_norm_(self.student.parameters(), arguments.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def draw(self, step: int) -> list[Subnet | None]:
        """Subnets that the recipe draws for a step."""
        arguments, space = self.arguments, self.student.search_space
        return draw_subnets(space, arguments.sampling, arguments.seed, step, arguments.num_random_subnets)

    def flops(self, subnets: list[Subnet | None]) -> float:
        """Of a step of `subnets`, with the teacher."""
        size, seconds = batch_shape(self.arguments)
        students = sum(student_flops(self.student, subnet, seconds, self.arguments) for subnet in subnets)
        return self.told.teacher_flops + size * students

    def memory(self, subnet: Subnet | None) -> int:
        """Bytes of all tensors at the peak of a step."""
        self.step(subnet)  # after which the moments of the optimiser are there
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.student.parameters(), *self.teacher.parameters(), *states, *self.batch.values()]
        held = sum(each.numel() * each.element_size() for each in tensors if isinstance(each, torch.Tensor))
        return held + peak_memory(partial(self.step, subnet), self.device)


def measure_training(options: PaperSizeArguments) -> dict[str, Any]:
    """Figures of a recipe: what is told, and of each row, plain and compiled, seconds and FLOP of every step."""
    arguments, objective = read_recipe(options)
    accelerator = build_accelerator(options.device, mixed_precision=arguments.mixed_precision)
    device, plain = accelerator.device, Training(arguments, objective, accelerator)
    space = plain.student.search_space
    named = {name: space.named[name] for name in ("largest", "a_base", "a_small", "smallest") if name in space.named}
    found = {"memory": plain.memory(space.largest), "waits": count_waits(plain.step, device)}
    runs: dict[str, Callable[[], object]] = {"as drawn": plain.step}
    runs |= {name: partial(plain.step, subnet) for name, subnet in named.items()}
    runs["product"], product_flops = multiply(device, DTYPES[arguments.mixed_precision])
    start = plain.drawn + 1  # the first round is not timed
    drawn = [plain.flops(plain.draw(step)) for step in range(start, start + options.repeats)]
    flops = {"as drawn": drawn} | {name: [plain.flops([subnet])] * options.repeats for name, subnet in named.items()}
    if options.torch_compile:
        compiled = Training(arguments, objective, accelerator)
        compile_layers(compiled.student, compiled.teacher)
        with compiling(space):
            begin = time.perf_counter()
            for name, subnet in named.items():
                compiled.step(subnet)
                runs[f"{name}{COMPILED}"] = partial(compiled.step, subnet)
                flops[f"{name}{COMPILED}"] = flops[name]
            found["seconds_to_compile"] = time.perf_counter() - begin
            times = time_in_turns(runs, options.repeats, synchronize=synchronizer(device))
        found["memory_compiled"] = compiled.memory(space.largest)
    else:
        times = time_in_turns(runs, options.repeats, synchronize=synchronizer(device))
    size, seconds = batch_shape(arguments)
    batch = {"batch_size": size, "clip_seconds": seconds, "precision": arguments.mixed_precision}
    return (
        found
        | batch
        | {
            "product_flops": product_flops,
            "told": asdict(plain.told),
            "times": times,
            "flops": flops,
        }
    )


def measure_inference(options: PaperSizeArguments, device: torch.device, dtype: str) -> dict[str, Any]:
    """Figures of the models in a precision: of each batch size, seconds of every batch, and bytes at the peak."""
    synchronize, (product, product_flops) = synchronizer(device), multiply(device, getattr(torch, dtype))
    models = {name: build(name).to(device, getattr(torch, dtype)) for name in MODELS}
    if options.torch_compile:
        for name in MODELS:
            models[f"{name}{COMPILED}"] = model = build(name).to(device, getattr(torch, dtype))
            for layer in model.encoder.layers:
                layer.compile(dynamic=True)
    found: dict[str, Any] = {"dtype": dtype, "clip_seconds": options.clip_seconds, "product_flops": product_flops}
    found |= {"times": {}, "memory": {}}
    found["gigamacs"] = {name: gigamacs(name, options.clip_seconds) for name in MODELS}
    for size in options.batch_sizes:
        audio = torch.from_numpy(noise(size, options.clip_seconds)).to(device, getattr(torch, dtype))
        with torch.inference_mode():
            runs: dict[str, Callable[[], object]] = {name: partial(model, audio) for name, model in models.items()}
            found["memory"][size] = {
                name: peak_memory(run, device) + sum(weight.nbytes for weight in models[name].parameters())
                for name, run in runs.items()
            }
            times = time_in_turns(runs | {"product": product}, options.repeats, 2, synchronize)
        found["times"][size] = times
    return found


def measure_search(options: PaperSizeArguments) -> dict[str, Any]:
    """Figures of evaluations of random subnets: seconds of the first stage and of all, and waits."""
    arguments, objective = read_recipe(
        replace(options, batch_seconds=80.0, mixed_precision="no", teacher_dtype="float32")
    )
    training = Training(arguments, objective, build_accelerator(options.device))
    student, teacher, device = training.student, training.teacher, training.device
    student.freeze_feature_encoder()
    count = max(1, round(60 * options.search_minutes / 80.0))
    with torch.no_grad():
        prepared = [prepare_batch(student, teacher, training.batch, training.accelerator) for _ in range(count)]
    fitness = MeanLoss("loss", student, prepared, lambda batch: batch.loss(student, teacher))
    rng, space = random.Random(0), student.search_space
    drawn = iter([space.sample(rng) for _ in range(options.repeats + 2)])
    waits = count_waits(lambda: list(fitness.errors(next(drawn))), device)
    firsts, wholes = [], []
    next(drawn)
    for subnet in drawn:
        begin, errors = time.perf_counter(), fitness.errors(subnet)
        next(errors)
        firsts.append(time.perf_counter() - begin)
        list(errors)
        wholes.append(time.perf_counter() - begin)
    return {"waits": waits, "num_batches": count, "first_stage": firsts, "all_stages": wholes}


def search_report(found: dict[str, Any], minutes: float) -> str:
    """What an evaluation takes, and the hours of a search whose subnets all end at the first stage, or none."""
    first, whole = median(found["first_stage"]), median(found["all_stages"])
    hours = [f"{NUM_EVALUATIONS * each / 3600:.2g}" for each in (first, whole)]
    waits = "" if found["waits"] is None else f" {found['waits']} waits for the GPU, {found['num_batches']} batches."
    return (
        f"An evaluation on {minutes:g} min of audio: {first:.3g} s for the first stage, {whole:.3g} s for all; between"
        f" {hours[0]} and {hours[1]} hours for {NUM_EVALUATIONS}.{waits}"
    )


def training_table(found: dict[str, Any]) -> str:
    """Markdown: a line for each row of `measure_training`."""
    seconds, told, times = found["batch_size"] * found["clip_seconds"], found["told"], found["times"]
    rate = found["product_flops"] / median(times["product"])
    lines = []
    for name, flops in found["flops"].items():
        achieved = median(each / of_step for each, of_step in zip(flops, times[name], strict=True))
        speed_up = median_ratio(times[name.removesuffix(COMPILED)], times[name])
        cells = [f"{1e3 * median(times[name]):.0f}", f"{seconds / median(times[name]):.0f}", f"{achieved / 1e12:.3g}"]
        lines.append([name, *cells, f"{achieved / rate:.0%}", f"{achieved / PEAK_FLOPS:.0%}", f"{speed_up:.2f}"])
    header = ["subnet of the step", "ms", "s of audio a second", "TFLOP/s", "of the product"]
    header += [f"of {PEAK_FLOPS / 1e12:g} TFLOP/s", "times as fast as plain"]
    precision = found["precision"].replace("no", "fp32")
    notes = [
        f"A batch is {found['batch_size']} x {found['clip_seconds']:g} s, the student in {precision}.",
        f"The product of two matrices ran at {rate / 1e12:.3g} TFLOP/s.",
        f"Memory of a step of the largest: {found['memory'] / 1e9:.2f} GB, {told['peak'] / 1e9:.2f} GB are told.",
    ]
    if "seconds_to_compile" in found:
        notes.append(f"Compiled, it is {found['memory_compiled'] / 1e9:.2f} GB.")
        notes.append(f"Compiling took {found['seconds_to_compile']:.0f} s.")
    if found["waits"] is not None:
        notes.append(f"A step waits {found['waits']} times for the GPU.")
    return "\n".join([markdown_table(header, lines), "", *notes])


def inference_table(found: dict[str, Any]) -> str:
    """Markdown: a line for each model and batch size of `measure_inference`."""
    seconds, lines = found["clip_seconds"], []
    for size, times in found["times"].items():
        rate = found["product_flops"] / median(times["product"])
        for name, memory in found["memory"][size].items():
            flops = 2e9 * found["gigamacs"][name.removesuffix(COMPILED)] * seconds * int(size)
            cells = [f"{int(size) * seconds / median(times[name]):.0f}", f"{flops / median(times[name]) / rate:.0%}"]
            cells += [f"{median_ratio(times[REFERENCE], times[name]):.2f}", f"{memory / 1e9:.2f}"]
            lines.append([name, str(size), f"{1e3 * median(times[name]):.1f}", *cells])
    header = [found["dtype"], "batch", "ms", "s of audio a second", "of the product", f"times {REFERENCE}", "GB"]
    return markdown_table(header, lines)


def main() -> None:
    parser = OptionParser(PaperSizeArguments, description=__doc__)
    (options,) = parse_options(parser)
    logging.set_verbosity_error()
    device = parse_device(choose_device(options.device))
    print(f"{device_name(device)}, torch {torch.__version__}", flush=True)
    found: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__}
    parts: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "training": (measure_training, (options,)),
        "search": (measure_search, (options,)),
        **{dtype: (measure_inference, (options, device, dtype)) for dtype in options.dtypes},
    }
    for name, (measure, arguments) in parts.items():
        if (name if name in PARTS else "inference") not in options.parts:
            continue
        found[name] = in_process_of_its_own(measure, *arguments)
        if name == "training":
            print(f"\n{options.recipe}:\n\n{training_table(found[name])}", flush=True)
        elif name == "search":
            print(f"\n{search_report(found[name], options.search_minutes)}", flush=True)
        else:
            print(f"\nInference, clips of {options.clip_seconds:g} s:\n\n{inference_table(found[name])}", flush=True)
    if options.results_file is not None:
        write_json(Path(options.results_file), found)


if __name__ == "__main__":
    run(main)
