"""Fitted masses in Triton: one launch for all steps, since a program has all that a head's next step needs."""

from typing import Any

import torch
import triton
import triton.language as tl

from mminfer_kernels.fit_masses import reference
from mminfer_kernels.launching import configured, launch, power_of_two

MOST_QUERIES = 2048  # of which a program holds a number each; of more torch's own products are as good
TINY = torch.finfo(torch.float32).tiny


def _fits(arguments: dict[str, Any]) -> bool:
    """A tile takes an eighth of a thread's registers, since it is read ahead and multiplied beside that."""
    return arguments["BLOCK_K"] * arguments["BLOCK_R"] <= 32 * 32 * arguments["num_warps"]


@configured(
    [({"BLOCK_K": n}, 8, 1) for n in (64, 32, 16, 8, 4)],
    lengths=("K",),
    interpreted_blocks={"BLOCK_K": 16},
    fits=_fits,
)
@triton.jit(do_not_specialize=["K", "R", "iterations"])
def fit_masses_fwd_kernel(
    shares, counts, out, ahead, wanted, step, ridge, tiny, least, most, K, R, iterations,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: heads. `ahead`, `wanted` and `step` [P, K] are scratch of the program that writes them."""
    first = tl.program_id(0).to(tl.int64) * K
    rows, queries = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    m_q = queries[None, :] < R
    p_shares = shares + first * R + rows[:, None] * R + queries[None, :]
    b_sum, squares = tl.zeros([BLOCK_R], tl.float32), 0.0
    for start in range(0, K, BLOCK_K):
        b_s = tl.load(p_shares + start * R, mask=(start + rows[:, None] < K) & m_q, other=0.0)
        b_sum += tl.sum(b_s, 0)
        squares += tl.sum(tl.sum(b_s * b_s, 1), 0)
    held = squares * ridge / tl.maximum(tl.load(counts + tl.program_id(0)).to(tl.float32), 1.0) + tiny
    for start in range(0, K, BLOCK_K):
        m_k = start + rows < K
        b_s = tl.load(p_shares + start * R, mask=m_k[:, None] & m_q, other=0.0)
        places = first + start + rows
        tl.store(wanted + places, tl.sum(b_s, 1) + held, mask=m_k)
        tl.store(step + places, 1.0 / (tl.sum(b_s * b_sum[None, :], 1) + held), mask=m_k)
        tl.store(ahead + places, tl.full([BLOCK_K], 1.0, tl.float32), mask=m_k)
        tl.store(out + places, tl.full([BLOCK_K], 1.0, tl.float32), mask=m_k)
    pace = 1.0
    for _ in range(iterations):
        tl.debug_barrier()  # the scratch is there for all of the program's threads
        pace_was = pace
        pace = (1.0 + tl.sqrt(1.0 + 4.0 * pace * pace)) / 2.0
        b_next = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, K, BLOCK_K):
            m_k, places = start + rows < K, first + start + rows
            b_s = tl.load(p_shares + start * R, mask=m_k[:, None] & m_q, other=0.0)
            b_ahead, b_last = tl.load(ahead + places, mask=m_k, other=1.0), tl.load(out + places, mask=m_k, other=1.0)
            b_wanted, b_step = (
                tl.load(wanted + places, mask=m_k, other=0.0),
                tl.load(step + places, mask=m_k, other=0.0),
            )
            b_gradient = tl.sum(b_s * b_sum[None, :], 1) + b_ahead * held - b_wanted
            b_factor = b_ahead - b_gradient * b_step
            b_factor = tl.where(b_factor != b_factor, b_factor, tl.minimum(tl.maximum(b_factor, least), most))
            b_ahead = b_factor + (b_last - b_factor) * ((1.0 - pace_was) / pace)
            tl.debug_barrier()
            tl.store(out + places, b_factor, mask=m_k)
            tl.store(ahead + places, b_ahead, mask=m_k)
            b_next += tl.sum(b_s * b_ahead[:, None], 0)
        b_sum = b_next


@torch.no_grad()
def fit_masses(shares: torch.Tensor, counts: torch.Tensor, ridge: float, iterations: int, most: float) -> torch.Tensor:
    """See `mminfer_kernels.fit_masses`."""
    heads, kept, queries = shares.shape
    if queries > MOST_QUERIES or shares.numel() == 0 or shares.dtype != torch.float32:
        return reference.fit_masses(shares, counts, ridge, iterations, most)
    out, ahead, wanted, step = (torch.empty(heads, kept, dtype=torch.float32, device=shares.device) for _ in range(4))
    launch(
        fit_masses_fwd_kernel,
        (heads,),
        {
            "shares": shares.contiguous(),
            "counts": counts.contiguous(),
            "out": out,
            "ahead": ahead,
            "wanted": wanted,
            "step": step,
        },
        ridge=ridge,
        tiny=TINY,
        least=1 / most,
        most=most,
        K=kept,
        R=queries,
        iterations=iterations,
        BLOCK_R=power_of_two(queries),
    )
    return out
