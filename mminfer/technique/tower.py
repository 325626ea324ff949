"""The stage ahead of a vision tower: pieces of pictures that others stand for are never encoded."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

from mminfer.cells import CellGrid
from mminfer.errors import ConfigError
from mminfer.layout import TokenLayout
from mminfer.technique.stages import Stage, Technique

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


class TowerTechnique(Technique):
    """Chooses the cells of pictures that a vision tower need not encode, since others stand for them."""

    stage = Stage.TOWER

    def check(self, spec: ModelSpec) -> None:
        """Refuses models whose towers take nothing but whole pictures."""
        if not spec.ragged_tower:
            raise ConfigError(
                f"{type(self).__name__}: the vision tower of {spec.family} is of unknown build, and can only be given "
                "whole pictures; leave tower=None for this model"
            )

    @abstractmethod
    def apply(self, cells: Tensor, grid: CellGrid) -> Tensor:
        """Which cell stands for each: [N] int64, its own number where it is encoded.

        Args:
            cells: [N, P], the values of each cell's pixels as the tower is given them.
            grid: where they stand.
        """

    def leave(self, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        """Which tokens stand for themselves ([K] int64, ascending, on the CPU), and their layout."""
        return layout.without_copies()
