"""Decode attention in Triton: the cache split over programs, their parts merged by log-sum-exp."""

from typing import Any

import torch
import triton
import triton.language as tl

from mminfer_kernels.launching import autotuned, dense_rows, interpretable, launch, power_of_two, strides, tile_fits
from mminfer_kernels.tiles.triton_kernel import LOG2_E, load_rows

PART_KEYS = 256  # the fewest entries worth a program of their own; a multiple of every BLOCK_N
MOST_PARTS = 64
MOST_ROWS = 64  # query rows of a program: more are taken by further programs


def _fits(arguments: dict[str, Any]) -> bool:
    """Keys and values stream past a few rows."""
    return tile_fits(arguments, arguments["k"], 32, 2 * arguments["BLOCK_N"], arguments["BLOCK_D"])


@autotuned(
    [
        ({"BLOCK_N": 64}, 8, 3),
        ({"BLOCK_N": 64}, 8, 2),
        ({"BLOCK_N": 128}, 8, 2),
        ({"BLOCK_N": 32}, 4, 3),
        ({"BLOCK_N": 32}, 4, 2),
        ({"BLOCK_N": 16}, 4, 2),
    ],
    key=["D", "BLOCK_R"],
    interpreted_blocks={"BLOCK_N": 32},
    fits=_fits,
)
@triton.jit(do_not_specialize=["T", "part_keys"])
def decode_attention_fwd_kernel(
    q, k, v, starts, out, lse, scale,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    stride_op, stride_ob, stride_oh, stride_os, stride_lp, stride_lb, stride_lh,
    G, repeat, S, T, part_keys,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One part of the cache for all query heads of a group. Grid: parts; batch and groups; blocks of query rows.

    Row r of a group is query r % S of its head r // S, so that each key is loaded once for all of them.
    """
    part = tl.program_id(0)
    batch, group = (tl.program_id(1) // G).to(tl.int64), (tl.program_id(1) % G).to(tl.int64)
    rows, dims = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    heads, queries = group * repeat + rows // S, rows % S
    m_r = rows < repeat * S
    m_q = m_r[:, None] & (dims[None, :] < D)
    p_q = q + batch * stride_qb + heads[:, None] * stride_qh + queries[:, None] * stride_qs + dims[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)
    first = 0 if starts is None else tl.load(starts + batch).to(tl.int32)
    begin, end = part * part_keys, tl.minimum((part + 1) * part_keys, T)
    b_last = T - S + queries  # the last entry each row sees
    b_max = tl.full([BLOCK_R], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    keys = tl.arange(0, BLOCK_N)
    p_k, p_v = k + batch * stride_kb + group * stride_kg, v + batch * stride_vb + group * stride_vg
    for start in tl.range(tl.maximum(begin, first // BLOCK_N * BLOCK_N), end, BLOCK_N):
        seen = start + keys
        b_k = load_rows(p_k, start, keys, stride_kn, end, D, BLOCK_D, True)
        b_s = tl.dot(b_q, b_k.trans(), input_precision="ieee") * scale  # [BLOCK_R, BLOCK_N]
        m_s = (seen[None, :] >= first) & (seen[None, :] < end) & (seen[None, :] <= b_last[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_shrink = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = load_rows(p_v, start, keys, stride_vn, end, D, BLOCK_D, True)
        b_v = tl.where(seen[:, None] >= first, b_v, 0.0)  # what lies before a row starts may be NaN
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision="ieee")
        b_max = b_new
    b_total = tl.where(b_sum > 0, b_sum, 1.0)  # a part may lie before the row starts
    b_out = b_out / b_total[:, None]
    p_out = out + part.to(tl.int64) * stride_op + batch * stride_ob + heads[:, None] * stride_oh
    p_out = p_out + queries[:, None] * stride_os + dims[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_q)
    if lse is not None:
        p_lse = lse + part.to(tl.int64) * stride_lp + batch * stride_lb + heads * stride_lh + queries
        tl.store(p_lse, tl.where(b_sum > 0, b_max + tl.log2(b_total), float("-inf")), mask=m_r)


@triton.jit
def decode_merge_fwd_kernel(
    parts, lse, out, stride_pp, stride_pr, stride_lp, count,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The mean of the parts' outputs under the shares of their sums. Grid: query rows."""
    row = tl.program_id(0).to(tl.int64)
    part, dims = tl.arange(0, BLOCK_P).to(tl.int64), tl.arange(0, BLOCK_D)
    b_lse = tl.load(lse + part * stride_lp + row, mask=part < count, other=float("-inf"))
    b_share = tl.exp2(b_lse - tl.max(b_lse, 0))
    p_parts = parts + part[:, None] * stride_pp + row * stride_pr + dims[None, :]
    b_parts = tl.load(p_parts, mask=(part[:, None] < count) & (dims[None, :] < D), other=0.0)
    b_out = tl.sum(b_parts * b_share[:, None], 0) / tl.sum(b_share, 0)
    tl.store(out + row * D + dims, b_out.to(out.dtype.element_ty), mask=dims < D)


def _part_count(q: torch.Tensor, programs: int, entries: int) -> int:
    """Into how many parts the cache is split: enough to fill the GPU twice over."""
    if q.is_cuda:
        wanted = triton.cdiv(2 * torch.cuda.get_device_properties(q.device).multi_processor_count, programs)
    else:
        wanted = MOST_PARTS  # interpreted or recorded
    return max(1, min(wanted, MOST_PARTS, triton.cdiv(entries, PART_KEYS)))


@torch.no_grad()
def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """See `mminfer_kernels.decode_attention`."""
    batch, heads, queries, size = q.shape
    groups, entries = k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    starts = None if starts is None else starts.clamp(0, entries - queries)
    dtype, scale = q.dtype, size**-0.5 if scale is None else scale
    q, k, v, out = (dense_rows(x) for x in interpretable(q, k, v, out))
    rows = heads // groups * queries
    block_rows = min(power_of_two(rows), MOST_ROWS)
    row_blocks = triton.cdiv(rows, block_rows)
    count = _part_count(q, batch * groups * row_blocks, entries)
    part_keys = triton.cdiv(triton.cdiv(entries, count), PART_KEYS) * PART_KEYS
    count = triton.cdiv(entries, part_keys)
    parts, lse = out[None], None
    if count > 1:
        parts = torch.empty(count, *q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(parts.shape[:-1], dtype=torch.float32, device=q.device)
    launch(
        decode_attention_fwd_kernel,
        (count, batch * groups, row_blocks),
        {"q": q, "k": k, "v": v, "starts": starts, "out": parts, "lse": lse},
        **strides(q, "qbhs"),
        **strides(k, "kbgn"),
        **strides(v, "vbgn"),
        **strides(parts, "opbhs"),
        **strides(lse, "lpbh"),
        **{"G": groups, "repeat": heads // groups, "S": queries, "T": entries, "D": size},
        part_keys=part_keys,
        scale=scale * LOG2_E,
        BLOCK_D=power_of_two(size),
        BLOCK_R=block_rows,
    )
    if lse is not None:
        _merge(parts, lse, out)
    return out.to(dtype)


def _merge(parts: torch.Tensor, lse: torch.Tensor, out: torch.Tensor) -> None:
    """Write into `out` [B, H, S, D] the parts' outputs [P, B, H, S, D], which weigh as their log-sum-exp says."""
    count, size = parts.shape[0], out.shape[-1]
    launch(
        decode_merge_fwd_kernel,
        (out.numel() // size,),
        {"parts": parts, "lse": lse, "out": out},
        stride_pp=parts.stride(0),
        stride_pr=size,
        stride_lp=lse.stride(0),
        count=count,
        D=size,
        BLOCK_D=power_of_two(size),
        BLOCK_P=power_of_two(count, 1),
    )
