"""A table of latencies: the time of each part of a subnet on this machine, measured once, added up for any subnet."""

import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from modeling_lighthubert import LightHubertPreTrainedModel, SearchSpace, Subnet
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import write_json
from modeling_lighthubert.profiling import SAMPLING_RATE, measure_latency, time_in_turns
from modeling_lighthubert.search_space import nondecreasing_choices


class Parts(NamedTuple):
    """Names of the parts of a subnet. Parts with the same name take the same time, in any subnet.

    Attributes:
        convolutions: of the feature encoder, from bottom to top; a single name where subnets do not choose channels.
        rest: what is no convolution and no layer.
        layers: of the transformer, from bottom to top.
    """

    convolutions: list[str]
    rest: str
    layers: list[str]

    def names(self) -> list[str]:
        return [*self.convolutions, self.rest, *self.layers]


def parts_of(subnet: Subnet) -> Parts:
    width, conv_dim = subnet.hidden_size, subnet.conv_dim
    if conv_dim is None:
        convolutions, last = ["convolutions"], "all"
    else:
        channels = enumerate(zip((1, *conv_dim), conv_dim))
        convolutions = [f"convolution {layer}, {before} to {after}" for layer, (before, after) in channels]
        last = str(conv_dim[-1])
    windows = subnet.attention_window or (None,) * subnet.num_hidden_layers
    layers = [
        f"layer, {width} wide, {heads} heads, {units} units, window {window or 'all'}"
        for heads, units, window in zip(subnet.num_attention_heads, subnet.intermediate_size, windows, strict=True)
    ]
    return Parts(convolutions, f"rest, {last} to {width}", layers)


@torch.inference_mode()
def time_parts(model: LightHubertPreTrainedModel, seconds: float, repeats: int) -> dict[str, float]:
    """Milliseconds of each part of a cut model for a clip of noise, on its device and in its dtype: the median over
    the repeats, of parts with the same name their mean. What takes the times stays on the model."""
    base: Any = model.base_model
    parts, encoder = parts_of(model.subnet), base.feature_extractor
    timed = [*(encoder.conv_layers if model.subnet.conv_dim else [encoder]), *base.encoder.layers]
    audio = torch.randn(1, int(seconds * SAMPLING_RATE)).to(model.device, model.dtype)
    synchronize = partial(torch.cuda.synchronize, model.device) if audio.is_cuda else None
    marks: dict[nn.Module, list[float]] = {module: [] for module in timed}  # start, end, start, end ...

    def mark(module: nn.Module) -> None:
        if synchronize is not None:
            synchronize()
        marks[module].append(time.perf_counter())

    def time_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed_forward(*inputs: Any, **options: Any) -> Any:
            mark(module)
            outputs = forward(*inputs, **options)
            mark(module)
            return outputs

        return timed_forward

    for module in timed:  # no hooks: where there are any, the convolutions show them the whole, and take another time
        module.forward = time_forward(module, module.forward)  # type: ignore[method-assign]
    whole = time_in_turns({"model": lambda: model(audio)}, repeats, synchronize=synchronize)["model"]
    # a module is called once a run, or more often: the convolutions take long audio in pieces
    taken = [np.diff(marks[module])[::2].reshape(1 + repeats, -1).sum(axis=1)[1:] for module in timed]
    runs = defaultdict(list, {parts.rest: [np.array(whole) - sum(taken)]})
    for name, each in zip([*parts.convolutions, *parts.layers], taken, strict=True):
        runs[name].append(each)
    return {name: 1e3 * float(np.median(np.mean(each, axis=0))) for name, each in runs.items()}


def measurement_subnets(space: SearchSpace) -> list[Subnet]:
    """Subnets whose layers are all alike, which together have every part that a subnet of `space` can have."""
    encoders = [None] if space.conv_dim is None else list(nondecreasing_choices(space.conv_dim))
    depth, windows = space.num_hidden_layers[0], space.attention_window or (None,)
    shapes = [
        [
            Subnet(width, (heads,) * depth, (int(width * ratio),) * depth, space.head_dim, conv_dim, (window,) * depth)
            for conv_dim in encoders
        ]
        for width, heads, ratio, window in product(
            space.hidden_size, space.num_attention_heads, space.ffn_ratio, windows
        )
    ]
    missing = {name for shape in shapes for subnet in shape for name in parts_of(subnet).names()}
    chosen: list[Subnet] = []
    for shape in cycle(shapes):
        if not missing:
            return chosen
        best = max(shape, key=lambda subnet: len(missing.intersection(parts_of(subnet).names())))
        if missing.intersection(parts_of(best).names()):
            chosen.append(best)
            missing.difference_update(parts_of(best).names())
    return chosen


@dataclass
class LatencyTable:
    """Milliseconds that any subnet takes for one clip, as the sum of those of its parts.

    Attributes:
        seconds: length of the clip.
        num_threads: threads of torch when it was measured.
        milliseconds: of each part, by its name.
        error: median over random subnets of |table - measured| / measured.
        device: type of the device that it was measured on.
    """

    seconds: float
    num_threads: int
    milliseconds: dict[str, float]
    error: float = 0.0
    device: str = "cpu"

    @classmethod
    def measure(
        cls, model: LightHubertPreTrainedModel, seconds: float = 5.0, repeats: int = 7, num_checks: int = 10
    ) -> Self:
        """Times cut models that have all the parts between them, and then `num_checks` random ones to compare with.

        Args:
            model: a supernet, on the device that is measured.
        """
        space, found = model.search_space, defaultdict(list)
        assert space is not None
        for subnet in tqdm(measurement_subnets(space), desc="measuring latency"):
            for name, milliseconds in time_parts(model.extract_subnet(subnet), seconds, repeats).items():
                found[name].append(milliseconds)
        medians = {name: statistics.median(each) for name, each in found.items()}
        table = cls(seconds, torch.get_num_threads(), medians, device=model.device.type)
        rng, errors = random.Random(0), []
        for _ in range(num_checks):
            subnet = space.sample(rng)
            measured = 1e3 * measure_latency(model.extract_subnet(subnet), seconds, repeats=repeats)
            errors.append(abs(table(subnet) - measured) / measured)
        table.error = statistics.median(errors)
        return table

    def __call__(self, subnet: Subnet) -> float:
        """Milliseconds of `subnet`.

        Raises:
            UserError: it has a part that the table lacks, which is then of another supernet.
        """
        try:
            return sum(self.milliseconds[name] for name in parts_of(subnet).names())
        except KeyError as error:
            raise UserError(f"the table of latencies is of another supernet: it lacks {error}") from None

    def to_json_file(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def from_json_file(cls, path: Path) -> Self:
        """
        Raises:
            UserError: the file is no table of latencies.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is no table of latencies; delete it to measure anew ({error})") from error
