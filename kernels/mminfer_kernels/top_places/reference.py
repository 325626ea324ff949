"""Places of the largest numbers in plain PyTorch: two sorts."""

import torch


@torch.no_grad()
def top_places(score: torch.Tensor, count: int, among: torch.Tensor | None) -> torch.Tensor:
    """See `mminfer_kernels.top_places`."""
    score = score.float() if score.dtype == torch.bool else score
    ranked = score.nan_to_num(nan=torch.finfo(score.dtype).max)
    if among is not None:
        ranked = ranked.where(among, torch.inf)
    return ranked.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values
