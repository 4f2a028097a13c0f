"""Sorting the channels of convolutions and hidden states, the attention heads and the FFN units of a supernet by
importance, so that narrow subnets keep the important ones.

Narrow subnets use the first channels and heads, and the first FFN units of each block, whatever these happen to be. A
permutation leaves what the full model computes as it is, and decides what narrow ones begin with. Importance is the
mean square of an activation on real speech, times that of the weights that read it.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from modeling_lighthubert import LightHubertPreTrainedModel, SearchSpace


class ActivationStatistics(ExitStack):
    """Mean squares of what layers read or write, feature by feature, over recordings. Hooks take them until the block
    ends.

    Each recording counts the same, and each of its frames, in however many pieces the model reads it (a frame where
    two of them meet counts in both).

    Attributes:
        squares: float64 (num_features), by the name that is given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.squares: dict[str, torch.Tensor] = {}
        self.of_recording: dict[str, tuple[torch.Tensor | float, int]] = {}

    def of_inputs(self, name: str, layer: nn.Module) -> None:
        """Takes them of the inputs of `layer`, (batch_size, num_frames, num_features)."""
        self.callback(layer.register_forward_pre_hook(lambda _, inputs: self._add(name, inputs[0])).remove)

    def of_channels(self, name: str, layer: nn.Module) -> None:
        """Takes them of the output of a convolution, (batch_size, channels, num_frames)."""
        handle = layer.register_forward_hook(lambda _, inputs, output: self._add(name, output.transpose(1, 2)))
        self.callback(handle.remove)

    def _add(self, name: str, features: torch.Tensor) -> None:
        squares = features.double().square().flatten(0, -2)
        total, num_frames = self.of_recording.get(name, (0.0, 0))
        self.of_recording[name] = (total + squares.sum(dim=0), num_frames + len(squares))

    def end_recording(self) -> None:
        """Adds the means over the recording that was read since the last call."""
        for name, (total, num_frames) in self.of_recording.items():
            mean = torch.as_tensor(total / num_frames)
            self.squares[name] = self.squares[name] + mean if name in self.squares else mean
        self.of_recording.clear()


def all_layers(base: Any) -> list[Any]:
    """All layers of a supernet; iterating over them would give those of the selected subnet."""
    return [base.encoder.layers[number] for number in range(len(base.encoder.layers))]


@torch.no_grad()
def measure_importance(
    model: LightHubertPreTrainedModel, waveforms: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """How much each channel, head and unit of the full model contributes to its reader. The selection and the training
    mode of the model are left as they were, also on an error.

    Args:
        model: a supernet. All of its weights are used, whether or not a subnet has them.
        waveforms: each of shape (num_samples), as the model's feature extractor gives them.

    Returns:
        By name, float64 on the CPU: `convolution i` (its channels), if subnets choose them; `heads i`, `units i` of
        layer i; and `hidden`, the channels of hidden states, the sum of their shares in what attention and FFN of each
        layer read.
    """
    base: Any = model.base_model  # torch types every attribute of a module as `Tensor | Module`
    earlier, training = model.subnet, model.training
    convolutions = list(base.feature_extractor.conv_layers)
    with ActivationStatistics() as statistics:
        statistics.callback(model.train, training)
        statistics.callback(model.set_subnet, earlier)
        model.eval()
        base.select(model.config.full_subnet())
        readers: dict[str, torch.Tensor] = {}
        if model.config.full_subnet().conv_dim is not None:  # else it may be shared with the teacher as it is
            readers = {f"convolution {number}": layer.conv.weight for number, layer in enumerate(convolutions[1:])}
            for number, layer in enumerate(convolutions[:-1]):
                statistics.of_channels(f"convolution {number}", layer)
            projection = base.feature_projection.projection
            statistics.of_inputs(f"convolution {len(convolutions) - 1}", projection)  # behind the norm of the last one
            readers[f"convolution {len(convolutions) - 1}"] = projection.weight
        for number, layer in enumerate(all_layers(base)):
            attention, ffn = layer.attention, layer.feed_forward
            for kind, of_kind in {
                "heads": [attention.out_proj],
                "units": [ffn.output_dense],
                "hidden, attention": [attention.q_proj, attention.k_proj, attention.v_proj],
                "hidden, FFN": [ffn.intermediate_dense],
            }.items():
                statistics.of_inputs(f"{kind} {number}", of_kind[0])
                readers[f"{kind} {number}"] = torch.cat([reader.weight for reader in of_kind])
        for waveform in waveforms:
            base(waveform[None])
            statistics.end_recording()
    importance = {}
    for name, squares in statistics.squares.items():
        of_weights = readers[name].double().transpose(0, 1).flatten(1).square().sum(dim=1)
        importance[name] = (squares * of_weights).cpu()
        if name.startswith("heads"):
            importance[name] = importance[name].unflatten(0, (-1, model.config.head_dim)).sum(dim=1)
    of_readers = [importance.pop(name) for name in list(importance) if name.startswith("hidden")]
    if of_readers:
        importance["hidden"] = torch.stack([each / each.sum() for each in of_readers]).sum(dim=0)
    return importance


def ffn_positions(space: SearchSpace, hidden_size: int, intermediate_size: int) -> torch.Tensor:
    """Numbers of the FFN units of a supernet, int64 (intermediate_size): first those that the most choices of width
    and ratio use."""
    block, unit = np.divmod(np.arange(intermediate_size), hidden_size)
    uses = sum(
        (unit < width) & (block * width + unit < int(width * ratio))
        for width, ratio in product(space.hidden_size, space.ffn_ratio)
    )
    return torch.from_numpy(np.argsort(-np.asarray(uses), kind="stable"))


@torch.no_grad()
def reorder(model: Any, importance: Mapping[str, torch.Tensor]) -> None:
    """Permutes channels, heads and units, so that the most important come first. The full model computes what it has
    computed: its hidden states have their channels in another order, and the outputs of its heads stay as they are.

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
    if "hidden" in importance:
        reorder_hidden(model, importance["hidden"])


def reorder_hidden(model: Any, importance: torch.Tensor) -> None:
    """Permutes the channels of hidden states. The position convolution mixes those of a group, so groups are put in
    order as wholes, and channels within their group.

    Args:
        importance: (hidden_size).
    """
    base = model.base_model
    position = base.encoder.pos_conv_embed
    conv = position.conv
    of_groups = importance.unflatten(0, (conv.groups, -1))
    groups = of_groups.sum(dim=1).argsort(descending=True, stable=True)
    within = of_groups[groups].argsort(dim=1, descending=True, stable=True)  # (groups, channels of a group)
    order = (groups[:, None] * within.shape[1] + within).flatten()

    kernel = conv.parametrizations.weight.original1 if hasattr(conv, "parametrizations") else conv.weight
    permute(order, kernel, conv.bias)
    of_groups = kernel.unflatten(0, within.shape)  # (groups, outputs of a group, its inputs, taps)
    kernel.copy_(of_groups.gather(2, within.to(kernel.device)[:, None, :, None].expand_as(of_groups)).flatten(0, 1))
    if (norm := position.batch_norm) is not None:
        permute(order, norm.weight, norm.bias, norm.running_mean, norm.running_var)

    writers, norms = [base.feature_projection.projection], [base.encoder.layer_norm]
    readers = list(model.elastic_heads())
    for layer in all_layers(base):
        attention, ffn = layer.attention, layer.feed_forward
        writers += [attention.out_proj, ffn.output_dense]
        readers += [attention.q_proj, attention.k_proj, attention.v_proj, ffn.intermediate_dense]
        norms += [layer.layer_norm, layer.final_layer_norm]
    for module in (*writers, *norms):
        permute(order, module.weight, module.bias)
    for reader in readers:
        permute(order, reader.weight, dim=1)
    if hasattr(base, "masked_spec_embed"):
        permute(order, base.masked_spec_embed)


def permute(order: torch.Tensor, *weights: torch.Tensor, dim: int = 0) -> None:
    """Puts entry `order[i]` of each of `weights` along `dim` to place i."""
    for weight in weights:
        weight.copy_(weight.index_select(dim, order.to(weight.device)))
