"""Attention to the frames near by, in memory that grows with the length and not with its square."""

from typing import Any

import torch
import torch.nn.functional as F


BLOCK = 64
"""Frames that are computed together at least: narrow windows alone would be many small products."""


def true_frames(attention_mask: Any) -> torch.Tensor | None:
    """Which frames are not padding, bool (batch_size, num_frames), from the mask of an attention back end.

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
    is_true_frame: torch.Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """What attention gives if each frame sees `window` frames on either side of it, and itself.

    The same as full attention with a band as its mask, where a frame is no padding. Frames of padding see themselves.

    Args:
        query, key, value: (batch_size, num_heads, num_frames, head_dim).
        is_true_frame: bool (batch_size, num_frames), which frames are not padding; `None` if all are true.
        scale: of the products.

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
    near = positions - positions[window : window + block, None]
    if is_true_frame is None:
        is_true_frame = torch.ones(1, num_frames, dtype=torch.bool, device=query.device)
    true_keys = F.pad(is_true_frame, (window, window + missing)).unfold(1, block + 2 * window, block)
    sees = (near.abs() <= window) & true_keys[:, :, None] | (near == 0)  # of a row without keys softmax is NaN
    sees = sees.expand(batch_size, -1, -1, -1).flatten(0, 1)[:, None]
    outputs = F.scaled_dot_product_attention(
        in_blocks(query, 0), in_blocks(key, window), in_blocks(value, window), sees, dropout, scale=scale
    )
    outputs = outputs.unflatten(0, (batch_size, num_blocks)).transpose(1, 2).flatten(2, 3)
    return outputs[:, :, :num_frames]
