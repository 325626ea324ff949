"""The log-sum-exp of attention rows in Triton: flash attention's forward pass without values."""

from typing import Any

import torch
import triton
import triton.language as tl

from mminfer_kernels.launching import configured, launch, strides, tile_fits
from mminfer_kernels.tiles.triton_kernel import LOG2_E, Ranges, attention_arguments, key_blocks, key_range, load_rows


@triton.jit
def _add_keys(
    b_max, b_sum, b_q, p_k, b_lo, b_hi, begin, end, stride_kn, N, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Running maximum and sum of `exp2` of the rows' logits over keys `begin .. end - 1`."""
    for start in tl.range(begin, end, BLOCK_N):
        keys = tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, start, keys, stride_kn, N, D, BLOCK_D, MASKED)
        b_s = tl.dot(b_q, b_k.trans(), input_precision="ieee") * scale  # [BLOCK_S, BLOCK_N]
        if MASKED:
            keys = start + keys[None, :]
            b_s = tl.where((keys >= b_lo[:, None]) & (keys < b_hi[:, None]), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
        b_max = b_new
    return b_max, b_sum


def _rows_fit(arguments: dict[str, Any]) -> bool:
    """Queries stay, keys stream."""
    sizes = arguments["BLOCK_S"], arguments["BLOCK_N"]
    return tile_fits(arguments, arguments["q"], *sizes, arguments["BLOCK_D"])


@configured(
    [
        ({"BLOCK_S": 64, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK_S": 128, "BLOCK_N": 64}, 8, 3),
        ({"BLOCK_S": 128, "BLOCK_N": 128}, 8, 2),
        ({"BLOCK_S": 64, "BLOCK_N": 32}, 4, 2),
        ({"BLOCK_S": 32, "BLOCK_N": 32}, 4, 2),
        ({"BLOCK_S": 16, "BLOCK_N": 16}, 4, 2),
    ],
    lengths=("N",),
    interpreted_blocks={"BLOCK_S": 32, "BLOCK_N": 32},
    fits=_rows_fit,
)
@triton.jit(do_not_specialize=["S", "N", "stride_lb", "stride_lh"])
def row_lse_fwd_kernel(
    q, k, lse, lo, hi, scale,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kg, stride_kn, stride_lb, stride_lh,
    H, repeat, S, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of each row's logits times `scale`. Grid: row blocks, the longest first; batch and heads."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_S
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    rows = tl.arange(0, BLOCK_S)
    b_q = load_rows(q + batch * stride_qb + head * stride_qh, row, rows, stride_qs, S, D, BLOCK_D, True)
    p_k = k + batch * stride_kb + head // repeat * stride_kg
    begin, full_end, end = key_blocks(lo, hi, row, S, N, CAUSAL, BLOCK_S, BLOCK_N)
    b_lo, b_hi = key_range(lo, hi, row + rows, S, N, CAUSAL)
    b_max = tl.full([BLOCK_S], -1e30, tl.float32)  # finite: a block that shows a row no key leaves no NaN
    b_sum = tl.zeros([BLOCK_S], tl.float32)
    if lo is None:
        b_max, b_sum = _add_keys(
            b_max, b_sum, b_q, p_k, b_lo, b_hi, begin, full_end, stride_kn, N, scale, D, BLOCK_N, BLOCK_D, False
        )
    b_max, b_sum = _add_keys(
        b_max, b_sum, b_q, p_k, b_lo, b_hi, full_end, end, stride_kn, N, scale, D, BLOCK_N, BLOCK_D, True
    )
    p_lse = lse + batch * stride_lb + head * stride_lh + row + rows
    tl.store(p_lse, b_max + tl.log2(b_sum), mask=row + rows < S)


def row_lse(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool, ranges: Ranges) -> torch.Tensor:
    """[B, H, S] float32: base-2 log-sum-exp of each row's logits."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch(
        row_lse_fwd_kernel,
        lambda meta: (triton.cdiv(q.shape[2], meta["BLOCK_S"]), q.shape[0] * q.shape[1]),
        {"q": q, "k": k, "lse": lse, "lo": ranges.lo, "hi": ranges.hi},
        **attention_arguments(q, k),
        **strides(lse, "lbh"),
        scale=scale * LOG2_E,
        CAUSAL=causal,
    )
    return lse
