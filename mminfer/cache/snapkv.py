"""SnapKV: what the last queries look at stays, the rest is dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from mminfer.cache.lookm import LookM
from mminfer.cache.lookm_rules import SINKS
from mminfer.errors import ConfigError, shown
from mminfer.technique import LayerView, is_whole

MOST_POOL = 1024  # neighbours that are averaged


@dataclass(frozen=True)
class SnapKV(LookM):
    """What the last `window` queries look at, and these; scores are averaged over neighbours, the rest is dropped.

    Settings as `LookM`'s: the sum of the ratios, or the budget, is shared out between the window and the entries before
    it. In chunks, only the last window counts. The first four entries stay.

    Args:
        pool: how many neighbouring scores are averaged, an odd number.

    Reference:
        SnapKV (arXiv 2404.14469) section 4; window 32 and pooling 5 are its code's defaults. With grouped heads the
        scores of a group are summed; the first four entries are ours.
    """

    merge: str = "none"
    text_prior: bool = False
    queries: str = "last"
    window: int = 32
    pool: int = 5

    baseline: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.pool, least=1, most=MOST_POOL) or self.pool % 2 == 0:
            raise ConfigError(
                f"SnapKV.pool={shown(self.pool)}, wanted an odd number of neighbours, 1 or more, below {MOST_POOL}"
            )
        if self.text_prior or self.queries != "last" or self.recent is not None:
            raise ConfigError(
                f"SnapKV(text_prior={self.text_prior}, queries={shown(self.queries)}, recent={self.recent}): its "
                "window alone counts and stays; leave these out, or use LookM"
            )

    def quota(self, tokens_seen: int, layer_idx: int) -> tuple[int, int]:
        important, recent = super().quota(tokens_seen, layer_idx)
        if important >= tokens_seen:
            return important, recent
        window = min(self.window, max(important + recent - SINKS, 0))
        return important + recent - window, window

    def score(self, view: LayerView) -> Tensor:
        score = super().score(view)
        before = max(score.shape[2] - self.window, 0)
        if before == 0:
            return score
        pooled = avg_pool1d(score[:, :, :before], self.pool, 1, self.pool // 2)
        return torch.cat([pooled, score[:, :, before:]], 2)

    def accumulate(self, earlier: Tensor | None, now: Tensor) -> Tensor:
        return now

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"snapkv-20": cls(important_ratio=0.1, recent_ratio=0.1)}

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        return {"SnapKV": cls.budget_sweep()}
