"""H2O: heavy hitters and recent entries stay, the rest is dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from mminfer.cache.lookm import LookM
from mminfer.errors import ConfigError


@dataclass(frozen=True)
class H2O(LookM):
    """Heavy hitters: entries that received most attention from all queries, and recent ones; the rest is dropped.

    Settings as `LookM`'s, without text first and without merging. The first four entries stay.

    Reference:
        H2O (arXiv 2306.14048), as LOOK-M (arXiv 2406.18139) compares itself with it.
    """

    merge: str = "none"
    text_prior: bool = False

    baseline: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_prior:
            raise ConfigError("H2O(text_prior=True) is LookM without merging: use LookM(merge='none')")

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"h2o-20": cls(important_ratio=0.1, recent_ratio=0.1)}

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        return {"H2O": cls.budget_sweep()}
