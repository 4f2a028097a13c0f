"""A HuBERT as inference engines want it: the same outputs, from a graph of few and plain operations.

Convolutions of frames are matrix products with constant weights, which engines multiply in 8 bits as well; frames stay
next to each other in memory; the mask of padding is one comparison with the lengths.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.hubert.modeling_hubert import HubertPreTrainedModel

from .configuration_lighthubert import receptive_field
from .modeling_lighthubert import frame_mask


class FrameProduct(nn.Module):
    """A convolution of frames (batch_size, time, in_channels) as one matrix product; the time has to be a multiple of
    the stride. Gives (batch_size, time / stride, out_channels), of which the last frames may reach beyond the end.

    Attributes:
        weight: (taps * in_channels, out_channels).
    """

    def __init__(self, convolution: nn.Conv1d):
        super().__init__()
        self.taps, self.stride = convolution.kernel_size[0], convolution.stride[0]
        self.weight = nn.Parameter(convolution.weight.permute(2, 1, 0).flatten(0, 1).contiguous())
        self.bias = convolution.bias

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        batch_size, _, channels = frames.shape
        rows = frames.reshape(batch_size, -1, self.stride * channels)
        if further := (self.taps - self.stride) * channels:  # taps that reach into the next row
            rows = torch.cat([rows, F.pad(rows[:, 1:, :further], (0, 0, 0, 1))], dim=-1)
        outputs = rows @ self.weight
        return outputs if self.bias is None else outputs + self.bias


class NormOverTime(nn.Module):
    """Group norm with a group for each channel, of frames (batch_size, time, channels)."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        centred = frames - frames.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        return centred * (torch.rsqrt(variance + self.eps) * self.weight) + self.bias


class ProductFeatureEncoder(nn.Module):
    """HuBERT's feature encoder: from audio (batch_size, num_samples) to (batch_size, channels, frames)."""

    def __init__(self, encoder: Any, config: Any):
        super().__init__()
        layers = list(encoder.conv_layers)
        self.products = nn.ModuleList(FrameProduct(layer.conv) for layer in layers)
        self.norms = nn.ModuleList(getattr(layer, "layer_norm", nn.Identity()) for layer in layers)
        self.activation = layers[0].activation
        self.field, self.hop = receptive_field(config)
        first, norm = layers[0].conv, self.norms[0]
        self.first_taps, self.first_stride = first.kernel_size[0], first.stride[0]
        self.over_time = isinstance(norm, nn.GroupNorm)
        if isinstance(norm, nn.GroupNorm):
            self.norms[0] = NormOverTime(norm)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        num_samples = input_values.shape[1]
        # `-num_samples % hop`, written so that exporters follow it for any length
        padding = self.hop - 1 - (num_samples - 1) % self.hop
        frames = F.pad(input_values, (0, padding)).unsqueeze(-1)
        for number, (product, norm) in enumerate(zip(self.products, self.norms, strict=True)):
            frames = product(frames)
            if number == 0 and self.over_time:  # over those frames alone that do not reach into the padding
                true = (num_samples - self.first_taps) // self.first_stride + 1
                frames = F.pad(norm(frames[:, :true]), (0, 0, 0, frames.shape[1] - true))
            else:
                frames = norm(frames)
            frames = self.activation(frames)
        return frames[:, : (num_samples - self.field) // self.hop + 1].transpose(1, 2)


class MaskedEncoder(nn.Module):
    """The transformer of a HuBERT; frames of padding are zeros before it, and no frame attends to them.

    Args:
        norm_first: whether the last norm comes after the layers, not before them.
    """

    def __init__(self, encoder: Any, norm_first: bool):
        super().__init__()
        self.position, self.norm, self.layers = encoder.pos_conv_embed, encoder.layer_norm, encoder.layers
        self.norm_first = norm_first

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> BaseModelOutput:
        is_true = attention_mask.to(hidden_states.dtype)
        hidden_states = hidden_states * is_true.unsqueeze(-1)
        hidden_states = hidden_states + self.position(hidden_states)
        hidden_states = hidden_states if self.norm_first else self.norm(hidden_states)
        scores = ((1 - is_true) * torch.finfo(hidden_states.dtype).min)[:, None, None]
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=scores)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states) if self.norm_first else hidden_states)


def as_inference_graph(model: HubertPreTrainedModel) -> None:
    """Replaces parts of a cut model, or a stock HuBERT, in place. It can then be run and exported, not saved.

    Its input needs an `attention_mask`. Convolutions with kernels longer than two strides stay as they are.
    """
    base: Any = model.base_model
    config: Any = base.config
    reaches = all(k <= 2 * s for k, s in zip(config.conv_kernel, config.conv_stride, strict=True))
    if reaches:
        base.feature_extractor = ProductFeatureEncoder(base.feature_extractor, config)
    base.encoder = MaskedEncoder(base.encoder, config.do_stable_layer_norm)
    model.set_attn_implementation("eager")
    field, hop = receptive_field(config)

    def true_frames(num_frames: int, attention_mask: torch.Tensor) -> torch.Tensor:
        return frame_mask((attention_mask.sum(-1) - field) // hop + 1, num_frames)

    for each in {id(part): part for part in (model, base)}.values():
        setattr(each, "_get_feature_vector_attention_mask", true_frames)  # noqa: B010, mypy knows it as a method
