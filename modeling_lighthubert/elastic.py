"""Elastic layers: torch layers that hold the weights of the largest subnet and use the part that the selected one
names.

Each is a plain torch layer with three more methods: `select` says which part is used from now on, `selected` gives
that part as one tensor, and `cut_state` gives the state dict of the plain layer with the same outputs. `forward`
reads the part where it lies, through views of the full weights: none is gathered first, and gradients reach what was
used and nothing else. Sizes are full until the first `select`. What "the part" means is fixed by the released
checkpoints: rows and columns from the front, except in the FFN (see `leading`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn


def leading(tensor: torch.Tensor, dim: int, size: int, block: int, width: int) -> list[torch.Tensor]:
    """The first `width` of every `block` entries of `tensor` along `dim`, `size` of them in all, as a list of views.

    With one block these are simply the first `size` entries. The FFN of a supernet of width D has blocks of D units,
    and a subnet of width E uses the first E of each (released code: 768 wide, cut to E=384 with 1536 units, uses
    units 0-383, 768-1151, 1536-1919 and 2304-2687). Views, because a copy of these weights in every forward pass
    costs a tenth of it, and a copy kept for the next one would go stale unseen when weights are written through
    `.data`, as adapters do.
    """
    if size == tensor.shape[dim]:
        return [tensor]
    if size <= width or width == block:
        return [tensor.narrow(dim, 0, size)]
    blocks = tensor.unflatten(dim, (-1, block)).narrow(dim + 1, 0, width).unbind(dim)
    whole, rest = divmod(size, width)
    return [*blocks[:whole], *([blocks[whole].narrow(dim, 0, rest)] if rest else [])]


class ElasticLayer(ABC):
    """What the elastic layers share."""

    @abstractmethod
    def selected(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of the selected part."""

    @abstractmethod
    def num_selected_parameters(self) -> int:
        """Number of parameters of the plain layer that equals the selected part."""

    def cut_state(self) -> dict[str, torch.Tensor]:
        """State dict of the plain layer that equals the selected part. Tensors may be views of this layer's."""
        weight, bias = self.selected()
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


class ElasticLinear(ElasticLayer, nn.Linear):
    """A linear layer whose leading rows and columns are smaller linear layers (`SLinear` in the released code)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias=bias)
        self.select(in_features, out_features)

    def select(self, in_features: int, out_features: int) -> None:
        """Uses the first `in_features` inputs and `out_features` outputs."""
        self.num_inputs, self.num_outputs = in_features, out_features

    def selected(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (selected out, selected in) and bias (selected out)."""
        bias = None if self.bias is None else self.bias[: self.num_outputs]
        return self.weight[: self.num_outputs, : self.num_inputs], bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (..., selected in) -> (..., selected out)
        return F.linear(hidden_states, *self.selected())

    def num_selected_parameters(self) -> int:
        return self.num_outputs * (self.num_inputs + (self.bias is not None))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, selected={self.num_inputs}->{self.num_outputs}"


class ElasticLinearToBlocks(ElasticLinear):
    """An elastic linear layer whose outputs are taken from blocks as large as its inputs, see `leading`: into an FFN.

    Of each block, as many outputs are used as there are inputs.
    """

    def selected(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        part = (0, self.num_outputs, self.in_features, self.num_inputs)
        weight = torch.cat(leading(self.weight, *part))[:, : self.num_inputs]
        return weight, torch.cat(leading(self.bias, *part))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.num_outputs <= self.num_inputs or self.num_inputs == self.in_features:
            return F.linear(hidden_states, *ElasticLinear.selected(self))  # no blocks, or whole ones
        # one batched product for all whole blocks: a product for each, and a copy to join them, costs a tenth more
        width, inputs = self.num_inputs, hidden_states.flatten(0, -2)
        num_blocks, rest = divmod(self.num_outputs, width)
        weight, bias = (full.unflatten(0, (-1, self.in_features)) for full in (self.weight, self.bias))
        blocks = weight[:num_blocks, :width, :width].transpose(1, 2)
        outputs = torch.baddbmm(bias[:num_blocks, None, :width], inputs.expand(num_blocks, -1, -1), blocks)
        outputs = outputs.transpose(0, 1).flatten(1)
        if rest:
            last = F.linear(inputs, weight[num_blocks, :rest, :width], bias[num_blocks, :rest])
            outputs = torch.cat([outputs, last], dim=-1)
        return outputs.unflatten(0, hidden_states.shape[:-1])


class ElasticLinearFromBlocks(ElasticLinear):
    """An elastic linear layer whose inputs come from blocks as large as its outputs, see `leading`: out of an FFN.

    Of each block, as many inputs are used as there are outputs.
    """

    def selected(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, bias = self.weight[: self.num_outputs], self.bias[: self.num_outputs]
        return torch.cat(leading(rows, 1, self.num_inputs, self.out_features, self.num_outputs), dim=1), bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        blocks = leading(self.weight[: self.num_outputs], 1, self.num_inputs, self.out_features, self.num_outputs)
        inputs = hidden_states.flatten(0, -2).split([block.shape[1] for block in blocks], dim=-1)
        outputs = F.linear(inputs[0], blocks[0], self.bias[: self.num_outputs])
        for part, block in zip(inputs[1:], blocks[1:], strict=True):
            # in place, which autocast leaves to us: a sum of four results would cost a tenth more
            outputs.addmm_(part.to(outputs.dtype), block.t().to(outputs.dtype))
        return outputs.unflatten(0, hidden_states.shape[:-1])


class ElasticNorm(ElasticLayer, nn.Module):
    """What norms share: their affine weights for the leading features."""

    weight: nn.Parameter
    bias: nn.Parameter

    def select(self, num_features: int) -> None:
        self.num_selected = num_features

    def selected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias, each (selected features)."""
        return self.weight[: self.num_selected], self.bias[: self.num_selected]

    def num_selected_parameters(self) -> int:
        return 2 * self.num_selected

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, selected={self.num_selected}"


class ElasticLayerNorm(ElasticNorm, nn.LayerNorm):
    """A layer norm over the leading features: their affine weights, statistics over what is left."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5):
        super().__init__(normalized_shape, eps=eps)
        self.select(normalized_shape)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (..., selected) -> (..., selected)
        return F.layer_norm(hidden_states, (self.num_selected,), *self.selected(), self.eps)


class ElasticGroupNorm(ElasticNorm, nn.GroupNorm):
    """A group norm with a group for each channel, over the leading ones: each has statistics of its own."""

    def __init__(self, num_channels: int, eps: float = 1e-5):
        super().__init__(num_channels, num_channels, eps=eps)
        self.select(num_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (batch, selected, time), shape kept
        return F.group_norm(hidden_states, self.num_selected, *self.selected(), self.eps)


class ElasticBatchNorm1d(ElasticNorm, nn.BatchNorm1d):
    """A batch norm over the leading channels. A channel's statistics do not depend on how many others are used."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.select(num_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (batch, selected, time), shape kept
        mean, variance = self.running_mean[: self.num_selected], self.running_var[: self.num_selected]
        return F.batch_norm(hidden_states, mean, variance, *self.selected(), self.training, self.momentum, self.eps)

    def cut_state(self) -> dict[str, torch.Tensor]:
        return super().cut_state() | {
            "running_mean": self.running_mean[: self.num_selected],
            "running_var": self.running_var[: self.num_selected],
            "num_batches_tracked": self.num_batches_tracked,
        }


class ElasticConv1d(ElasticLayer, nn.Conv1d):
    """A convolution between the leading channels of both sides."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, bias: bool):
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=bias)
        self.select(in_channels, out_channels)

    def select(self, in_channels: int, out_channels: int) -> None:
        """Uses the first `in_channels` inputs and `out_channels` outputs."""
        self.num_inputs, self.num_outputs = in_channels, out_channels

    def selected(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Kernel (selected out, selected in, taps) and bias (selected out)."""
        bias = None if self.bias is None else self.bias[: self.num_outputs]
        return self.weight[: self.num_outputs, : self.num_inputs], bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (batch, selected in, time) -> (..., out, time)
        return self._conv_forward(hidden_states, *self.selected())

    def num_selected_parameters(self) -> int:
        return self.num_outputs * (self.num_inputs * self.kernel_size[0] + (self.bias is not None))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, selected={self.num_inputs}->{self.num_outputs}"


class PositionalConv1d(nn.Conv1d):
    """The grouped position convolution of a cut model, right in bfloat16 too.

    Where a CPU has matrix tiles (AMX), oneDNN's grouped convolutions of long kernels in bfloat16 are wrong if a group
    has fewer than 16 channels (torch 2.13: by as much as the output itself; with AVX-512 alone they are right). These
    are computed in single precision.
    """

    def __init__(self, num_channels: int, kernel_size: int, groups: int):
        super().__init__(num_channels, num_channels, kernel_size, padding=kernel_size // 2, groups=groups)

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else input.dtype
        if not input.is_cpu or dtype is not torch.bfloat16 or weight.shape[1] >= 16:
            return super()._conv_forward(input, weight, bias)
        with torch.autocast("cpu", enabled=False):
            single = None if bias is None else bias.float()
            return super()._conv_forward(input.float(), weight.float(), single).to(dtype)


class ElasticPositionalConv1d(ElasticLayer, PositionalConv1d):
    """The grouped position convolution, cut to its leading channels. The number of groups stays.

    Under weight norm the norm is taken over the *full* kernel and the result is cut, as in the released code. So
    training a narrow subnet also moves the rest of `original1` a little, through that norm; and the cut layer stores
    a new gain, because the norm of a cut kernel is not the cut of the norm.
    """

    def __init__(self, num_channels: int, kernel_size: int, groups: int):
        super().__init__(num_channels, kernel_size, groups)
        self.select(num_channels)

    def select(self, num_channels: int) -> None:
        self.num_selected = num_channels

    def selected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Kernel (selected, selected / groups, taps) and bias (selected)."""
        kernel = self.weight[: self.num_selected, : self.num_selected // self.groups]
        return kernel, self.bias[: self.num_selected]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (batch, selected, time), one frame longer
        return self._conv_forward(hidden_states, *self.selected())

    @property
    def has_weight_norm(self) -> bool:
        return hasattr(self, "parametrizations")

    def cut_state(self) -> dict[str, torch.Tensor]:
        if not self.has_weight_norm:
            return super().cut_state()
        gain, direction = self.parametrizations.weight.original0, self.parametrizations.weight.original1
        cut = direction[: self.num_selected, : self.num_selected // self.groups]
        norm, cut_norm = (torch.linalg.vector_norm(kernel, dim=(0, 1), keepdim=True) for kernel in (direction, cut))
        return {
            "bias": self.bias[: self.num_selected],
            "parametrizations.weight.original0": gain * cut_norm / norm,
            "parametrizations.weight.original1": cut,
        }

    def num_selected_parameters(self) -> int:
        taps = self.kernel_size[0]
        kernel = self.num_selected * (self.num_selected // self.groups) * taps
        return kernel + self.num_selected + (taps if self.has_weight_norm else 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, selected={self.num_selected}"


class ElasticLayerList(nn.ModuleList):
    """All layers of the supernet. Iterating gives those the selected subnet keeps; indices and `len` count them
    all."""

    def __init__(self, modules: Iterable[nn.Module]):
        super().__init__(modules)
        self.select(tuple(range(len(self))))

    def select(self, layers: tuple[int, ...]) -> None:
        """Keeps these (0-based), in this order."""
        self.kept = layers

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self[layer] for layer in self.kept])

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}  kept={list(self.kept)} of {len(self)}\n)"


def share_weights(module: nn.Module) -> nn.Module:
    """The same layers over the same parameters and buffers, whose elastic layers select for themselves."""
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    children = module._modules.items()
    twin.__dict__["_modules"] = {name: None if child is None else share_weights(child) for name, child in children}
    return twin


def selected_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules right below `module`, as its cut form has them: layers that are not selected are left out."""
    if isinstance(module, ElasticLayerList):
        return ((str(index), layer) for index, layer in enumerate(module))
    return iter(module.named_children())


def cut_state(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """State dict of the cut form of `module`: what its elastic layers select, and everything of its other layers."""
    if isinstance(module, ElasticLayer):
        return {prefix + name: tensor for name, tensor in module.cut_state().items()}
    state = {prefix + name: tensor for name, tensor in module.named_parameters(recurse=False)}
    state |= {prefix + name: tensor for name, tensor in module.named_buffers(recurse=False)}
    for name, child in selected_children(module):
        state |= cut_state(child, f"{prefix}{name}.")
    return state


def num_selected_parameters(module: nn.Module) -> int:
    """Number of parameters of the cut form of `module`."""
    if isinstance(module, ElasticLayer):
        return module.num_selected_parameters()
    own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return own + sum(num_selected_parameters(child) for _, child in selected_children(module))
