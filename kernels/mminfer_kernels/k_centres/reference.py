"""Greedy k-centre in plain PyTorch."""

import torch


@torch.no_grad()
def k_centres(
    similarity: torch.Tensor, counts: torch.Tensor, most: int, points: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.k_centres`."""
    largest, similarity = similarity.shape[-1], similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    places = torch.arange(largest, device=similarity.device)
    nearest = similarity.new_full(similarity.shape[:-1], -torch.inf)
    owner = torch.zeros(similarity.shape[:-1], dtype=torch.int64, device=similarity.device)
    if similarity.numel() == 0:
        return owner.new_full((*counts.shape, most), largest), owner
    sizes = counts.new_full(counts.shape, largest) if points is None else points
    closed, counts = places >= sizes[..., None], counts.minimum(sizes)
    last = similarity.sum(-1).masked_fill(closed, torch.inf).argmin(-1, keepdim=True)
    beyond = closed
    for turn in range(most):
        more = (turn < counts)[..., None]
        like = similarity.gather(-2, last[..., None].expand(*last.shape, largest))[..., 0, :]
        nearer = more & (like > nearest)
        nearest = like.where(nearer, nearest)
        owner = last.where(nearer | (more & (turn == 0)), owner)
        closed = closed | (more & (places == last))
        last = nearest.masked_fill(closed, torch.inf).argmin(-1, keepdim=True)
    chosen = closed & ~beyond
    return places.where(chosen, largest).sort(-1).values[..., :most].contiguous(), places.where(chosen, owner)
