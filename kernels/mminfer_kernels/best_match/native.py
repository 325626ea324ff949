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
    best = torch.full(sources.shape[:-1], -torch.inf, dtype=torch.float32)
    index = torch.zeros(sources.shape[:-1], dtype=torch.int64)
    scales = _inverse_lengths(targets)
    pairs = sources.shape[1] * targets.shape[1]
    scratch = torch.empty(min(TILE_ROWS * TILE_COLUMNS, len(sources) * pairs), dtype=torch.float32)
    if pairs <= len(scratch):
        _many(sources, targets, scales, best, index, scratch)
    else:
        for rows, columns, scale, top, place in zip(sources, targets, scales, best, index, strict=True):
            _one(rows, columns, scale, top, place, scratch)
    best *= _inverse_lengths(sources)
    return best.view(leading), index.view(leading)


def _many(
    src: torch.Tensor,
    dst: torch.Tensor,
    scales: torch.Tensor,
    best: torch.Tensor,
    index: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Fills `best` (still times the sources' lengths) and `index` of [B, S, C] against [B, T, C], by parts of B."""
    rows, columns = src.shape[1], dst.shape[1]
    step = len(scratch) // (rows * columns)
    for part in (slice(start, start + step) for start in range(0, len(src), step)):
        sources, targets = src[part].float(), dst[part].float()
        tile = scratch[: len(sources) * rows * columns].view(len(sources), rows, columns)
        torch.bmm(sources, targets.mT, out=tile)
        _keep_best(tile, scales[part], 0, best[part], index[part])


def _one(
    src: torch.Tensor,
    dst: torch.Tensor,
    scale: torch.Tensor,
    best: torch.Tensor,
    index: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """The same for one [S, C] against one [T, C], by tiles."""
    for column in range(0, dst.shape[0], TILE_COLUMNS):
        targets = dst[column : column + TILE_COLUMNS].float()
        for row in range(0, src.shape[0], TILE_ROWS):
            sources = src[row : row + TILE_ROWS].float()
            tile = scratch[: len(sources) * len(targets)].view(1, len(sources), len(targets))
            torch.mm(sources, targets.T, out=tile[0])
            _keep_best(tile, scale[column:], column, best[row:], index[row:])


def _keep_best(
    tile: torch.Tensor, scales: torch.Tensor, first_column: int, best: torch.Tensor, index: torch.Tensor
) -> None:
    """Takes similarities [B, S, T] of columns from `first_column` on into the best so far of each row."""
    batch, rows, columns = tile.shape
    sizes = (batch * rows, columns, rows, first_column)
    call(
        "keep_best", pointer(tile), pointer(scales), *map(ctypes.c_int64, sizes), pointer(best), pointer(index),
        ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip


def _inverse_lengths(x: torch.Tensor) -> torch.Tensor:
    """[..., N] float32; 0 for rows of zeros."""
    length = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return torch.where(length > 0, 1 / length, 0)
