"""Merging of rows in Triton: sources sorted by destination, then one sum a destination, always in the same order."""

import torch
import triton
import triton.language as tl

from mminfer_kernels.launching import dense_rows, interpretable, launch, strides
from mminfer_kernels.rows.triton_kernel import SOURCES, column_block, segments, sum_of_sources


@triton.jit(do_not_specialize=["S", "T"])
def merge_rows_fwd_kernel(
    dst, src, order, offsets, dst_weight, src_weight, out, weight,
    stride_db, stride_dt, stride_sb, stride_ss, T, S, C,
    BLOCK_C: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Weighted mean of a destination and its sources. Grid: destinations T; blocks of columns; batch."""
    target, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = columns < C
    p_offset = offsets + batch * (T + 1) + target
    p_weight = src_weight if src_weight is None else src_weight + batch * S
    b_sum, total = sum_of_sources(
        src + batch * stride_sb, order + batch * S, p_weight, tl.load(p_offset), tl.load(p_offset + 1),
        stride_ss, columns, m_c, SOURCES,
    )  # fmt: skip
    own = 1.0 if dst_weight is None else tl.load(dst_weight + batch * T + target)
    b_dst = tl.load(dst + batch * stride_db + target * stride_dt + columns, mask=m_c, other=0.0).to(tl.float32)
    b_out = (b_dst * own + b_sum) / (own + total)
    p_out = batch * T + target
    tl.store(out + p_out * C + columns, b_out.to(out.dtype.element_ty), mask=m_c)
    if tl.program_id(1) == 0:
        tl.store(weight + p_out, own + total)


@torch.no_grad()
def merge_rows(
    dst: torch.Tensor,
    src: torch.Tensor,
    index: torch.Tensor,
    dst_weight: torch.Tensor | None,
    src_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.merge_rows`."""
    dtype, (targets, columns), sources = dst.dtype, dst.shape[-2:], src.shape[-2]
    out = torch.empty(dst.shape, dtype=dtype, device=dst.device)
    weight = torch.empty(dst.shape[:-1], dtype=torch.float32, device=dst.device)
    if out.numel() == 0:
        return out, weight.zero_()
    dst, src, out = interpretable(dst, src, out)
    batch = dst.shape[:-2].numel()
    dst, src = (dense_rows(x.reshape(batch, x.shape[-2], columns)) for x in (dst, src))
    order, offsets = segments(index.reshape(batch, sources), targets)
    votes = [None if x is None else x.float().contiguous() for x in (dst_weight, src_weight)]
    block, warps = column_block(columns)
    launch(
        merge_rows_fwd_kernel,
        (targets, triton.cdiv(columns, block), len(dst)),
        {
            "dst": dst,
            "src": src,
            "order": order,
            "offsets": offsets,
            "dst_weight": votes[0],
            "src_weight": votes[1],
            "out": out,
            "weight": weight,
        },
        **strides(dst, "dbt"),
        **strides(src, "sbs"),
        **{"T": targets, "S": sources, "C": columns},
        BLOCK_C=block,
        SOURCES=SOURCES,
        num_warps=warps,
    )
    return out.to(dtype), weight
