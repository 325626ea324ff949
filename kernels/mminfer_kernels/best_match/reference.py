"""Best match in plain PyTorch, by blocks of source rows."""

import torch

from mminfer_kernels.blocks import block_rows


@torch.no_grad()
def best_match(src: torch.Tensor, dst: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.best_match`."""
    leading, rows = src.shape[:-2], src.shape[-2]
    dtype = torch.promote_types(src.dtype, torch.float32)
    similarity = torch.empty(*leading, rows, dtype=dtype, device=src.device)
    index = torch.empty(*leading, rows, dtype=torch.int64, device=src.device)
    if src.numel() == 0:
        return similarity.zero_(), index.zero_()
    directions = _unit(dst.to(dtype)).transpose(-1, -2)  # [..., C, T]
    step = block_rows(leading.numel() * dst.shape[-2] * dtype.itemsize, rows)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        cosines = _unit(src[..., block, :].to(dtype)) @ directions  # [..., rows, T]
        torch.max(cosines, -1, out=(similarity[..., block], index[..., block]))
    return similarity, index


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length one; zero rows stay zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min_(torch.finfo(x.dtype).tiny)
