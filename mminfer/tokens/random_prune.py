"""Pruning by lot, the baseline of every pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mminfer.technique import draw_lot
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

    def check(self, spec: ModelSpec) -> None:
        self.check_layers(spec)

    def importance(self, q: Tensor, k: Tensor, layer_idx: int, query_index: Tensor | None, scale: float) -> Tensor:
        return draw_lot((k.shape[2],), self.seed, layer_idx, k)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        return 0
