"""Gathering and adding of rows in Triton, RMSNorm of gathered rows, and SwiGLU.

These kernels wait for memory, not arithmetic: their blocks follow from the shape and nothing is tuned, which a kernel
that adds to its input could not be without a copy of it.
"""

import torch
import triton
import triton.language as tl

from mminfer_kernels.launching import dense_rows, interpretable, launch, power_of_two, strides

MOST_COLUMNS = 1024  # of a block
BLOCK_ELEMENTS = 4096  # of a block of several rows
SEGMENT_BLOCK, MOST_COUNTED = 128, 8192  # sources that find their places at a time, and that may compare at all
SOURCES = 4  # rows of one destination that are loaded at a time
AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # a copy does not ask what it copies


@triton.jit(do_not_specialize=["K", "stride_ib"])
def gather_rows_fwd_kernel(
    x, index, out, stride_xa, stride_xb, stride_xn, stride_ib, B, K, C,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copies rows of x [A, B, N, C]. Grid: blocks of places; blocks of columns; A times B."""
    outer = tl.program_id(2).to(tl.int64)
    places = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_k = places < K
    b_row = tl.load(index + outer * stride_ib + places, mask=m_k, other=0)
    m_block = m_k[:, None] & (columns[None, :] < C)
    p_x = x + outer // B * stride_xa + outer % B * stride_xb + b_row[:, None] * stride_xn + columns[None, :]
    p_out = out + (outer * K + places[:, None]) * C + columns[None, :]
    tl.store(p_out, tl.load(p_x, mask=m_block, other=0), mask=m_block)


@triton.jit(do_not_specialize=["K", "stride_ib"])
def gather_rms_norm_fwd_kernel(
    x, index, weight, out, eps, stride_xa, stride_xb, stride_xn, stride_ib, B, K, C, BLOCK_C: tl.constexpr
):
    """RMSNorm of rows of x [A, B, N, C]. Grid: places; A times B."""
    place, outer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    m_c = columns < C
    row = tl.load(index + outer * stride_ib + place)
    p_x = x + outer // B * stride_xa + outer % B * stride_xb + row * stride_xn + columns
    b_x = tl.load(p_x, mask=m_c, other=0.0).to(tl.float32)
    b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / C + eps)
    b_x = b_x * tl.load(weight + columns, mask=m_c, other=0.0).to(tl.float32)
    tl.store(out + (outer * K + place) * C + columns, b_x.to(out.dtype.element_ty), mask=m_c)


@triton.jit
def sum_of_sources(p_rows, p_order, p_weight, begin, end, stride, columns, m_c, SOURCES: tl.constexpr):
    """Sum of the rows at places `begin .. end - 1` of the order, always in that order, and of their weights."""
    b_sum = tl.zeros([columns.shape[0]], tl.float32)
    weight = 0.0
    for first in tl.range(begin, end, SOURCES):
        places = first + tl.arange(0, SOURCES)
        m_s = places < end
        b_source = tl.load(p_order + places, mask=m_s, other=0)
        m_block = m_s[:, None] & m_c[None, :]
        b_rows = tl.load(p_rows + b_source[:, None] * stride + columns[None, :], mask=m_block, other=0.0)
        b_rows = b_rows.to(tl.float32)
        b_weight = m_s.to(tl.float32) if p_weight is None else tl.load(p_weight + b_source, mask=m_s, other=0.0)
        b_sum += tl.sum(b_rows * b_weight[:, None], 0)
        weight += tl.sum(b_weight, 0)
    return b_sum, weight


@triton.jit
def add_rows_fwd_kernel(
    x, order, offsets, rows, stride_xb, stride_xn, stride_rb, stride_rk, stride_ob, stride_fb, C,
    BLOCK_C: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Adds to each row of x [B, N, C] what is meant for it. Grid: destinations; blocks of columns; B."""
    target, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = columns < C
    p_offset = offsets + batch * stride_fb + target
    begin, end = tl.load(p_offset), tl.load(p_offset + 1)
    if begin < end:
        p_x = x + batch * stride_xb + target * stride_xn + columns
        b_sum, _ = sum_of_sources(
            rows + batch * stride_rb, order + batch * stride_ob, None, begin, end, stride_rk, columns, m_c, SOURCES
        )
        b_sum += tl.load(p_x, mask=m_c, other=0.0).to(tl.float32)
        tl.store(p_x, b_sum.to(x.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["R"])
def swiglu_fwd_kernel(
    gate, up, out, stride_gr, stride_ur, R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """`silu(gate) * up` of [R, C]. Grid: blocks of rows; blocks of columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    m_block = (rows < R) & (columns < C)
    b_gate = tl.load(gate + rows * stride_gr + columns, mask=m_block, other=0.0).to(tl.float32)
    b_up = tl.load(up + rows * stride_ur + columns, mask=m_block, other=0.0).to(tl.float32)
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(out + rows * C + columns, b_out.to(out.dtype.element_ty), mask=m_block)


@triton.jit(do_not_specialize=["K", "N"])
def segments_fwd_kernel(index, order, offsets, K, N, BLOCK: tl.constexpr):
    """Every source finds its place among all by counting who comes before it. Grid: blocks of sources; batch."""
    batch, own = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    others, p_index = tl.arange(0, BLOCK), index + batch * K
    b_own = tl.load(p_index + own, mask=own < K, other=0).to(tl.int32)
    b_place, b_before = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, K, BLOCK):
        b_other = tl.load(p_index + start + others, mask=start + others < K, other=2**31 - 1).to(tl.int32)[None, :]
        ahead = (b_other == b_own[:, None]) & (start + others[None, :] < own[:, None])
        b_place += tl.sum(((b_other < b_own[:, None]) | ahead).to(tl.int32), 1)
        b_before += tl.sum((b_other < own[:, None]).to(tl.int32), 1)
    tl.store(order + batch * K + b_place, own.to(tl.int64), mask=own < K)
    tl.store(offsets + batch * (N + 1) + own, b_before.to(tl.int64), mask=own <= N)


def segments(index: torch.Tensor, destinations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sources each destination gets: a stable sort, so that sums never depend on timing.

    Of not too many sources by one launch, which compares each with all others.

    Args:
        index: [B, K] int64, the destination of each source.
        destinations: N.

    Returns:
        order [B, K], the sources by destination; offsets [B, N + 1], where in it each destination's begin.
    """
    batch, sources = index.shape
    if 0 < sources <= MOST_COUNTED and batch:
        order = torch.empty(batch, sources, dtype=torch.int64, device=index.device)
        offsets = torch.empty(batch, destinations + 1, dtype=torch.int64, device=index.device)
        launch(
            segments_fwd_kernel,
            (triton.cdiv(max(sources, destinations + 1), SEGMENT_BLOCK), batch),
            {"index": index.contiguous(), "order": order, "offsets": offsets},
            K=sources,
            N=destinations,
            BLOCK=SEGMENT_BLOCK,
            num_warps=8,
        )
        return order, offsets
    ordered, order = index.sort(dim=-1, stable=True)
    edges = torch.arange(destinations + 1, device=index.device).repeat(len(index), 1)
    return order, torch.searchsorted(ordered, edges)


def column_block(columns: int) -> tuple[int, int]:
    """Columns of a block of one row, and the warps it keeps busy."""
    block = min(power_of_two(columns), MOST_COLUMNS)
    return block, 1 if block <= 256 else 4


def _leading_pair(x: torch.Tensor) -> torch.Tensor:
    """[..., N, C] as [A, B, N, C]: no copy of up to two leading dimensions, whatever their strides."""
    if x.dim() <= 4:
        return x.reshape((1,) * (4 - x.dim()) + x.shape)
    return x.reshape(-1, *x.shape[-3:])


def _index_batch(index: torch.Tensor) -> tuple[torch.Tensor, int]:
    """[B, K] and its stride over the batch, 0 where all share one index."""
    index = index.reshape(-1, index.shape[-1])
    index = dense_rows(index)
    return index, 0 if len(index) == 1 else index.stride(0)


@torch.no_grad()
def gather_rows(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """See `mminfer_kernels.gather_rows`."""
    dim, kept = dim % x.dim(), index.shape[-1]
    out = torch.empty(*x.shape[:dim], kept, *x.shape[dim + 1 :], dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    columns = x.shape[dim + 1 :].numel()
    bits = AS_INTEGERS[x.element_size()]
    rows = dense_rows(_leading_pair(x.reshape(*x.shape[: dim + 1], columns))).view(bits)
    index, stride_ib = _index_batch(index)
    block_c = min(power_of_two(columns), MOST_COLUMNS)
    block_k = min(power_of_two(kept, 1), BLOCK_ELEMENTS // block_c)
    launch(
        gather_rows_fwd_kernel,
        (triton.cdiv(kept, block_k), triton.cdiv(columns, block_c), rows.shape[0] * rows.shape[1]),
        {"x": rows, "index": index, "out": out.view(bits)},
        **strides(rows, "xabn"),
        **{"stride_ib": stride_ib, "B": rows.shape[1], "K": kept, "C": columns},
        BLOCK_K=block_k,
        BLOCK_C=block_c,
    )
    return out


@torch.no_grad()
def gather_rms_norm(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `mminfer_kernels.gather_rms_norm`."""
    kept, columns = index.shape[-1], x.shape[-1]
    out = torch.empty(*x.shape[:-2], kept, columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    dtype = x.dtype
    x, weight, out = interpretable(x, weight, out)
    x = dense_rows(_leading_pair(x))
    index, stride_ib = _index_batch(index)
    block = power_of_two(columns)
    launch(
        gather_rms_norm_fwd_kernel,
        (kept, x.shape[0] * x.shape[1]),
        {"x": x, "index": index, "weight": weight.contiguous(), "out": out},
        **strides(x, "xabn"),
        **{"stride_ib": stride_ib, "B": x.shape[1], "K": kept, "C": columns, "eps": eps},
        BLOCK_C=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out.to(dtype)


@torch.no_grad()
def add_rows(x: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Write into `x`; see `mminfer_kernels.add_rows`."""
    if rows.numel() == 0:
        return
    (target,) = interpretable(x)
    target = dense_rows(target.reshape(-1, *x.shape[-2:]))
    rows = dense_rows(interpretable(rows)[0].reshape(-1, *rows.shape[-2:]))
    order, offsets = segments(index.reshape(-1, index.shape[-1]), x.shape[-2])
    shared = len(order) == 1
    block, warps = column_block(x.shape[-1])
    launch(
        add_rows_fwd_kernel,
        (x.shape[-2], triton.cdiv(x.shape[-1], block), target.shape[0]),
        {"x": target, "order": order, "offsets": offsets, "rows": rows},
        **strides(target, "xbn"),
        **strides(rows, "rbk"),
        **{"stride_ob": 0 if shared else order.stride(0), "stride_fb": 0 if shared else offsets.stride(0)},
        C=x.shape[-1],
        BLOCK_C=block,
        SOURCES=SOURCES,
        num_warps=warps,
    )
    if target.data_ptr() != x.data_ptr():
        x.copy_(target.view(x.shape))  # its leading dimensions do not merge, or it is interpreted bfloat16


@torch.no_grad()
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `mminfer_kernels.swiglu`."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    dtype, columns = gate.dtype, gate.shape[-1]
    gate, up, out = interpretable(gate, up, out)
    gate, up = (dense_rows(x.reshape(-1, columns)) for x in (gate, up))
    block_c = min(power_of_two(columns), MOST_COLUMNS)
    block_r = min(power_of_two(len(gate), 1), BLOCK_ELEMENTS // block_c)
    launch(
        swiglu_fwd_kernel,
        (triton.cdiv(len(gate), block_r), triton.cdiv(columns, block_c)),
        {"gate": gate, "up": up, "out": out},
        **{"stride_gr": gate.stride(0), "stride_ur": up.stride(0), "R": len(gate), "C": columns},
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )
    return out.to(dtype)
