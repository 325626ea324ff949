"""Pictures as vision towers may take them: in cells, of which some stand for others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mminfer.errors import ConfigError

if TYPE_CHECKING:
    from mminfer.technique import TowerTechnique


@dataclass(frozen=True, eq=False)
class CellGrid:
    """Where the cells of pictures stand: squares of patches, as many as the host makes one token of.

    Args:
        sizes: of each picture (an image, a tile or a video) its frames, and rows and columns of cells. Cells come
            picture after picture, frame after frame, row by row.
    """

    sizes: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return sum(t * h * w for t, h, w in self.sizes)

    def __iter__(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """The first cell of each picture, and the picture's size."""
        start = 0
        for t, h, w in self.sizes:
            yield start, (t, h, w)
            start += t * h * w

    @cached_property
    def picture(self) -> Tensor:
        """[N] int64: the picture that each cell belongs to."""
        return torch.repeat_interleave(torch.tensor([t * h * w for t, h, w in self.sizes], dtype=torch.int64))

    @cached_property
    def frame(self) -> Tensor:
        """[N] int64: the frame of any picture that each cell belongs to."""
        return torch.repeat_interleave(torch.tensor([h * w for t, h, w in self.sizes for _ in range(t)]))


def standing_cells(technique: TowerTechnique, cells: Tensor, grid: CellGrid) -> Tensor | None:
    """What a technique chose, on the CPU; None where every cell is encoded.

    Raises:
        ConfigError: it is not one cell of the same picture for each, which is encoded itself.
    """
    found: Any = technique.apply(cells, grid)
    name = type(technique).__name__
    if not isinstance(found, Tensor) or found.dtype != torch.int64 or found.shape != (len(grid),):
        given = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(f"{name}.apply gave {given}, wanted int64 [{len(grid)}], the cell that stands for each")
    owner = found.cpu()
    own = torch.arange(len(owner))
    if bool((owner == own).all()):
        return None
    inside = int(owner.min()) >= 0 and int(owner.max()) < len(owner)
    if not inside or not bool((owner[owner] == owner).all() & (grid.picture[owner] == grid.picture).all()):
        raise ConfigError(
            f"{name}.apply let a cell stand for others that is not encoded itself, or is of another picture: wanted "
            "one of the same picture that stands for itself"
        )
    return owner
