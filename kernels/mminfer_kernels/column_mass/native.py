"""Column mass and power iteration in C++ (`csrc/cpu/attention.cpp`)."""

import ctypes

import torch

from mminfer_kernels.native import DTYPE_CODES, call, pointer
from mminfer_kernels.prompt_attention.native import Scores, Seen, attend, attention_args


def column_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor | None,
    scale: float,
    causal: bool,
    query_index: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `mminfer_kernels.column_mass`; `scale` has the temperature in it."""
    if cu_seqlens is None:
        return attend(q, k, None, scale, Seen(causal, query_index), Scores("mass", k.shape[2], weights))[1]
    lengths = cu_seqlens.diff().tolist()
    votes = [None] * len(lengths) if weights is None else weights.split(lengths, -1)
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), votes, strict=True)
    return torch.cat([column_mass(a, b, w, scale, causal, None) for a, b, w in parts], -1)


def power_iterate(
    q: torch.Tensor, k: torch.Tensor, iterations: int, scale: float, query_index: torch.Tensor | None
) -> torch.Tensor:
    """See `mminfer_kernels.power_iterate`; `scale` has the temperature in it."""
    shape = (*q.shape[:2], k.shape[2])
    if iterations == 0:
        return torch.full(shape, 1 / max(k.shape[2], 1), dtype=torch.float32)
    votes = torch.zeros(shape, dtype=torch.float32)
    if q.numel() and k.shape[2]:
        args = attention_args(q, k, scale, query_index)
        args.mass, args.iterations = pointer(votes), iterations
        call("power_iterate", ctypes.byref(args), DTYPE_CODES[q.dtype])
    return votes
