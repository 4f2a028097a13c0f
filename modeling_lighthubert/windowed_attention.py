"""Attention within a window of frames, in memory that grows with the length and not with its square."""

from typing import Any

import torch
import torch.nn.functional as F


BLOCK = 64
"""Minimum block length in frames: blocks as short as a narrow window would be many small products."""


def recover_frame_mask(attention_mask: Any) -> torch.Tensor | None:
    """Frames that are not padding, bool (batch_size, num_frames), from the mask of an attention back end.

    Raises:
        ValueError: the back end has masks of its own kind (flex attention).
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError("windows of attention need attn_implementation sdpa, eager or flash_attention_2")
    if attention_mask.ndim == 2:
        return attention_mask.bool()
    first_row = attention_mask[:, 0, 0]  # the first frame is never padding
    return first_row if first_row.dtype == torch.bool else first_row == 0


def windowed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    frame_mask: torch.Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of each frame to itself and `window` frames on either side.

    It equals full attention with a band for its mask wherever a frame is not padding. Frames of padding attend to
    themselves.

    Args:
        query, key, value: (batch_size, num_heads, num_frames, head_dim).
        frame_mask: frames that are not padding, bool (batch_size, num_frames); `None` if none is.
        scale: factor of the products of query and key.
        dropout: probability that an attention weight is dropped.

    Returns:
        (batch_size, num_heads, num_frames, head_dim).
    """
    batch_size, num_heads, num_frames, head_dim = query.shape
    block = max(window, BLOCK)
    num_blocks = -(-num_frames // block)
    missing = num_blocks * block - num_frames

    def in_blocks(states: torch.Tensor, around: int) -> torch.Tensor:
        """(batch_size * num_blocks, num_heads, block and what is around it, head_dim)."""
        states = F.pad(states, (0, 0, around, around + missing)).unfold(2, block + 2 * around, block)
        return states.permute(0, 2, 1, 4, 3).flatten(0, 1)

    positions = torch.arange(-window, block + window, device=query.device)
    distances = positions - positions[window : window + block, None]
    if frame_mask is None:
        frame_mask = torch.ones(1, num_frames, dtype=torch.bool, device=query.device)
    true_keys = F.pad(frame_mask, (window, window + missing)).unfold(1, block + 2 * window, block)
    # every row has its own frame for a key: softmax of a row without keys is NaN
    mask = (distances.abs() <= window) & true_keys[:, :, None] | (distances == 0)
    mask = mask.expand(batch_size, -1, -1, -1).flatten(0, 1)[:, None]
    outputs = F.scaled_dot_product_attention(
        in_blocks(query, 0), in_blocks(key, window), in_blocks(value, window), mask, dropout, scale=scale
    )
    outputs = outputs.unflatten(0, (batch_size, num_blocks)).transpose(1, 2).flatten(2, 3)
    return outputs[:, :, :num_frames]
