"""Prompt attention and its column masses in C++ (`csrc/cpu/attention.cpp`)."""

import ctypes

import torch

from mminfer_kernels.native import DTYPE_CODES, Rows3, call, pointer, rows_contiguous
from mminfer_kernels.prompt_attention import reference

UNITS_A_THREAD = 4  # enough for the last ones to even out


class AttentionArgs(ctypes.Structure):
    """`AttentionArgs` of `csrc/include/mminfer/cpu/attention.h`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "mass", "weights", "places")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "queries", "keys", "head_dim")),
        *((f"{name}_stride", Rows3) for name in ("q", "k", "v", "out", "weight")),
        *((name, ctypes.c_int64) for name in ("window", "causal", "parts", "iterations", "threads")),
        ("scale", ctypes.c_float),
    ]


def prompt_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    query_index: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """See `mminfer_kernels.prompt_attention`."""
    if q.numel() == 0:
        return reference.rows_first(torch.empty_like(q))
    return attend(q, k, v, None, scale, True, query_index, window, with_mass=False)[0]


def prompt_attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor | None,
    scale: float,
    query_index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.prompt_attention_mass`."""
    return attend(q, k, v, weights, scale, True, query_index, None, with_mass=True)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    weights: torch.Tensor | None,
    scale: float,
    causal: bool,
    query_index: torch.Tensor | None,
    window: int | None,
    with_mass: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, H, S, D] if there are values, and masses [B, H, N] if asked for; else empty tensors."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    rows_first = q.new_empty(batch, queries, heads, q.shape[3] if v is not None else 0)  # as the host reads it next
    out = rows_first.transpose(1, 2)
    args = attention_args(q, k, scale, query_index)
    blocks = -(-queries * (heads // k.shape[1]) // 16)
    units = -(-UNITS_A_THREAD * args.threads // max(1, batch * k.shape[1]))
    args.parts = max(1, min(units, blocks)) if with_mass else max(1, blocks)
    args.causal, args.window = causal, window or 0
    mass = q.new_zeros(args.parts if with_mass else 0, batch, heads, keys, dtype=torch.float32)
    if queries and keys and batch:
        kept = []  # tensors whose memory the call reads
        if v is not None:
            v = rows_contiguous(v)
            args.v, args.out, args.v_stride, args.out_stride = pointer(v), pointer(out), Rows3.of(v), Rows3.of(out)
        if weights is not None:
            per_head = (weights[:, None] if weights.dim() == 2 else weights).float().expand(batch, heads, queries)
            kept.append(per_head)
            args.weights, args.weight_stride = pointer(per_head), Rows3.of(per_head)
        if with_mass:
            args.mass = pointer(mass)
        call("prompt_attention", ctypes.byref(args), DTYPE_CODES[q.dtype])
    return out, (mass.sum(0) if args.parts > 1 else mass[0]) if with_mass else mass


def attention_args(q: torch.Tensor, k: torch.Tensor, scale: float, query_index: torch.Tensor | None) -> AttentionArgs:
    """What every call needs; the tensors must live until it is over."""
    q, k = rows_contiguous(q), rows_contiguous(k)
    query_index = None if query_index is None else query_index.contiguous()
    args = AttentionArgs(
        q=pointer(q), k=pointer(k), places=pointer(query_index), batch=q.shape[0], heads=q.shape[1],
        groups=k.shape[1], queries=q.shape[2], keys=k.shape[2], head_dim=q.shape[3], q_stride=Rows3.of(q),
        k_stride=Rows3.of(k), causal=1, parts=1, iterations=0, threads=torch.get_num_threads(), scale=scale,
    )  # fmt: skip
    args.tensors = (q, k, query_index)
    return args
