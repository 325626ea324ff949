"""Prompt attention in Triton: flash attention's forward pass, whose log-sum-exp mass and peak of columns start from."""

from typing import Any

import torch
import triton
import triton.language as tl

from mminfer_kernels.column_mass.triton_kernel import mass_of, peak_of
from mminfer_kernels.launching import configured, dense_rows, interpretable, launch, strides, tile_fits
from mminfer_kernels.prompt_attention.reference import rows_first
from mminfer_kernels.tiles.triton_kernel import (
    LOG2_E,
    Ranges,
    attention_arguments,
    in_base_2,
    key_blocks,
    key_range,
    load_rows,
    ranges_of,
)


@triton.jit
def attend_to(
    b_out, b_max, b_sum, b_q, p_k, p_v, p_m, b_lo, b_hi, begin, end, stride_kn, stride_vn, N, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take keys `begin .. end - 1` into the rows' output, maximum and sum; not MASKED: all rows see all of them."""
    for start in tl.range(begin, end, BLOCK_N):
        keys = tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, start, keys, stride_kn, N, D, BLOCK_D, MASKED)
        b_s = tl.dot(b_q, b_k.trans(), input_precision="ieee") * scale  # [BLOCK_S, BLOCK_N]
        if p_m is not None:
            b_s += tl.load(p_m + start + keys, mask=start + keys < N if MASKED else None)[None, :]
        if MASKED:
            seen = start + keys[None, :]
            b_s = tl.where((seen >= b_lo[:, None]) & (seen < b_hi[:, None]), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_shrink = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = load_rows(p_v, start, keys, stride_vn, N, D, BLOCK_D, MASKED)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision="ieee")
        b_max = b_new
    return b_out, b_max, b_sum


def fits(arguments: dict[str, Any]) -> bool:
    """Queries stay; keys and values stream. The output takes half of a thread's registers at most."""
    weighed = arguments.get("log_mass") is not None  # it takes registers of its own
    room = 32 if weighed and arguments["BLOCK_D"] <= 128 else 64
    if arguments["BLOCK_S"] * arguments["BLOCK_D"] > room * 32 * arguments["num_warps"]:
        return False
    sizes = arguments["BLOCK_S"], 2 * arguments["BLOCK_N"]
    return tile_fits(arguments, arguments["q"], *sizes, arguments["BLOCK_D"])


@configured(
    [
        ({"BLOCK_S": 128, "BLOCK_N": 64}, 8, 3),
        ({"BLOCK_S": 128, "BLOCK_N": 128}, 8, 2),
        ({"BLOCK_S": 64, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK_S": 64, "BLOCK_N": 32}, 8, 2),
        ({"BLOCK_S": 64, "BLOCK_N": 32}, 4, 2),
        ({"BLOCK_S": 16, "BLOCK_N": 16}, 4, 2),
    ],
    lengths=("N",),
    interpreted_blocks={"BLOCK_S": 32, "BLOCK_N": 32},
    fits=fits,
)
@triton.jit(do_not_specialize=["S", "N", "stride_lb", "stride_lh", "stride_mb", "stride_mg"])
def prompt_attention_fwd_kernel(
    q, k, v, log_mass, out, lse, lo, hi, first, lengths, scale,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    stride_mb, stride_mg, stride_ob, stride_oh, stride_os, stride_lb, stride_lh,
    H, repeat, S, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`softmax(q k^T * scale) v` over the keys each row sees. Grid: row blocks, the longest first; batch and heads.

    With `first` and `lengths` each key head has a segment of the N rows, and `hi` counts from the end of it.
    """
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_S
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    rows, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    b_q = load_rows(q + batch * stride_qb + head * stride_qh, row, rows, stride_qs, S, D, BLOCK_D, True)
    p_k = k + batch * stride_kb + head // repeat * stride_kg
    p_v = v + batch * stride_vb + head // repeat * stride_vg
    p_m = None if log_mass is None else log_mass + batch * stride_mb + head // repeat * stride_mg
    keys, zero = N, 0
    if lengths is not None:
        begun, zero = tl.load(first + head // repeat), tl.load(lengths + head // repeat).to(tl.int32)
        keys, p_k, p_v = zero, p_k + begun * stride_kn, p_v + begun * stride_vn
        p_m = None if p_m is None else p_m + begun
    begin, full_end, end = key_blocks(lo, hi, row, S, keys, True, BLOCK_S, BLOCK_N, zero)
    b_lo, b_hi = key_range(lo, hi, row + rows, S, keys, True, zero)
    if lengths is not None:  # rows that are not there are not read: NaN
        _, least = key_range(lo, hi, 0, S, keys, True, zero)
        there = (begun >= 0) & (begun + keys <= N) & (least > 0)
        full_end, end = tl.where(there, full_end, 0), tl.where(there, end, 0)
    b_max = tl.full([BLOCK_S], -1e30, tl.float32)  # finite: a block that shows a row no key leaves no NaN
    b_sum = tl.zeros([BLOCK_S], tl.float32)
    b_out = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    if lo is None:
        b_out, b_max, b_sum = attend_to(
            b_out, b_max, b_sum, b_q, p_k, p_v, p_m, b_lo, b_hi, begin, full_end, stride_kn, stride_vn, keys, scale,
            D, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    b_out, b_max, b_sum = attend_to(
        b_out, b_max, b_sum, b_q, p_k, p_v, p_m, b_lo, b_hi, full_end, end, stride_kn, stride_vn, keys, scale,
        D, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip
    b_out = b_out / b_sum[:, None]
    p_out = out + batch * stride_ob + head * stride_oh + tl.cast(row, tl.int64) * stride_os
    m_out = (row + rows[:, None] < S) & (dims[None, :] < D)
    tl.store(p_out + rows[:, None] * stride_os + dims[None, :], b_out.to(out.dtype.element_ty), mask=m_out)
    if lse is not None:
        p_lse = lse + batch * stride_lb + head * stride_lh + row + rows
        tl.store(p_lse, b_max + tl.log2(b_sum), mask=row + rows < S)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    ranges: Ranges,
    log_mass: torch.Tensor | None = None,
    segments: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    """[B, H, S, D] in q's dtype; writes the rows' base-2 log-sum-exp into `lse` [B, H, S].

    `log_mass` is of `in_base_2`. With `segments`, first rows and lengths [G], `ranges.hi` counts from the end of each.
    """
    out = rows_first(torch.empty_like(q))
    launch(
        prompt_attention_fwd_kernel,
        lambda meta: (triton.cdiv(q.shape[2], meta["BLOCK_S"]), q.shape[0] * q.shape[1]),
        {
            "q": q,
            "k": k,
            "v": v,
            "log_mass": log_mass,
            "out": out,
            "lse": lse,
            "lo": ranges.lo,
            "hi": ranges.hi,
            "first": segments[0],
            "lengths": segments[1],
        },
        **attention_arguments(q, k),
        **strides(v, "vbgn"),
        **strides(log_mass, "mbg"),
        **strides(out, "obhs"),
        **strides(lse, "lbh"),
        scale=scale * LOG2_E,
    )
    return out


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
    if q.numel() == 0:
        return rows_first(torch.empty_like(q))
    queries, keys, given = q.shape[2], k.shape[2], q
    lo, hi = None, None if query_index is None else query_index + 1
    if window is not None and window < keys:
        hi = torch.arange(keys - queries + 1, keys + 1, device=q.device) if hi is None else hi
        lo = (hi - window).clamp_min(0)
    q, k, v = (dense_rows(x) for x in interpretable(q, k, v))
    return attention(q, k, v, None, scale, ranges_of(keys, lo, hi), in_base_2(log_mass)).to(given.dtype)


@torch.no_grad()
def prompt_attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor | None,
    scale: float,
    query_index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.prompt_attention_mass`: the attention, then one pass over columns from its log-sum-exp."""
    if q.numel() == 0:
        mass = torch.zeros(*q.shape[:2], k.shape[2], dtype=torch.float32, device=q.device)
        return rows_first(torch.empty_like(q)), mass
    given = q.dtype
    q, k, v = (dense_rows(x) for x in interpretable(q, k, v))
    out, lse, ranges = _attention_and_lse(q, k, v, scale, query_index)
    return out.to(given), mass_of(q, k, lse, weights, scale, True, ranges)


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
    """See `mminfer_kernels.prompt_attention_peak`: the attention, then one pass over columns from its log-sum-exp."""
    if q.numel() == 0:
        peak = torch.zeros(*k.shape[:2], counted, dtype=torch.float32, device=q.device)
        return rows_first(torch.empty_like(q)), peak
    given = q.dtype
    q, k, v = (dense_rows(x) for x in interpretable(q, k, v))
    log_mass = in_base_2(log_mass)
    out, lse, ranges = _attention_and_lse(q, k, v, scale, query_index, log_mass)
    return out.to(given), peak_of(q, k, lse, scale, ranges, counted, log_mass)


def _attention_and_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    query_index: torch.Tensor | None,
    log_mass: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Ranges]:
    ranges = ranges_of(k.shape[2], None, None if query_index is None else query_index + 1)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return attention(q, k, v, lse, scale, ranges, log_mass), lse, ranges
