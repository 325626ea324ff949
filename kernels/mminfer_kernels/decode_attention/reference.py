"""Decode attention by PyTorch: over a padded cache by scaled_dot_product_attention, over a packed one head by head."""

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


@torch.no_grad()
def packed_decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None,
    log_mass: torch.Tensor | None,
    longest: int | None,
) -> torch.Tensor:
    """See `mminfer_kernels.packed_decode_attention`; logits and their softmax are float32 at least."""
    batch, heads, _, size = q.shape
    groups = first.shape[1]
    scale, wide = size**-0.5 if scale is None else scale, torch.promote_types(q.dtype, torch.float32)
    folded = q.reshape(batch, groups, heads // groups, size)
    out = torch.empty_like(folded, memory_format=torch.contiguous_format)
    for b, (starts, counts) in enumerate(zip(first.tolist(), lengths.tolist(), strict=True)):
        for g, (start, count) in enumerate(zip(starts, counts, strict=True)):
            rows = slice(start, start + count)
            logits = folded[b, g].to(wide) * scale @ keys[rows].to(wide).mT
            if log_mass is not None:
                logits += log_mass[rows]
            out[b, g] = logits.softmax(-1).to(q.dtype) @ values[rows]
    return out.reshape(q.shape)
