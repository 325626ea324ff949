"""Pruning by lot, the baseline of every pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from mminfer.technique import LayerView, check_seed, draw_lot
from mminfer.tokens.prune import AIMPrune

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


@dataclass(frozen=True)
class RandomPrune(AIMPrune):
    """AIM's schedule, but who leaves is drawn by lot.

    Args:
        seed: of the lot; every layer draws its own.
    """

    seed: int = 0

    baseline: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("RandomPrune.seed", self.seed)

    def check(self, spec: ModelSpec) -> None:
        self.check_layers(spec)

    def importance(self, view: LayerView) -> Tensor:
        return draw_lot((len(view.entries),), self.seed, view.layer_idx, view.keys)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        return 0

    def describe(self) -> str:
        return f"{super().describe().partition(', the least')[0]}, drawn by lot."

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"random-prune": cls()}

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        return {"random prune": {"": cls()}}
