"""How long each part of a subnet takes on this machine: measured once, added up for any subnet."""

import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle, product
from pathlib import Path
from typing import Self

import torch
from torch import nn
from tqdm.auto import tqdm

from modeling_lighthubert import LightHubertPreTrainedModel, SearchSpace, Subnet
from modeling_lighthubert.profiling import SAMPLING_RATE, measure_latency
from modeling_lighthubert.search_space import nondecreasing_choices


def parts_of(subnet: Subnet) -> list[str]:
    """Names of the parts of which equal ones take equal time: convolutions, layers, and what is left of the model."""
    ear = subnet.conv_dim or ()
    parts = [f"convolution {layer}, {pair[0]} to {pair[1]}" for layer, pair in enumerate(zip((1, *ear), ear))]
    if not ear:
        parts.append("convolutions")
    parts.append(f"rest, {ear[-1] if ear else 'all'} to {subnet.hidden_size}")
    windows = subnet.attention_window or (None,) * subnet.num_hidden_layers
    layers = zip(subnet.num_attention_heads, subnet.intermediate_size, windows, strict=True)
    for heads, units, window in layers:
        parts.append(f"layer, {subnet.hidden_size} wide, {heads} heads, {units} units, window {window or 'all'}")
    return parts


@contextmanager
def stopwatches(modules: dict[str, list[nn.Module]]) -> Iterator[dict[str, float]]:
    """Inside the block, seconds that the modules of each name took, all together."""
    seconds: dict[str, float] = defaultdict(float)
    started: dict[nn.Module, float] = {}

    def start(module: nn.Module, inputs: tuple) -> None:
        started[module] = time.perf_counter()

    with ExitStack() as handles:
        for name, watched in modules.items():

            def stop(module: nn.Module, inputs: tuple, output: object, name: str = name) -> None:
                seconds[name] += time.perf_counter() - started[module]

            for module in watched:
                handles.callback(module.register_forward_pre_hook(start).remove)
                handles.callback(module.register_forward_hook(stop).remove)
        yield seconds


@torch.inference_mode()
def time_parts(model: LightHubertPreTrainedModel, seconds: float, repeats: int) -> dict[str, float]:
    """Milliseconds of each part of a cut model, for one clip: medians; of parts that have one name, their mean."""
    base, parts = model.base_model, parts_of(model.subnet)
    num_layers, encoder = model.subnet.num_hidden_layers, base.feature_extractor
    *convolutions, rest = parts[:-num_layers]
    layers = parts[-num_layers:]
    watched = list(encoder.conv_layers) if model.subnet.conv_dim else [encoder]
    modules: dict[str, list[nn.Module]] = defaultdict(list)
    for name, module in zip([*convolutions, *layers], [*watched, *base.encoder.layers], strict=True):
        modules[name].append(module)
    audio, runs = torch.randn(1, int(seconds * SAMPLING_RATE)), []
    for _ in range(repeats + 1):
        with stopwatches(modules) as times:
            start = time.perf_counter()
            model(audio)
            total = time.perf_counter() - start
        run = {name: taken / len(modules[name]) for name, taken in times.items()}
        runs.append(run | {rest: total - sum(times.values())})
    return {name: 1e3 * statistics.median(run[name] for run in runs[1:]) for name in runs[0]}


def covering(space: SearchSpace) -> list[Subnet]:
    """Subnets with layers all alike, which together have every part that a subnet can have."""
    ears = [None] if space.conv_dim is None else list(nondecreasing_choices(space.conv_dim))
    depth, windows = space.num_hidden_layers[0], space.attention_window or (None,)
    shapes = [
        Subnet(width, (heads,) * depth, (int(width * ratio),) * depth, space.head_dim, ears[0], (window,) * depth)
        for width, heads, ratio, window in product(
            space.hidden_size, space.num_attention_heads, space.ffn_ratio, windows
        )
    ]
    missing = {part for shape in shapes for ear in ears for part in parts_of(replace(shape, conv_dim=ear))}
    chosen = []
    for shape in cycle(shapes):
        if not missing:
            break
        best = max(
            (replace(shape, conv_dim=ear) for ear in ears), key=lambda each: len(missing.intersection(parts_of(each)))
        )
        if missing.intersection(parts_of(best)):
            chosen.append(best)
            missing.difference_update(parts_of(best))
    return chosen


@dataclass
class LatencyTable:
    """Milliseconds that any subnet takes for one clip, by those of its parts.

    Attributes:
        seconds: of the clip.
        num_threads: that torch had.
        milliseconds: of each part.
        error: how far whole models are from it, in the median, as a share of their latency.
    """

    seconds: float
    num_threads: int
    milliseconds: dict[str, float]
    error: float = 0.0

    @classmethod
    def measure(
        cls, model: LightHubertPreTrainedModel, seconds: float = 5.0, repeats: int = 7, num_checks: int = 10
    ) -> Self:
        """Runs cut models that have all the parts, and then `num_checks` random ones to compare with.

        Args:
            model: a supernet.
        """
        space, found = model.search_space, defaultdict(list)
        for subnet in tqdm(covering(space), desc="measuring latency"):
            for name, milliseconds in time_parts(model.extract_subnet(subnet), seconds, repeats).items():
                found[name].append(milliseconds)
        table = cls(seconds, torch.get_num_threads(), {name: statistics.median(each) for name, each in found.items()})
        rng, errors = random.Random(0), []
        for _ in range(num_checks):
            subnet = space.sample(rng)
            measured = 1e3 * measure_latency(model.extract_subnet(subnet), seconds, repeats=repeats)
            errors.append(abs(table(subnet) - measured) / measured)
        table.error = statistics.median(errors)
        return table

    def __call__(self, subnet: Subnet) -> float:
        return sum(self.milliseconds[part] for part in parts_of(subnet))

    def to_json_file(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def from_json_file(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text()))
