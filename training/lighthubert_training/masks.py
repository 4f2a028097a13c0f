"""Which frames are true and which are padding, and which of them a student does not see."""

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


def frame_mask(lengths: torch.Tensor, num_frames: int) -> torch.Tensor:
    """True frames, bool (batch_size, num_frames), of recordings with `lengths` frames, (batch_size)."""
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


def true_lengths(model: PreTrainedModel, attention_mask: torch.Tensor) -> torch.Tensor:
    """Frames of each recording without its padding, int64 (batch_size), by the samples of `attention_mask`."""
    return model._get_feat_extract_output_lengths(attention_mask.sum(-1))


def true_frames(model: PreTrainedModel, num_frames: int, attention_mask: torch.Tensor) -> torch.Tensor:
    """Which frames are not padding, bool (batch_size, num_frames), by the samples of `attention_mask`."""
    return frame_mask(true_lengths(model, attention_mask), num_frames)


def draw_time_mask(
    num_frames: Sequence[int], mask_time_prob: float, mask_time_length: int, seeds: Sequence[int | str]
) -> torch.Tensor:
    """Frames that are masked, bool (batch_size, most frames).

    Spans of `mask_time_length` frames (shorter in shorter recordings), static, overlapping, at least 2 where there is
    room, to cover up to `mask_time_prob` of the frames: fairseq's, with the released code's settings by default. A
    recording's mask depends on its seed and its length, not on the batch.

    Args:
        num_frames: of each recording, without padding.
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
