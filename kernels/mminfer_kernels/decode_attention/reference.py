"""Decode attention by PyTorch's scaled_dot_product_attention."""

import torch
from torch.nn.functional import scaled_dot_product_attention


@torch.no_grad()
def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """See `mminfer_kernels.decode_attention`.

    The query heads of a group become rows of one head: each key is then read once a group, which on CPU takes
    about half the time of `enable_gqa=True`.
    """
    batch, heads, queries, size = q.shape
    groups, entries = k.shape[1:3]
    folded = q.reshape(batch, groups, heads // groups * queries, size)
    mask = _visible(queries, entries, starts, q.device)
    if mask is not None:
        mask = mask.repeat(1, 1, heads // groups, 1)  # [B or 1, 1, H / G * S, T]
    return scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale).reshape(q.shape)


def _visible(queries: int, entries: int, starts: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """[B or 1, 1, S, T] bool, or None where every query sees every entry."""
    place = torch.arange(entries, device=device)
    mask = None
    if starts is not None:
        mask = (place >= starts.clamp_max(entries - queries)[:, None])[:, None, None]  # [B, 1, 1, T]
    if queries > 1:
        causal = place <= torch.arange(entries - queries, entries, device=device)[:, None]
        mask = causal[None, None] if mask is None else mask & causal
    return mask
