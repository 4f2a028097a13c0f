"""What jobs do with a model besides loading (`modeling_lighthubert.loading`) and running it: which of its frames are
true and which are padding, which are hidden from it, and a frozen feature encoder that is computed once."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from modeling_lighthubert import LightHubertPreTrainedModel


def has_fixed_feature_encoder(model: LightHubertPreTrainedModel) -> bool:
    """Whether the feature encoder is frozen and its channels are no choice of subnets: its features never change."""
    encoder = model.base_model.get_submodule("feature_extractor")
    is_frozen = not any(parameter.requires_grad for parameter in encoder.parameters())
    return is_frozen and (model.search_space is None or model.search_space.conv_dim is None)


@contextmanager
def computed_once(module: nn.Module, output: torch.Tensor | None) -> Iterator[None]:
    """Temporarily replaces `module.forward` by a constant, so that a frozen module is not recomputed for every subnet.

    Args:
        output: what the module returns inside the block, whatever its inputs. `None` changes nothing.
    """
    if output is None:
        yield
        return
    module.forward = lambda *inputs: output
    try:
        yield
    finally:
        del module.forward


def frame_mask(lengths: torch.Tensor, num_frames: int) -> torch.Tensor:
    """True frames, bool (batch_size, num_frames), of recordings with `lengths` frames, int (batch_size)."""
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


def true_lengths(model: Any, attention_mask: torch.Tensor) -> torch.Tensor:
    """Frames of each recording without its padding, int (batch_size).

    Args:
        model: a HuBERT, or another model of transformers with its feature encoder.
        attention_mask: 1 for samples, 0 for padding, (batch_size, num_samples).
    """
    return model._get_feat_extract_output_lengths(attention_mask.sum(-1))


def true_frames(model: Any, num_frames: int, attention_mask: torch.Tensor) -> torch.Tensor:
    """True frames, bool (batch_size, num_frames), of recordings with the samples of `attention_mask`."""
    return frame_mask(true_lengths(model, attention_mask), num_frames)


def draw_time_mask(
    num_frames: Sequence[int], mask_time_prob: float, mask_time_length: int, seeds: Sequence[int | str]
) -> torch.Tensor:
    """Masked frames, bool (batch_size, largest of `num_frames`): spans that may overlap. Padding is never masked.

    A recording's mask depends on its seed and its length, not on the batch. Source: `compute_mask_indices` of fairseq,
    with `mask_type` static, which the released code uses.

    Args:
        num_frames: of each recording, without padding.
        mask_time_prob: share of the frames that the spans would cover if they did not overlap. There are at least two
            spans in a recording that has room for them.
        mask_time_length: frames in a span; shorter recordings are one span.
        seeds: of each recording.
    """
    mask = torch.zeros(len(num_frames), max(num_frames), dtype=torch.bool)
    if mask_time_prob == 0.0:
        return mask
    for row, (count, seed) in enumerate(zip(num_frames, seeds, strict=True)):
        rng = random.Random(seed)
        span = min(mask_time_length, count)
        num_spans = max(2, int(mask_time_prob * count / span + rng.random()))
        for start in rng.sample(range(count - span + 1), min(num_spans, count // span)):
            mask[row, start : start + span] = True
    return mask
