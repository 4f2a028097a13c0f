"""The convolutions at the bottom of LightHuBERT: HuBERT's, as matrix products where that is faster, and elastic."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder

from .configuration_lighthubert import LightHubertConfig
from .elastic import ElasticConv1d, ElasticGroupNorm, ElasticLayerNorm


SAMPLES_AT_ONCE = 30 * 16_000
"""More are heard in pieces, where no gradients are wanted."""


class FrameConv1d(nn.Conv1d):
    """A strided convolution of frames that lie in memory one after another, as matrix products over rows of them.

    A row has `stride` frames. All rows are multiplied with the first `stride` taps of the kernel, and with the taps
    that reach into the next row: nothing is copied. The time has to be a multiple of the stride; for the last frames
    that come out, the kernel reaches beyond the recording, and they are of no use.
    """

    def _conv_forward(  # (batch, in, time) -> (batch, out, time / stride)
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        batch_size, channels, _ = input.shape
        taps, stride = self.kernel_size[0], self.stride[0]
        rows = input.transpose(1, 2).reshape(-1, stride * channels)
        if channels == 1:  # copies of a waveform cost less than products with so few columns
            rows = torch.cat([rows.roll(-number, 0) for number in range(math.ceil(taps / stride))], dim=1)[:, :taps]
        first, *others = weight.transpose(1, 2).flatten(1).split(rows.shape[1], dim=1)
        outputs = F.linear(rows[:, : first.shape[1]], first, bias)
        for number, block in enumerate(others, start=1):
            outputs = outputs + F.linear(rows[:, : block.shape[1]], block).roll(-number, 0)
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
        layer: Any
        for layer, in_channels, out_channels in zip(self.conv_layers, (1, *conv_dim), conv_dim):
            layer.conv.select(in_channels, out_channels)
            if hasattr(layer, "layer_norm"):
                layer.layer_norm.select(out_channels)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:  # (batch, samples) -> (batch, channels, frames)
        if not self.has_frames_in_rows:
            return super().forward(input_values)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or input_values.shape[1] <= SAMPLES_AT_ONCE:
            return self._frames(input_values)
        # frames know nothing of those far away, and of half an hour 12 GB would be in the first convolution alone
        samples_per_frame, samples_of_first = 1, 1
        for kernel, stride in zip(reversed(self.config.conv_kernel), reversed(self.config.conv_stride), strict=True):
            samples_per_frame, samples_of_first = samples_per_frame * stride, (samples_of_first - 1) * stride + kernel
        step = SAMPLES_AT_ONCE // samples_per_frame * samples_per_frame
        overlap = samples_of_first - samples_per_frame
        starts = range(0, input_values.shape[1] - overlap, step)
        pieces = [input_values[:, start : start + step + overlap] for start in starts]
        return torch.cat([self._frames(piece) for piece in pieces if piece.shape[1] >= samples_of_first], dim=-1)

    def _frames(self, input_values: torch.Tensor) -> torch.Tensor:
        num_samples, samples_per_frame = input_values.shape[1], 1
        num_frames = num_samples
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            num_frames = (num_frames - kernel) // stride + 1
            samples_per_frame *= stride
        # `-num_samples % samples_per_frame`, written so that exporters follow it for any length
        padding = samples_per_frame - 1 - (num_samples - 1) % samples_per_frame
        return super().forward(F.pad(input_values, (0, padding))).narrow(-1, 0, num_frames)
