"""Prompt attention over a packed cache in Triton: the kernel of `prompt_attention`, told where heads begin and end."""

import torch

from mminfer_kernels.launching import dense_rows, interpretable
from mminfer_kernels.prompt_attention.reference import rows_first
from mminfer_kernels.prompt_attention.triton_kernel import attention
from mminfer_kernels.tiles.triton_kernel import Ranges, in_base_2


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
    given, groups = q.dtype, len(first)
    q, keys, values = (dense_rows(x) for x in interpretable(q, keys, values))
    k, v = (x.expand(1, groups, -1, -1) for x in (keys, values))
    mass = in_base_2(log_mass)
    mass = None if mass is None else mass.expand(1, groups, -1)
    ranges = Ranges(hi=None if query_index is None else (query_index + 1).int())
    segments = first.contiguous(), lengths.contiguous()
    return attention(q, k, v, None, scale, ranges, mass, segments).to(given)
