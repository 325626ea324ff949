"""Eviction by lot, the baseline of every cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mminfer.cache.lookm import LookM
from mminfer.technique import draw_lot

if TYPE_CHECKING:
    from mminfer.models.base import ModelSpec


@dataclass(frozen=True)
class RandomEvict(LookM):
    """LOOK-M's budget, but which entries stay is drawn by lot; nothing is merged unless asked.

    Args:
        seed: of the lot; every layer draws its own.
    """

    merge: str = "none"
    seed: int = 0

    def wants_mass(self, seen: int, layer_idx: int) -> bool:
        return False

    def score(self, q: Tensor, k: Tensor, layer_idx: int, query_index: Tensor | None, scale: float) -> Tensor:
        return draw_lot(k.shape[:3], self.seed, layer_idx, k)

    def accumulate(self, earlier: Tensor | None, now: Tensor) -> Tensor:
        """One lot for each entry: those of earlier passes keep theirs."""
        return now if earlier is None else earlier.where(earlier > 0, now)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        return 0
