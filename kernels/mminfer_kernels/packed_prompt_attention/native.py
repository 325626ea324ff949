"""Prompt attention over a packed cache in C++ (`csrc/cpu/attention.cpp`): all heads in one call."""

import torch

from mminfer_kernels.native import rows_contiguous
from mminfer_kernels.prompt_attention.native import Seen, attend
from mminfer_kernels.prompt_attention.reference import rows_first


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
    groups = len(first)
    k, v = (rows_contiguous(x).expand(1, groups, -1, -1) for x in (keys, values))  # all rows, of which each has some
    mass = None if log_mass is None else log_mass.expand(1, groups, -1)
    seen = Seen(query_index=query_index, first=first.contiguous(), lengths=lengths.contiguous())
    return attend(q, k, v, scale, seen, log_mass=mass)[0]
