"""Attention over a packed cache head by head, each as any prompt's."""

import torch

from mminfer_kernels.prompt_attention.reference import prompt_attention, rows_first


@torch.no_grad()
def packed_prompt_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    query_index: torch.Tensor | None,
    log_mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `mminfer_kernels.packed_prompt_attention`."""
    if q.numel() == 0:
        return rows_first(torch.empty_like(q))
    out = []
    for q_heads, start, count in zip(q.chunk(len(first), 1), first.tolist(), lengths.tolist(), strict=True):
        k, v = (x[None, None, start : start + count] for x in (keys, values))
        index = None if query_index is None else query_index + count
        mass = None if log_mass is None else log_mass[None, None, start : start + count]
        out.append(prompt_attention(q_heads, k, v, scale, index, None, mass))
    return rows_first(torch.cat(out, 1))
