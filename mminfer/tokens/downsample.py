"""Plain down-sampling of images, the baseline of every merging."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from mminfer.layout import TokenLayout
from mminfer.technique import MERGE_SHARES, MergeTechnique, check_fraction
from mminfer.tokens.averaging import average
from mminfer.tokens.grid import Grid, grid_of

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


@dataclass(frozen=True)
class Downsample(MergeTechnique):
    """Plain down-sampling: every view of an image, a grid of tokens, is averaged down to a smaller grid.

    A token stands where the middle one of those stood that it is the mean of. Where tokens form no grid (see
    `grid_of`), runs of them are averaged.

    Args:
        ratio: kept fraction of an image's tokens, in (0, 1]; at least one token stays, and no more than this.

    Raises:
        ConfigError: the ratio is out of range.
    """

    ratio: float = 0.25

    baseline: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction("Downsample.ratio", self.ratio)

    def check(self, spec: ModelSpec) -> None:
        """Any model will do."""

    def apply(self, inputs_embeds: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        grid = grid_of(layout.on_host)
        if self.ratio == 1 or not len(grid.rows):
            return inputs_embeds, layout
        owner = torch.arange(len(layout))
        owner[grid.rows] = grid.rows[self._owners(grid)]
        return average(inputs_embeds, layout, owner)

    def _owners(self, grid: Grid) -> Tensor:
        """[P] int64: for each token the one, among the P, that it becomes part of."""
        shapes = list(zip(grid.height.tolist(), grid.width.tolist(), strict=True))
        smaller = {(h, w): _smaller_grid(h, w, max(1, int(self.ratio * h * w + 1e-9))) for h, w in set(shapes)}
        tall, wide = torch.tensor([smaller[shape] for shape in shapes], device=grid.rows.device).T[:, grid.view]
        cell = (grid.y * tall // grid.height[grid.view]) * wide + grid.x * wide // grid.width[grid.view]
        cell += grid.first[grid.view]  # a view has no more cells than tokens
        _, cell, counts = cell.unique(return_inverse=True, return_counts=True)
        order = cell.argsort(stable=True)
        middle = counts.cumsum(0) - counts + counts // 2
        return order[middle][cell]

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"downsample": cls(ratio=0.25)}

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        return {"down-sampling": {f"{share} %": cls(share / 100) for share in MERGE_SHARES}}


def _smaller_grid(height: int, width: int, tokens: int) -> tuple[int, int]:
    """Rows and columns of a grid of at most so many tokens: near their number, and near the shape."""
    shapes = [(h, min(width, tokens // h)) for h in range(1, min(height, tokens) + 1)]

    def loss(shape: tuple[int, int]) -> tuple[float, int]:
        """Least where number and shape are kept: five tokens in a line tell less than two lines of two."""
        tall, wide = shape
        bent = abs(math.log(tall * width / (wide * height)))
        return round(0.9 * bent + math.log(tokens / (tall * wide)), 6), wide

    return min(shapes, key=loss)
