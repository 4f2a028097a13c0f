"""Puts what matters most where every subnet has it: channels of convolutions, attention heads, FFN units.

    python training/order_channels.py --model_name_or_path facebook/hubert-base-ls960 --search_space tiny_to_base \\
        --train_file speech.parquet --output_dir ordered
    python training/run_distillation.py --teacher_name_or_path facebook/hubert-base-ls960 \\
        --student_name_or_path ordered ...

Narrow subnets use the first channels and heads, and the first FFN units of each block, whatever these happen to be. A
permutation leaves the answers of the full model as they are, and decides what narrow ones begin with: done once,
before stage 2. Importance is the size of an activation on real speech, times that of the weights that read it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoFeatureExtractor, HfArgumentParser

from lighthubert_training.data.sources import UNREADABLE, DataArguments, SpeechDataset, load_speech
from lighthubert_training.runs.options import parse_recipe
from modeling_lighthubert import (
    LightHubertForPreTraining,
    LightHubertModel,
    LightHubertPreTrainedModel,
    SearchSpace,
)


@dataclass
class OrderingArguments:
    """What is put in order, and by how much speech."""

    model_name_or_path: str = field(metadata={"help": "Supernet, or HuBERT or wav2vec 2.0 to make one of."})
    output_dir: str = field(metadata={"help": "Folder for the ordered supernet."})
    search_space: str | None = field(
        default=None, metadata={"help": "Preset or JSON file, for a model that is no supernet yet."}
    )
    num_recordings: int = field(default=64, metadata={"help": "Recordings to measure activations on."})


class Listener:
    """Mean squares of what layers read or write, feature by feature, added up while the model hears speech.

    Each recording counts the same, and each of its frames, in however many pieces the model hears it (a frame where
    two of them meet counts in both).

    Attributes:
        squares: float64 (num_features), by the name that is given.
    """

    def __init__(self) -> None:
        self.squares: dict[str, torch.Tensor] = {}
        self.of_recording: dict[str, tuple[torch.Tensor | float, int]] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def to_inputs(self, name: str, layer: nn.Module) -> None:
        self.handles.append(layer.register_forward_pre_hook(lambda _, inputs: self._add(name, inputs[0])))

    def to_channels(self, name: str, layer: nn.Module) -> None:
        """Of what a convolution gives, (batch_size, channels, time)."""
        hook = layer.register_forward_hook(lambda _, inputs, output: self._add(name, output.transpose(1, 2)))
        self.handles.append(hook)

    def _add(self, name: str, features: torch.Tensor) -> None:
        squares = features.double().square().flatten(0, -2)
        total, num_frames = self.of_recording.get(name, (0.0, 0))
        self.of_recording[name] = (total + squares.sum(dim=0), num_frames + len(squares))

    def end_recording(self) -> None:
        for name, (total, num_frames) in self.of_recording.items():
            self.squares[name] = self.squares.get(name, 0.0) + total / num_frames
        self.of_recording.clear()


def all_layers(base: LightHubertModel) -> list[nn.Module]:
    """Of a supernet; iterating over them would give those of the selected subnet."""
    return [base.encoder.layers[number] for number in range(len(base.encoder.layers))]


@torch.no_grad()
def measure_importance(
    model: LightHubertPreTrainedModel, waveforms: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """How much each channel, head and unit of the full model gives to what comes next.

    Args:
        model: a supernet. All of its weights are used, whether or not a subnet has them.
        waveforms: each of shape (num_samples), as the model wants them.

    Returns:
        By name: `convolution i` (its channels), `heads i`, `units i` of layer i.
    """
    base, earlier = model.base_model, model.subnet
    model.eval()
    base.select(model.config.full_subnet())
    convolutions, listener = list(base.feature_extractor.conv_layers), Listener()
    for number, layer in enumerate(convolutions[:-1]):
        listener.to_channels(f"convolution {number}", layer)
    listener.to_inputs(f"convolution {len(convolutions) - 1}", base.feature_projection.projection)  # after its norm
    for number, layer in enumerate(all_layers(base)):
        listener.to_inputs(f"heads {number}", layer.attention.out_proj)
        listener.to_inputs(f"units {number}", layer.feed_forward.output_dense)
    for waveform in waveforms:
        base(waveform[None])
        listener.end_recording()
    for handle in listener.handles:
        handle.remove()
    readers = {f"convolution {number}": layer.conv.weight for number, layer in enumerate(convolutions[1:])}
    readers[f"convolution {len(convolutions) - 1}"] = base.feature_projection.projection.weight
    for number, layer in enumerate(all_layers(base)):
        readers[f"heads {number}"] = layer.attention.out_proj.weight
        readers[f"units {number}"] = layer.feed_forward.output_dense.weight
    model.set_subnet(earlier)
    importance = {}
    for name, squares in listener.squares.items():
        of_weights = readers[name].double().transpose(0, 1).flatten(1).square().sum(dim=1)
        importance[name] = squares * of_weights
        if name.startswith("heads"):
            importance[name] = importance[name].unflatten(0, (-1, model.config.head_dim)).sum(dim=1)
    return importance


def ffn_positions(space: SearchSpace, hidden_size: int, intermediate_size: int) -> torch.Tensor:
    """FFN units of a supernet, those first that the most choices of width and ratio use."""
    block, unit = np.divmod(np.arange(intermediate_size), hidden_size)
    uses = sum(
        (unit < width) & (block * width + unit < int(width * ratio))
        for width, ratio in product(space.hidden_size, space.ffn_ratio)
    )
    return torch.from_numpy(np.argsort(-np.asarray(uses), kind="stable"))


@torch.no_grad()
def reorder(model: LightHubertPreTrainedModel, importance: Mapping[str, torch.Tensor]) -> None:
    """Permutes channels, heads and units, so that the most important come first. The full model answers as before.

    Args:
        importance: as `measure_importance` gives it. What has no name in it stays where it is.
    """
    base, config = model.base_model, model.config
    convolutions = list(base.feature_extractor.conv_layers)
    readers = [layer.conv.weight for layer in convolutions[1:]] + [base.feature_projection.projection.weight]
    for number, (layer, reader) in enumerate(zip(convolutions, readers, strict=True)):
        if f"convolution {number}" not in importance:
            continue
        order = importance[f"convolution {number}"].argsort(descending=True, stable=True)
        norms = [layer.layer_norm] if hasattr(layer, "layer_norm") else []
        if number == len(convolutions) - 1 and base.feature_projection.feat_proj_layer_norm:
            norms.append(base.feature_projection.layer_norm)
        for module in (layer.conv, *norms):
            permute(order, module.weight, *([] if module.bias is None else [module.bias]))
        permute(order, reader, dim=1)
    positions = ffn_positions(model.search_space, config.hidden_size, config.intermediate_size)
    for number, layer in enumerate(all_layers(base)):
        if f"heads {number}" in importance:
            heads = importance[f"heads {number}"].argsort(descending=True, stable=True)
            order = (heads[:, None] * config.head_dim + torch.arange(config.head_dim)).flatten()
            for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
                permute(order, projection.weight, projection.bias)
            permute(order, layer.attention.out_proj.weight, dim=1)
        if f"units {number}" in importance:
            order = torch.empty_like(positions)
            order[positions] = importance[f"units {number}"].argsort(descending=True, stable=True)
            dense = layer.feed_forward.intermediate_dense
            permute(order, dense.weight, dense.bias)
            permute(order, layer.feed_forward.output_dense.weight, dim=1)


def permute(order: torch.Tensor, *parameters: nn.Parameter, dim: int = 0) -> None:
    for parameter in parameters:
        parameter.copy_(parameter.index_select(dim, order))


def load_supernet(arguments: OrderingArguments) -> LightHubertPreTrainedModel:
    """The supernet, with the distillation heads that it may have.

    Raises:
        ValueError: neither the model nor an option says which subnets there are.
    """
    source, space = arguments.model_name_or_path, arguments.search_space
    config = AutoConfig.from_pretrained(source)
    if space is None and getattr(config, "search_space", None) is None:
        raise ValueError(f"{source} is no supernet: give --search_space to make one of it")
    options = {}
    if space is not None:
        options["search_space"] = SearchSpace.from_json_file(space) if space.endswith(".json") else space
    has_heads = "LightHubertForPreTraining" in (config.architectures or ())
    return (LightHubertForPreTraining if has_heads else LightHubertModel).from_pretrained(source, **options)


def main() -> None:
    parser = HfArgumentParser((OrderingArguments, DataArguments), description=__doc__.splitlines()[0])
    arguments, data_arguments = parse_recipe(parser)
    model = load_supernet(arguments)
    extractor = AutoFeatureExtractor.from_pretrained(arguments.model_name_or_path)
    speech = SpeechDataset(
        load_speech(data_arguments, True), data_arguments.audio_column_name, extractor.sampling_rate
    )
    chosen = torch.randperm(len(speech), generator=torch.Generator().manual_seed(0))[: arguments.num_recordings]

    def waveforms() -> Iterable[torch.Tensor]:
        for index in tqdm(chosen.tolist(), desc="listening"):
            try:
                waveform = speech[index]
            except UNREADABLE:
                continue
            if len(waveform) >= model.base_model.samples_per_first_frame:
                inputs = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt")
                yield inputs.input_values[0]

    importance = measure_importance(model, waveforms())
    if not importance:
        raise ValueError("no recording could be heard: give others, with --train_file or --dataset_name")
    reorder(model, importance)
    model.save_pretrained(arguments.output_dir)
    extractor.save_pretrained(arguments.output_dir)
    print(f"{len(importance)} groups of channels, heads and units in order: {Path(arguments.output_dir).resolve()}")


if __name__ == "__main__":
    main()
