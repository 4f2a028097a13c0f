"""The convolutions at the bottom of LightHuBERT: HuBERT's, as matrix products where that is faster, and elastic."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder

from .configuration_lighthubert import LightHubertConfig, receptive_field
from .elastic import ElasticConv1d, ElasticGroupNorm, ElasticLayerNorm


VALUES_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}
"""Activation budget of the first convolution under `no_grad`; longer input is encoded in chunks.

CPU: 2 ** 21 values (8 MiB in fp32), below glibc's largest mmap threshold of 32 MiB: malloc returns larger arrays to
the system (mallopt(3), M_MMAP_THRESHOLD), which clears every page of the next one anew. Other devices: 2 ** 26 values,
about 40 s of audio at full width; half an hour in one piece would take 12 GB.
"""


class FrameConv1d(nn.Conv1d):
    """A strided convolution of frames that lie in memory one after another, as matrix products over rows of them.

    A row has `stride` frames. All rows are multiplied with the first `stride` taps of the kernel, and with the taps
    that reach into the next row: nothing is copied. The time has to be a multiple of the stride. For the last frames
    of the output the kernel reaches beyond the recording: they have to be dropped.

    With `rows` set to `False` it is torch's convolution, for any time, with as many frames.
    """

    rows = True

    def _conv_forward(  # (batch, in, time) -> (batch, out, time / stride)
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if not self.rows:
            return super()._conv_forward(input, weight, bias)
        batch_size, channels, _ = input.shape
        taps, stride = self.kernel_size[0], self.stride[0]
        rows = input.transpose(1, 2).reshape(-1, stride * channels)
        if channels == 1:  # copies of a waveform cost less than products with so few columns
            rows = torch.cat([rows.roll(-number, 0) for number in range(math.ceil(taps / stride))], dim=1)[:, :taps]
        first, *others = weight.transpose(1, 2).flatten(1).split(rows.shape[1], dim=1)
        outputs = F.linear(rows[:, : first.shape[1]], first, bias)
        for number, block in enumerate(others, start=1):  # in place, which autocast leaves to us
            inputs = rows[number:, : block.shape[1]].to(outputs.dtype)
            outputs[:-number].addmm_(inputs, block.t().to(outputs.dtype))
        return outputs.reshape(batch_size, -1, weight.shape[0]).transpose(1, 2)


class ElasticFrameConv1d(ElasticConv1d, FrameConv1d):
    """`FrameConv1d` between the leading channels of both sides."""


class LightHubertFeatureEncoder(HubertFeatureEncoder):
    """HuBERT's convolutions, elastic in a supernet. With layer norm, which is over channels, these lie next to each
    other in memory, where HuBERT's own reorders them twice in each layer. Group norm is over time, and has no such
    need.
    """

    def __init__(self, config: LightHubertConfig):
        super().__init__(config)
        self.config, self.has_frames_in_rows = config, config.feat_extract_norm == "layer"
        self.num_channels = config.conv_dim[0]
        conv, norm = (
            (ElasticFrameConv1d, ElasticLayerNorm) if self.has_frames_in_rows else (ElasticConv1d, ElasticGroupNorm)
        )
        sizes = zip((1, *config.conv_dim), config.conv_dim, config.conv_kernel, config.conv_stride)
        for layer, size in zip(self.conv_layers, sizes, strict=True):
            if config.search_space is not None:
                layer.conv = conv(*size, bias=config.conv_bias)
                if hasattr(layer, "layer_norm"):
                    layer.layer_norm = norm(layer.conv.out_channels)
            elif self.has_frames_in_rows:
                layer.conv = FrameConv1d(*size, bias=config.conv_bias)

    def select(self, conv_dim: Sequence[int]) -> None:
        """Uses the first channels of each convolution, so many."""
        self.num_channels = conv_dim[0]
        layer: Any
        for layer, in_channels, out_channels in zip(self.conv_layers, (1, *conv_dim), conv_dim):
            layer.conv.select(in_channels, out_channels)
            if hasattr(layer, "layer_norm"):
                layer.layer_norm.select(out_channels)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:  # (batch, samples) -> (batch, channels, frames)
        if not self.has_frames_in_rows:
            return super().forward(input_values)
        if self._is_looked_into():
            return self._plain_frames(input_values)
        values_at_once = VALUES_AT_ONCE.get(input_values.device.type, VALUES_AT_ONCE["cuda"])
        samples_at_once = values_at_once // self.num_channels * self.config.conv_stride[0]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or input_values.numel() <= samples_at_once:
            return self._frames(input_values)
        batch_size, num_samples = input_values.shape
        if batch_size > 1:
            parts = input_values.split(max(1, samples_at_once // num_samples))
            return torch.cat([self.forward(part) for part in parts])  # hooks are for the whole
        # a frame depends on a few samples only
        samples_of_first, samples_per_frame = receptive_field(self.config)
        step = max(1, samples_at_once // samples_per_frame) * samples_per_frame
        starts = range(0, max(1, num_samples - samples_of_first + 1), step)
        length = step + samples_of_first - samples_per_frame
        return torch.cat([self._frames(input_values[:, start : start + length]) for start in starts], dim=-1)

    def _is_looked_into(self) -> bool:
        """Whether anyone sees what goes in and out of a convolution: a tracer, or a hook."""
        if torch.jit.is_tracing():
            return True
        if torch.compiler.is_compiling():
            return False
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return any(getattr(module, name) for module in self.conv_layers.modules() for name in hooks)

    def _plain_frames(self, input_values: torch.Tensor) -> torch.Tensor:
        """The whole at once, with as many frames in each layer as in HuBERT."""
        convolutions = [module for module in self.conv_layers.modules() if isinstance(module, FrameConv1d)]
        for convolution in convolutions:
            convolution.rows = False
        try:
            return super().forward(input_values)
        finally:
            for convolution in convolutions:
                convolution.rows = True

    def _frames(self, input_values: torch.Tensor) -> torch.Tensor:
        num_samples, samples_per_frame = input_values.shape[1], 1
        num_frames = num_samples
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            num_frames = (num_frames - kernel) // stride + 1
            samples_per_frame *= stride
        # `-num_samples % samples_per_frame`, written so that exporters follow it for any length
        padding = samples_per_frame - 1 - (num_samples - 1) % samples_per_frame
        return super().forward(F.pad(input_values, (0, padding))).narrow(-1, 0, num_frames)
