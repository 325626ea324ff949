"""Prompt attention by PyTorch's scaled_dot_product_attention, by blocks of queries where it is not plainly causal."""

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from mminfer_kernels.blocks import block_rows
from mminfer_kernels.column_mass.reference import column_mass, column_peak

BLOCK_ROWS = 512
MASK_ELEMENTS = 1 << 24


@torch.no_grad()
def prompt_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    query_index: torch.Tensor | None,
    window: int | None,
    log_mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `mminfer_kernels.prompt_attention`."""
    queries, keys = q.shape[2], k.shape[2]
    if query_index is None and queries == keys and (window is None or window >= keys) and log_mass is None:
        return rows_first(scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=True))
    if query_index is None:
        query_index = torch.arange(keys - queries, keys, device=q.device)
    return blocked_attention(q, k, v, scale, query_index, window, query_index, log_mass)


@torch.no_grad()
def prompt_attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor | None,
    scale: float,
    query_index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.prompt_attention_mass`."""
    out = prompt_attention(q, k, v, scale, query_index, None)
    return out, column_mass(q, k, weights, scale, True, query_index)


@torch.no_grad()
def prompt_attention_peak(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    query_index: torch.Tensor | None,
    counted: int,
    log_mass: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.prompt_attention_peak`."""
    out = prompt_attention(q, k, v, scale, query_index, None, log_mass)
    return out, column_peak(q, k, scale, query_index, counted, log_mass)


def blocked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    query_index: torch.Tensor,
    window: int | None,
    reach: torch.Tensor,
    log_mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention by blocks of queries, each under a mask over the keys that one of them sees.

    Args:
        q: [B, H, S, D]. k, v: [B, G, N, D].
        scale: factor of the logits.
        query_index: [S] int64, ascending: the place of each query among the keys.
        window: a query sees its last `window` keys only.
        reach: [S] int64: the last key that each query sees, at its place or behind it.
        log_mass: [B, G, N], added to the logits, which are then float32 whatever the dtype; None: 0.
    """
    given = q.dtype
    rows = max(1, min(BLOCK_ROWS, MASK_ELEMENTS // max(1, k.shape[2])))
    if log_mass is not None:  # a mask of each head, which SDPA takes in the dtype of q alone
        log_mass = log_mass.to(torch.promote_types(given, torch.float32)).repeat_interleave(q.shape[1] // k.shape[1], 1)
        q, k, v = (x.to(log_mass.dtype) for x in (q, k, v))
        rows = block_rows(log_mass.nbytes, q.shape[2])
    blocks = []
    for q_block, places, ends in zip(q.split(rows, 2), query_index.split(rows), reach.split(rows), strict=True):
        if len(places) == 0:
            return rows_first(torch.empty_like(q, dtype=given))
        first, last = int(places[0]), int(ends.max())
        start = 0 if window is None else max(0, first - window + 1)
        columns = torch.arange(start, last + 1, device=q.device)
        mask = columns <= ends[:, None]
        if window is not None:
            mask &= columns > places[:, None] - window
        if log_mass is not None:
            mask = torch.where(mask, log_mass[:, :, None, start : last + 1], -math.inf)
        keys, values = k[:, :, start : last + 1], v[:, :, start : last + 1]
        block = scaled_dot_product_attention(q_block, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        blocks.append(block.transpose(1, 2).to(given))
    return torch.cat(blocks, 1).transpose(1, 2)


def rows_first(x: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] laid out as [B, S, H, D], whichever of SDPA's kernels made it; most do so themselves."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
