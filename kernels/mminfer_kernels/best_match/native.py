"""Best match on the CPU: products by torch's BLAS, the best of each tile by C++ (`csrc/cpu/rows.cpp`)."""

import ctypes

import torch

from mminfer_kernels.native import call, pointer

TILE_ROWS, TILE_COLUMNS = 1024, 2048  # of similarities held at a time: 8 MiB


@torch.no_grad()
def best_match(src: torch.Tensor, dst: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.best_match`.

    The length of a source row does not matter to which target is best, so nothing is normalised in memory: each
    column of a tile is divided by its target's length as it is compared.
    """
    leading = src.shape[:-1]
    if src.numel() == 0:
        return src.new_zeros(leading, dtype=torch.float32), torch.zeros(leading, dtype=torch.int64)
    sources, targets = src.reshape(-1, *src.shape[-2:]), dst.reshape(-1, *dst.shape[-2:])
    best = torch.full(sources.shape[:-1], -torch.inf)
    index = torch.zeros(sources.shape[:-1], dtype=torch.int64)
    scratch = torch.empty(min(TILE_ROWS, sources.shape[1]) * min(TILE_COLUMNS, targets.shape[1]))
    for rows, columns, top, place in zip(sources, targets, best, index, strict=True):
        _one(rows, columns, top, place, scratch)
    best *= _inverse_lengths(sources)
    return best.view(leading), index.view(leading)


def _one(src: torch.Tensor, dst: torch.Tensor, best: torch.Tensor, index: torch.Tensor, scratch: torch.Tensor) -> None:
    """Fills `best` (still times the sources' lengths) and `index` of one [S, C] against one [T, C]."""
    scale = _inverse_lengths(dst)
    for column in range(0, dst.shape[0], TILE_COLUMNS):
        targets = dst[column : column + TILE_COLUMNS].float()
        for row in range(0, src.shape[0], TILE_ROWS):
            sources = src[row : row + TILE_ROWS].float()
            tile = scratch[: len(sources) * len(targets)].view(len(sources), len(targets))
            torch.mm(sources, targets.T, out=tile)
            sizes = (len(sources), len(targets), len(targets), column)
            call(
                "keep_best", pointer(tile), pointer(scale[column:]), *map(ctypes.c_int64, sizes),
                pointer(best[row:]), pointer(index[row:]), ctypes.c_int64(torch.get_num_threads()),
            )  # fmt: skip


def _inverse_lengths(x: torch.Tensor) -> torch.Tensor:
    """[..., N] float32; 0 for rows of zeros."""
    length = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return torch.where(length > 0, 1 / length, 0)
