"""Prompt attention, its column masses and peaks in C++ (`csrc/cpu/attention.cpp`)."""

import ctypes
from typing import NamedTuple

import torch

from mminfer_kernels.native import DTYPE_CODES, Rows3, call, pointer, rows_contiguous
from mminfer_kernels.prompt_attention import reference

UNITS_A_THREAD = 4  # enough for the last ones to even out


class AttentionArgs(ctypes.Structure):
    """`AttentionArgs` of `csrc/include/mminfer/cpu/attention.h`."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "k", "v", "out", "mass", "peak", "weights", "log_mass", "places", "first", "lengths")
        ),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "queries", "keys", "head_dim")),
        *((f"{name}_stride", Rows3) for name in ("q", "k", "v", "out", "weight", "log_mass")),
        *((name, ctypes.c_int64) for name in ("window", "causal", "parts", "iterations", "threads", "counted")),
        ("scale", ctypes.c_float),
    ]


class Seen(NamedTuple):
    """Which keys a query sees: all of its head's up to its own place, unless told.

    Args:
        causal: False: those behind it as well.
        query_index: [S], the places; None: the last ones. Where there are segments, they count from the end.
        window: the last so many alone.
        first, lengths: [G], segments that the heads have of the rows; None: each has all.
    """

    causal: bool = True
    query_index: torch.Tensor | None = None
    window: int | None = None
    first: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


class Scores(NamedTuple):
    """What is told of the probabilities beside the attention or without it.

    Args:
        name: "mass" [B, H, N], summed over queries; "peak" [B, G, counted], the largest of a group.
        keys: N, or `counted`.
        weights: votes of the queries, [B, H, S] or [B, S]; None: 1.
    """

    name: str
    keys: int
    weights: torch.Tensor | None = None


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
    if q.numel() == 0:
        return reference.rows_first(torch.empty_like(q))
    return attend(q, k, v, scale, Seen(query_index=query_index, window=window), log_mass=log_mass)[0]


def prompt_attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor | None,
    scale: float,
    query_index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.prompt_attention_mass`."""
    return attend(q, k, v, scale, Seen(query_index=query_index), Scores("mass", k.shape[2], weights))


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
    return attend(q, k, v, scale, Seen(query_index=query_index), Scores("peak", counted), log_mass)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    scale: float,
    seen: Seen,
    scores: Scores | None = None,
    log_mass: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, H, S, D] if there are values, and scores if asked for; else empty tensors."""
    batch, heads, queries, _ = q.shape
    rows_first = q.new_empty(batch, queries, heads, q.shape[3] if v is not None else 0)  # as the host reads it next
    out = rows_first.transpose(1, 2)
    args = attention_args(q, k, scale, seen.query_index)
    blocks = -(-queries * (heads // k.shape[1]) // 16)
    units = -(-UNITS_A_THREAD * args.threads // max(1, batch * k.shape[1]))
    args.parts = max(1, min(units, blocks)) if scores else max(1, blocks)
    args.causal, args.window = seen.causal, seen.window or 0
    args.first, args.lengths = pointer(seen.first), pointer(seen.lengths)
    columns = _columns(args, q, scores)
    if queries and k.shape[2] and batch:
        kept = []  # tensors whose memory the call reads
        if v is not None:
            v = rows_contiguous(v)
            args.v, args.out, args.v_stride, args.out_stride = pointer(v), pointer(out), Rows3.of(v), Rows3.of(out)
        if scores and scores.weights is not None:
            weights = scores.weights
            per_head = (weights[:, None] if weights.dim() == 2 else weights).float().expand(batch, heads, queries)
            kept.append(per_head)
            args.weights, args.weight_stride = pointer(per_head), Rows3.of(per_head)
        if log_mass is not None:
            log_mass = log_mass.float()
            args.log_mass, args.log_mass_stride = pointer(log_mass), Rows3.of(log_mass)
        call("prompt_attention", ctypes.byref(args), DTYPE_CODES[q.dtype])
    if scores is None or args.parts == 1:
        return out, columns[0] if scores else columns
    return out, columns.sum(0) if scores.name == "mass" else columns.amax(0)


def _columns(args: AttentionArgs, q: torch.Tensor, scores: Scores | None) -> torch.Tensor:
    """Zeros for the scores of each of the parts, which `args` is told of; no element where none are asked for."""
    if scores is None:
        return q.new_zeros(0, dtype=torch.float32)
    heads = args.heads if scores.name == "mass" else args.groups
    columns = q.new_zeros(args.parts, args.batch, heads, scores.keys, dtype=torch.float32)
    args.counted = scores.keys
    setattr(args, scores.name, pointer(columns))
    return columns


def attention_args(q: torch.Tensor, k: torch.Tensor, scale: float, query_index: torch.Tensor | None) -> AttentionArgs:
    """What every call needs; the tensors must live until it is over."""
    q, k = rows_contiguous(q), rows_contiguous(k)
    query_index = None if query_index is None else query_index.contiguous()
    args = AttentionArgs(
        q=pointer(q), k=pointer(k), places=pointer(query_index), batch=q.shape[0], heads=q.shape[1],
        groups=k.shape[1], queries=q.shape[2], keys=k.shape[2], head_dim=q.shape[3], q_stride=Rows3.of(q),
        k_stride=Rows3.of(k), causal=1, parts=1, iterations=0, threads=torch.get_num_threads(), counted=k.shape[2],
        scale=scale,
    )  # fmt: skip
    args.tensors = (q, k, query_index)
    return args
