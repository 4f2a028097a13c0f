"""What a subnet costs: parameters, multiply-accumulates (MACs), and time on this machine.

python -m modeling_lighthubert.profiling FOLDER --subnet a_small --seconds 5
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel

from . import LightHubertPreTrainedModel, Subnet
from .elastic import num_selected_parameters, selected_children


SAMPLING_RATE = 16_000


@dataclass(frozen=True)
class Cost:
    """Cost of one part of a model: `num_parameters`, and `macs` for a clip (batch of one)."""

    part: str
    num_parameters: int
    macs: int


def profile_subnet(
    model: LightHubertPreTrainedModel, subnet: str | Subnet | Mapping[str, Any] | None = None, seconds: float = 1.0
) -> list[Cost]:
    """Cost of each part of `subnet` for one clip of `seconds`, analytically: nothing is run.

    MACs count matrix products and convolutions, as FLOP counters do (one MAC is two FLOPs there). Attention grows
    with the square of the length, so MACs per second of audio grow slowly with `seconds`; in a window it does not, and
    the pairs inside it are counted. Of a head, the layers that read hidden states are counted.

    Args:
        model: a supernet or a cut model.
        subnet: default: the selected one.
        seconds: length of the clip at 16 kHz.
    """
    if subnet is not None and model.search_space is not None:
        with model.using_subnet(subnet):
            return profile_subnet(model, seconds=seconds)
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

    costs = [
        Cost("feature encoder", num_selected_parameters(base.feature_extractor), encoder_macs),
        Cost(
            "feature projection",
            num_selected_parameters(base.feature_projection),
            num_frames * channels * width,
        ),
        Cost("position convolution", num_selected_parameters(base.encoder.pos_conv_embed), position_macs),
    ]
    windows = subnet.attention_window or (None,) * subnet.num_hidden_layers
    layers = zip(selected_children(base.encoder.layers), windows, strict=True)
    sizes = zip(layers, subnet.num_attention_heads, subnet.intermediate_size, strict=True)
    for ((name, layer), window), heads, intermediate_size in sizes:
        attention = heads * subnet.head_dim
        macs = num_frames * width * (4 * attention + 2 * intermediate_size)
        macs += 2 * num_pairs(num_frames, window) * attention
        part = f"layer {name} ({heads} heads, FFN {intermediate_size})"
        costs.append(Cost(part, num_selected_parameters(layer), macs))
    costs.append(Cost("layer norm, mask embedding", 2 * width + _mask_embedding_size(model), 0))
    if model is not base:
        head_macs = sum(num_frames * width * layer.out_features for layer in model.elastic_heads())
        in_base = sum(cost.num_parameters for cost in costs)
        costs.append(Cost("head", model.num_subnet_parameters() - in_base, head_macs))
    return costs


def num_pairs(num_frames: int, window: int | None) -> int:
    """Pairs of frames of which one attends to the other, if it attends to `window` frames on each side."""
    if window is None or window >= num_frames:
        return num_frames**2
    return num_frames * (2 * window + 1) - window * (window + 1)


def macs_per_second(
    model: LightHubertPreTrainedModel, subnet: str | Subnet | Mapping[str, Any] | None = None, seconds: float = 1.0
) -> float:
    """MACs per second of audio in clips of `seconds`."""
    return sum(cost.macs for cost in profile_subnet(model, subnet, seconds)) / seconds


@torch.no_grad()
def measure_latency(
    model: torch.nn.Module, seconds: float = 1.0, batch_size: int = 1, repeats: int = 20, warm_up: int = 3
) -> float:
    """Median seconds that `model` takes for a batch of noise, on its device and in its dtype.

    The real-time factor is `latency / (batch_size * seconds)`.
    """
    parameter = next(model.parameters())
    audio = torch.randn(batch_size, int(seconds * SAMPLING_RATE)).to(parameter.device, parameter.dtype)
    times = []
    for _ in range(warm_up + repeats):
        start = time.perf_counter()
        model(audio)
        if audio.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[warm_up:])[repeats // 2]


def format_table(costs: list[Cost], seconds: float) -> str:
    """The costs as text, with their shares."""
    parameters, macs = sum(cost.num_parameters for cost in costs), sum(cost.macs for cost in costs)
    width = max(len(cost.part) for cost in costs)
    lines = [f"{'part':<{width}}  {'parameters':>12}  {'share':>6}  {'MMAC/s':>9}  {'share':>6}"]
    for cost in [*costs, Cost("total", parameters, macs)]:
        lines.append(
            f"{cost.part:<{width}}  {cost.num_parameters:>12,}  {cost.num_parameters / parameters:>6.1%}"
            f"  {cost.macs / seconds / 1e6:>9.1f}  {cost.macs / macs:>6.1%}"
        )
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _mask_embedding_size(model: LightHubertPreTrainedModel) -> int:
    return model.subnet.hidden_size if hasattr(model.base_model, "masked_spec_embed") else 0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder or Hub id of a LightHuBERT checkpoint.")
    parser.add_argument("--subnet", help="Name or JSON file of a subnet. Default: the one the checkpoint selects.")
    parser.add_argument("--seconds", type=float, default=5.0, help="Length of the clip (default: 5).")
    parser.add_argument(
        "--repeats", type=int, default=20, help="Timed runs, of which the median counts (default: 20)."
    )
    options = parser.parse_args(arguments)
    model = AutoModel.from_pretrained(options.model)
    if options.subnet:
        subnet = Subnet.from_json_file(options.subnet) if options.subnet.endswith(".json") else options.subnet
        model = model.extract_subnet(subnet)
    latency = measure_latency(model, options.seconds, repeats=options.repeats)
    print(model.subnet)
    print(format_table(profile_subnet(model, seconds=options.seconds), options.seconds))
    print(
        f"latency {latency * 1e3:.1f} ms for {options.seconds:g} s of audio, real-time factor"
        f" {latency / options.seconds:.4f} ({torch.get_num_threads()} threads, {model.dtype}, {model.device})"
    )


if __name__ == "__main__":
    main()
