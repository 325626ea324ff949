"""Places of the largest numbers in Triton: the smallest that stays, bit by bit, then the places in order."""

import torch
import triton
import triton.language as tl

from mminfer_kernels.launching import configured, launch, strides


@triton.jit
def ranks(p_score, p_among, first, places, N, largest, stride):
    """[BLOCK] int64, from 1 to 2^32 in the order of the numbers, 2^32 + 1 for what comes before all, 0 past N."""
    m_n = first + places < N
    b_x = tl.load(p_score + first + places, mask=m_n, other=0.0).to(tl.float32)
    b_x = tl.where(b_x != b_x, largest, tl.minimum(tl.maximum(b_x, -largest), largest)) + 0.0  # -0 is 0
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits).to(tl.int64) + (2**31 + 1)
    if p_among is not None:
        b_bits = tl.where(tl.load(p_among + (first + places) * stride, mask=m_n, other=1) != 0, b_bits, 2**32 + 1)
    return tl.where(m_n, b_bits, 0)


@configured([({"BLOCK_N": 2048}, 8, 1)], lengths=(), interpreted_blocks={"BLOCK_N": 64}, fits=lambda arguments: True)
@triton.jit(do_not_specialize=["N", "count", "stride_ab", "stride_an"], do_not_specialize_on_alignment=["among"])
def top_places_fwd_kernel(
    score, among, out, largest, stride_ab, stride_an, N, count, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK_N)
    p_score, p_among = score + row * N, None if among is None else among + row * stride_ab
    least = tl.program_id(0).to(tl.int64) * 0  # the largest rank that so many places have, or a higher one
    for i in range(33):
        tried = least + (tl.full((), 1, tl.int64) << (32 - i))
        found = 0
        for first in range(0, N, BLOCK_N):
            found += tl.sum((ranks(p_score, p_among, first, places, N, largest, stride_an) >= tried).to(tl.int32), 0)
        least = tl.where(found >= count, tried, least)
    above = 0
    for first in range(0, N, BLOCK_N):
        above += tl.sum((ranks(p_score, p_among, first, places, N, largest, stride_an) > least).to(tl.int32), 0)
    equal, written, p_out = 0, 0, out + row * count
    for first in range(0, N, BLOCK_N):
        b_rank = ranks(p_score, p_among, first, places, N, largest, stride_an)
        b_equal = (b_rank == least).to(tl.int32)
        b_before = equal + tl.cumsum(b_equal, 0) - b_equal
        b_stays = ((b_rank > least) | ((b_equal != 0) & (b_before < count - above))).to(tl.int32)
        b_into = written + tl.cumsum(b_stays, 0) - 1
        tl.store(p_out + b_into, (first + places).to(tl.int64), mask=(b_stays != 0) & (b_into < count))
        equal += tl.sum(b_equal, 0)
        written += tl.sum(b_stays, 0)


@torch.no_grad()
def top_places(score: torch.Tensor, count: int, among: torch.Tensor | None) -> torch.Tensor:
    """See `mminfer_kernels.top_places`."""
    out = torch.empty(*score.shape[:-1], count, dtype=torch.int64, device=score.device)
    if out.numel() == 0:
        return out
    if score.dtype == torch.bool:
        largest, score = 1.0, score.contiguous().view(torch.uint8)
    else:
        largest, score = torch.finfo(score.dtype).max, score.float().contiguous()
    among = None if among is None else among.view(torch.uint8).reshape(-1, score.shape[-1])
    launch(
        top_places_fwd_kernel,
        (score.numel() // score.shape[-1],),
        {"score": score, "among": among, "out": out},
        **strides(among, "abn"),
        largest=largest,
        N=score.shape[-1],
        count=count,
    )
    return out
