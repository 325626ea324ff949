"""Decode attention in Triton: the cache split over programs, their parts merged by log-sum-exp."""

from typing import Any

import torch
import triton
import triton.language as tl

from mminfer_kernels.launching import configured, dense_rows, interpretable, launch, power_of_two, strides, tile_fits
from mminfer_kernels.tiles.triton_kernel import LOG2_E, load_rows

PART_KEYS = 256  # the fewest entries worth a program of their own; a multiple of every BLOCK_N
MOST_PARTS = 64  # of a padded cache
MERGED = 16  # parts at a time, however many there are: one kernel for all lengths
MOST_ROWS = 64  # query rows of a program: more are taken by further programs


def _fits(arguments: dict[str, Any]) -> bool:
    """Keys and values stream past a few rows."""
    return tile_fits(arguments, arguments["k"], 32, 2 * arguments["BLOCK_N"], arguments["BLOCK_D"])


@triton.jit
def segment_of(firsts, lengths, owner, rows, most):
    """First row and length of a head in a packed cache, and whether its rows are there; one row if they are not."""
    first, length = tl.load(firsts + owner), tl.load(lengths + owner)
    there = (first >= 0) & (length >= 1) & (length <= most) & (first <= rows - length)
    return tl.where(there, first, 0), tl.where(there, length, 1).to(tl.int32), there


@configured(
    [
        ({"BLOCK_N": 64}, 8, 3),
        ({"BLOCK_N": 64}, 8, 2),
        ({"BLOCK_N": 128}, 8, 2),
        ({"BLOCK_N": 32}, 4, 3),
        ({"BLOCK_N": 32}, 4, 2),
        ({"BLOCK_N": 16}, 4, 2),
    ],
    lengths=(),
    interpreted_blocks={"BLOCK_N": 32},
    fits=_fits,
)
@triton.jit(do_not_specialize=["T", "part_keys"])
def decode_attention_fwd_kernel(
    q, k, v, starts, firsts, lengths, log_mass, out, lse, scale,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    stride_op, stride_ob, stride_oh, stride_os, stride_lp, stride_lb, stride_lh,
    G, repeat, S, T, part_keys,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One part of the cache for all query heads of a group. Grid: parts; batch and groups; blocks of query rows.

    Row r of a group is query r % S of its head r // S, so that each key is loaded once for all of them. With `lengths`
    the cache is packed, T rows that all heads share, and parts behind the end of a head have nothing to do.
    """
    part, owner = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, group = owner // G, owner % G
    p_k, p_v = k + batch * stride_kb + group * stride_kg, v + batch * stride_vb + group * stride_vg
    first = 0 if starts is None else tl.load(starts + batch).to(tl.int32)
    if lengths is not None:
        segment, T, there = segment_of(firsts, lengths, owner, T, part_keys.to(tl.int64) * tl.num_programs(0))
        if part * part_keys >= T:
            return
        p_k, p_v, scale = p_k + segment * stride_kn, p_v + segment * stride_vn, tl.where(there, scale, float("nan"))
        if log_mass is not None:
            log_mass = log_mass + segment
    rows, dims = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    heads, queries = group * repeat + rows // S, rows % S
    m_r = rows < repeat * S
    m_q = m_r[:, None] & (dims[None, :] < D)
    p_q = q + batch * stride_qb + heads[:, None] * stride_qh + queries[:, None] * stride_qs + dims[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)
    begin, end = part * part_keys, tl.minimum((part + 1) * part_keys, T)
    b_last = T - S + queries  # the last entry each row sees
    b_max = tl.full([BLOCK_R], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    keys = tl.arange(0, BLOCK_N)
    for start in tl.range(tl.maximum(begin, first // BLOCK_N * BLOCK_N), end, BLOCK_N):
        seen = start + keys
        b_k = load_rows(p_k, start, keys, stride_kn, end, D, BLOCK_D, True)
        b_s = tl.dot(b_q, b_k.trans(), input_precision="ieee") * scale  # [BLOCK_R, BLOCK_N]
        if log_mass is not None:
            b_s += tl.load(log_mass + seen, mask=seen < end, other=0.0)[None, :] * 1.4426950408889634  # log2(e)
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


@triton.jit(do_not_specialize=["T", "part_keys", "count"])
def decode_merge_fwd_kernel(
    parts, lse, firsts, lengths, out, stride_pp, stride_pr, stride_lp, count, part_keys, T, repeat,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The mean of the parts' outputs under the shares of their sums. Grid: query rows, `repeat` of a head's segment."""
    row = tl.program_id(0).to(tl.int64)
    if lengths is not None:
        _, length, _ = segment_of(firsts, lengths, row // repeat, T, part_keys.to(tl.int64) * count)
        count = tl.cdiv(length, part_keys)
    dims = tl.arange(0, BLOCK_D)
    b_max, b_sum, b_out = -1e30, 0.0, tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, count, BLOCK_P):
        part = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        b_lse = tl.load(lse + part * stride_lp + row, mask=part < count, other=float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_shrink, b_share = tl.exp2(b_max - b_new), tl.exp2(b_lse - b_new)
        p_parts = parts + part[:, None] * stride_pp + row * stride_pr + dims[None, :]
        b_parts = tl.load(p_parts, mask=(part[:, None] < count) & (dims[None, :] < D), other=0.0)
        b_out = b_out * b_shrink + tl.sum(b_parts * b_share[:, None], 0)
        b_sum = b_sum * b_shrink + tl.sum(b_share, 0)
        b_max = b_new
    tl.store(out + row * D + dims, (b_out / b_sum).to(out.dtype.element_ty), mask=dims < D)


def _programs(x: torch.Tensor) -> int:
    """Enough to fill the GPU twice over."""
    if x.is_cuda:
        return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count
    return MOST_PARTS  # interpreted or recorded


@torch.no_grad()
def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """See `mminfer_kernels.decode_attention`."""
    queries, entries = q.shape[2], k.shape[2]
    if q.numel() == 0:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    starts = None if starts is None else starts.clamp(0, entries - queries)
    programs = triton.cdiv(_programs(q), len(q) * k.shape[1] * _row_blocks(q, k.shape[1])) if q.is_cuda else MOST_PARTS
    count = max(1, min(programs, MOST_PARTS, triton.cdiv(entries, PART_KEYS)))
    part_keys = triton.cdiv(triton.cdiv(entries, count), PART_KEYS) * PART_KEYS
    return _run(q, k, v, {"starts": starts}, scale, (triton.cdiv(entries, part_keys), part_keys))


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
    """See `mminfer_kernels.packed_decode_attention`. Parts are as long as all rows need to fill the GPU."""
    if q.numel() == 0:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    groups, rows = first.shape[1], len(keys)
    longest = min(rows, int(lengths.max()) if longest is None else longest)
    wanted = triton.cdiv(rows * _row_blocks(q, groups), _programs(q))
    part_keys = triton.cdiv(min(wanted, longest), PART_KEYS) * PART_KEYS
    k, v = (x.expand(len(q), groups, *x.shape) for x in map(dense_rows, (keys, values)))
    masses = None if log_mass is None else log_mass.contiguous()
    places = {"firsts": first.contiguous(), "lengths": lengths.contiguous(), "log_mass": masses}
    return _run(q, k, v, places, scale, (triton.cdiv(longest, part_keys), part_keys))


def _row_blocks(q: torch.Tensor, groups: int) -> int:
    rows = q.shape[1] // groups * q.shape[2]
    return triton.cdiv(rows, min(power_of_two(rows), MOST_ROWS))


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: dict[str, torch.Tensor | None],
    scale: float | None,
    parts_of: tuple[int, int],
) -> torch.Tensor:
    """Launches the kernels.

    Args:
        places: which entries of the keys and values [B, G, T, D] each head has, by the kernel's names.
        parts_of: how many parts a head's entries are split into, and how long these are.
    """
    batch, heads, queries, size = q.shape
    groups, (count, part_keys), dtype = k.shape[1], parts_of, q.dtype
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    scale = size**-0.5 if scale is None else scale
    q, k, v, out = (dense_rows(x) for x in interpretable(q, k, v, out))
    places = dict.fromkeys(("starts", "firsts", "lengths", "log_mass")) | places
    parts, lse = out[None], None
    if count > 1:
        parts = torch.empty(count, *q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(parts.shape[:-1], dtype=torch.float32, device=q.device)
    rows = heads // groups * queries
    launch(
        decode_attention_fwd_kernel,
        (count, batch * groups, _row_blocks(q, groups)),
        {"q": q, "k": k, "v": v, **places, "out": parts, "lse": lse},
        **strides(q, "qbhs"),
        **strides(k, "kbgn"),
        **strides(v, "vbgn"),
        **strides(parts, "opbhs"),
        **strides(lse, "lpbh"),
        **{"G": groups, "repeat": heads // groups, "S": queries, "T": k.shape[2], "D": size},
        part_keys=part_keys,
        scale=scale * LOG2_E,
        BLOCK_D=power_of_two(size),
        BLOCK_R=min(power_of_two(rows), MOST_ROWS),
    )
    if lse is not None:
        launch(
            decode_merge_fwd_kernel,
            (batch * heads * queries,),
            {"parts": parts, "lse": lse, "firsts": places["firsts"], "lengths": places["lengths"], "out": out},
            **{"stride_pp": parts.stride(0), "stride_pr": size, "stride_lp": lse.stride(0)},
            **{"count": count, "part_keys": part_keys, "T": k.shape[2], "repeat": rows, "D": size},
            BLOCK_D=power_of_two(size),
            BLOCK_P=MERGED,
        )
    return out.to(dtype)
