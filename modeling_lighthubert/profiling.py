"""What a subnet costs: parameters, multiply-accumulates (MACs), and time on this machine.

python -m modeling_lighthubert.profiling --model_name_or_path FOLDER --subnet a_small --seconds 5
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import LightHubertPreTrainedModel, Subnet
from .elastic import num_selected_parameters, selected_children
from .errors import run, user_error
from .loading import load_cut_lighthubert


SAMPLING_RATE = 16_000


@dataclass(frozen=True)
class Cost:
    """Cost of a part of a model: its parameters, and its MACs for one clip."""

    num_parameters: int = 0
    macs: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.num_parameters + other.num_parameters, self.macs + other.macs)


@dataclass(frozen=True)
class Profile:
    """Cost of each part of a subnet.

    Attributes:
        subnet: whose costs these are.
        feature_encoder: all convolutions with their norms.
        projection: feature projection.
        position: position convolution.
        layers: transformer layers that the subnet has, from bottom to top.
        norm: layer norm before or after the layers, and mask embedding.
        head: of a model with one.
    """

    subnet: Subnet
    feature_encoder: Cost
    projection: Cost
    position: Cost
    layers: tuple[Cost, ...]
    norm: Cost
    head: Cost | None = None

    @property
    def num_parameters(self) -> int:
        return self.total.num_parameters

    @property
    def macs(self) -> int:
        return self.total.macs

    @property
    def total(self) -> Cost:
        return sum((cost for _, cost in self.rows()), Cost())

    def rows(self) -> Iterator[tuple[str, Cost]]:
        """Titles and costs of the parts, in the order in which audio passes them."""
        yield "feature encoder", self.feature_encoder
        yield "feature projection", self.projection
        yield "position convolution", self.position
        sizes = zip(self.layers, self.subnet.num_attention_heads, self.subnet.intermediate_size, strict=True)
        for index, (cost, heads, units) in enumerate(sizes):
            yield f"layer {index} ({heads} heads, FFN {units})", cost
        yield "layer norm, mask embedding", self.norm
        if self.head is not None:
            yield "head", self.head


def profile_subnet(
    model: LightHubertPreTrainedModel, subnet: str | Subnet | Mapping[str, Any] | None = None, seconds: float = 1.0
) -> Profile:
    """Cost of each part of `subnet` for one clip of `seconds`, analytically: nothing is run.

    MACs count matrix products and convolutions, as FLOP counters do (one MAC is two FLOPs there). Attention grows
    with the square of the length, so MACs per second of audio grow slowly with `seconds`; in a window it does not, and
    the pairs inside it are counted. Of a head, the layers that read hidden states are counted.

    Args:
        model: a supernet or a cut model. The selection of a supernet is neither changed nor waited for.
        subnet: default: the selected one.
        seconds: length of the clip at 16 kHz.

    Raises:
        ValueError: the clip is shorter than one frame, or the subnet is not in the search space.
    """
    if model.search_space is not None:
        model = model.with_subnet(subnet)
    base, config, subnet = model.base_model, model.config, model.subnet
    width, groups = subnet.hidden_size, config.num_conv_pos_embedding_groups

    num_frames, channels, encoder_macs = int(seconds * SAMPLING_RATE), 1, 0
    conv_dim = subnet.conv_dim or config.conv_dim
    for out_channels, kernel, stride in zip(conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        num_frames = (num_frames - kernel) // stride + 1
        encoder_macs += num_frames * out_channels * channels * kernel
        channels = out_channels
    if num_frames < 1:
        raise ValueError(f"seconds={seconds} is shorter than one frame")
    # an even kernel gives one frame more than goes in, which is dropped afterwards
    conv_frames = num_frames + (config.num_conv_pos_embeddings + 1) % 2
    position_macs = conv_frames * width * (width // groups) * config.num_conv_pos_embeddings

    layers = []
    sizes = (subnet.num_attention_heads, subnet.intermediate_size, subnet.layer_windows)
    for (_, layer), heads, units, window in zip(selected_children(base.encoder.layers), *sizes, strict=True):
        attention = heads * subnet.head_dim
        macs = num_frames * width * (4 * attention + 2 * units) + 2 * num_pairs(num_frames, window) * attention
        layers.append(Cost(num_selected_parameters(layer), macs))
    mask_embedding = width if hasattr(base, "masked_spec_embed") else 0
    profile = Profile(
        subnet,
        feature_encoder=Cost(num_selected_parameters(base.feature_extractor), encoder_macs),
        projection=Cost(num_selected_parameters(base.feature_projection), num_frames * channels * width),
        position=Cost(num_selected_parameters(base.encoder.pos_conv_embed), position_macs),
        layers=tuple(layers),
        norm=Cost(2 * width + mask_embedding),
    )
    if model is base:
        return profile
    head_macs = sum(num_frames * width * layer.out_features for layer in model.elastic_heads())
    return replace(profile, head=Cost(model.num_subnet_parameters() - profile.num_parameters, head_macs))


def num_pairs(num_frames: int, window: int | None) -> int:
    """Pairs of frames of which one attends to the other, if it attends to `window` frames on each side."""
    if window is None or window >= num_frames:
        return num_frames**2
    return num_frames * (2 * window + 1) - window * (window + 1)


def macs_per_second(
    model: LightHubertPreTrainedModel, subnet: str | Subnet | Mapping[str, Any] | None = None, seconds: float = 1.0
) -> float:
    """MACs per second of audio in clips of `seconds`."""
    return profile_subnet(model, subnet, seconds).macs / seconds


def time_in_turns(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 1,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds that each of `runs` takes in each repeat.

    All take turns within a repeat, so that whatever else the machine does hits all of them, and the order is drawn
    anew in every repeat.

    Args:
        repeats: timed rounds.
        warm_up: rounds before those, which are not timed.
        synchronize: waits for the device, such as `torch.cuda.synchronize`.
    """
    rng = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(warm_up + repeats):
        for name in rng.sample(sorted(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            if synchronize is not None:
                synchronize()
            if repeat >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the repeats of time over reference time, see `time_in_turns`."""
    return statistics.median(one / other for one, other in zip(times, reference, strict=True))


@torch.no_grad()
def measure_latency(
    model: torch.nn.Module, seconds: float = 1.0, batch_size: int = 1, repeats: int = 20, warm_up: int = 3
) -> float:
    """Median seconds that `model` takes for a batch of noise, on its device and in its dtype.

    The real-time factor is `latency / (batch_size * seconds)`.
    """
    parameter = next(model.parameters())
    audio = torch.randn(batch_size, int(seconds * SAMPLING_RATE)).to(parameter.device, parameter.dtype)
    synchronize = torch.cuda.synchronize if audio.is_cuda else None
    times = time_in_turns({"model": lambda: model(audio)}, repeats, warm_up, synchronize)
    return statistics.median(times["model"])


def format_table(profile: Profile, seconds: float) -> str:
    """The costs as text, and each as a fraction of their sum."""
    rows, total = list(profile.rows()), profile.total
    width = max(len(title) for title, _ in rows)
    lines = [f"{'part':<{width}}  {'parameters':>12}  {'share':>6}  {'MMAC/s':>9}  {'share':>6}"]
    for title, cost in [*rows, ("total", total)]:
        lines.append(
            f"{title:<{width}}  {cost.num_parameters:>12,}  {cost.num_parameters / total.num_parameters:>6.1%}"
            f"  {cost.macs / seconds / 1e6:>9.1f}  {cost.macs / total.macs:>6.1%}"
        )
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of a LightHuBERT checkpoint.")
    parser.add_argument("--subnet", help="Name or JSON file of a subnet. Default: the one the checkpoint selects.")
    parser.add_argument("--seconds", type=float, default=5.0, help="Length of the clip (default: 5).")
    parser.add_argument(
        "--repeats", type=int, default=20, help="Number of timed runs, of which the median counts (default: 20)."
    )
    parser.add_argument("--device", default="cpu", help="Device that runs the model, such as cuda (default: cpu).")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats has to be at least 1")
    model = load_cut_lighthubert(options.model_name_or_path, options.subnet, device=options.device)
    with user_error():
        profile = profile_subnet(model, seconds=options.seconds)
    latency = measure_latency(model, options.seconds, repeats=options.repeats)
    print(model.subnet)
    print(format_table(profile, options.seconds))
    print(
        f"latency {latency * 1e3:.1f} ms for {options.seconds:g} s of audio, real-time factor"
        f" {latency / options.seconds:.4f} ({torch.get_num_threads()} threads, {model.dtype}, {model.device})"
    )


if __name__ == "__main__":
    run(main)
