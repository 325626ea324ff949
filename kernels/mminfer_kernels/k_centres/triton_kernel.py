"""Greedy k-centre in Triton: a program for each set of points, which keeps what it knows of each in registers."""

import torch
import triton
import triton.language as tl

from mminfer_kernels.launching import launch, power_of_two


@triton.jit(do_not_specialize=["N", "MOST"])
def k_centres_fwd_kernel(similarity, sums, counts, points, centre, owner, N, MOST, BLOCK: tl.constexpr):
    """One set's centres, and whose each point is. Grid: sets."""
    own = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    m_n = places < N
    size = N if points is None else tl.load(points + own).to(tl.int32)
    count = tl.minimum(tl.load(counts + own), MOST).to(tl.int32)
    count = tl.maximum(tl.minimum(count, size), 0)
    b_sum = tl.load(sums + own * N + places, mask=m_n, other=0.0)
    b_sum = tl.where(b_sum == b_sum, b_sum, float("-inf"))
    last = tl.argmin(tl.where((places < size) & m_n, b_sum, float("inf")), 0).to(tl.int32)
    p_rows = similarity + own * N * N
    b_nearest = tl.full([BLOCK], float("-inf"), tl.float32)
    b_owner = tl.zeros([BLOCK], tl.int32) + tl.where(count > 0, last, 0)
    b_chosen = tl.zeros([BLOCK], tl.int32)
    for _ in tl.range(0, count):
        b_like = tl.load(p_rows + last * N + places, mask=m_n, other=float("-inf"))
        b_nearer = b_like > b_nearest  # of equals the first
        b_nearest = tl.where(b_nearer, b_like, b_nearest)
        b_owner = tl.where(b_nearer, last, b_owner)
        b_chosen = tl.where(places == last, 1, b_chosen)
        b_open = (b_chosen == 0) & (places < size) & m_n
        last = tl.argmin(tl.where(b_open, b_nearest, float("inf")), 0).to(tl.int32)
    b_rank = tl.cumsum(b_chosen, 0) - 1
    p_centre = centre + own * MOST
    tl.store(p_centre + b_rank, places.to(tl.int64), mask=b_chosen > 0)
    tl.store(p_centre + places, tl.zeros([BLOCK], tl.int64) + N, mask=(places >= count) & (places < MOST))
    tl.store(owner + own * N + places, tl.where(b_chosen > 0, places, b_owner).to(tl.int64), mask=m_n)


@torch.no_grad()
def k_centres(
    similarity: torch.Tensor, counts: torch.Tensor, most: int, points: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.k_centres`."""
    largest, device = similarity.shape[-1], similarity.device
    centre = torch.empty(*counts.shape, most, dtype=torch.int64, device=device)
    owner = torch.empty(similarity.shape[:-1], dtype=torch.int64, device=device)
    if similarity.numel() == 0:
        return centre.fill_(largest), owner
    similarity = similarity.float().contiguous()
    launch(
        k_centres_fwd_kernel,
        (counts.numel(),),
        {
            "similarity": similarity,
            "sums": similarity.sum(-1),
            "counts": counts.contiguous(),
            "points": None if points is None else points.contiguous(),
            "centre": centre,
            "owner": owner,
        },
        N=largest,
        MOST=most,
        BLOCK=power_of_two(largest),
        num_warps=4 if largest > 256 else 1,
    )
    return centre, owner
