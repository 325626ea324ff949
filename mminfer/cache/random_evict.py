"""Eviction by lot, the baseline of every cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from mminfer.cache.lookm import LookM
from mminfer.technique import LayerView, check_seed, draw_lot

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


@dataclass(frozen=True)
class RandomEvict(LookM):
    """LOOK-M's budget, but which entries stay is drawn by lot; nothing is merged unless asked.

    Args:
        seed: of the lot; every layer draws its own.
    """

    merge: str = "none"
    seed: int = 0

    baseline: ClassVar[bool] = True
    preferred: ClassVar[str] = "others drawn by lot"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("RandomEvict.seed", self.seed)

    def needs_attention_mass(self, tokens_seen: int, layer_idx: int) -> bool:
        return False

    def score(self, view: LayerView) -> Tensor:
        return draw_lot(view.keys.shape[:3], self.seed, view.layer_idx, view.keys)

    def held(self, view: LayerView) -> LayerView:
        return super().held(replace(view, queries=view.queries[:, :, :0].clone(), query_index=None))

    def _scores(self, stacked: LayerView, views: Sequence[LayerView]) -> Tensor:
        return torch.cat([self.score(view) for view in views])  # every layer draws its own

    def accumulate(self, earlier: Tensor | None, now: Tensor) -> Tensor:
        """One lot for each entry: those of earlier passes keep theirs."""
        return now if earlier is None else earlier.where(earlier > 0, now)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        return 0

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"random-20": cls(important_ratio=0.1, recent_ratio=0.1)}

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        return {"random, text first": cls.budget_sweep(), "random": cls.budget_sweep(text_prior=False)}
