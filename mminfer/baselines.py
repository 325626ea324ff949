"""What every figure must beat: the same budgets, spent at random. They have the techniques' own interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mminfer.cache.lookm import LookM
from mminfer.tokens.prune import AIMPrune

if TYPE_CHECKING:
    from mminfer.models.base import ModelSpec


@dataclass(frozen=True)
class RandomPrune(AIMPrune):
    """AIM's schedule, but who leaves is drawn by lot.

    Args:
        seed: of the lot; every layer draws its own.
    """

    seed: int = 0

    def importance(self, q: Tensor, k: Tensor, layer_idx: int, query_index: Tensor | None, scale: float) -> Tensor:
        return _lot((k.shape[2],), self.seed, layer_idx, k)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        return 0


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
        return _lot(k.shape[:3], self.seed, layer_idx, k)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        return 0


def _lot(shape: tuple[int, ...], seed: int, layer_idx: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer_idx)
    return torch.rand(shape, generator=generator).to(like.device)
