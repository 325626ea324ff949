"""Frames that do not differ from the one before are encoded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mminfer.errors import ConfigError, shown
from mminfer.technique import CellGrid, TowerTechnique, is_number
from mminfer.tower.patch_dedup import MOST_DIFFERENCE
from mminfer.tower.repeats import bounded, repeating


@dataclass(frozen=True)
class FrameDedup(TowerTechnique):
    """Frames of a video that repeat the one before, pixel for pixel, are encoded once.

    Screen recordings and slides stand still for most of their time. The tokens of the frame that stays stand for those
    of all that repeat it; the times of these, where the host writes any, stay in the prompt. Frames do not see each
    other inside the towers of the supported families, so that the tower gives what it would have given.

    Args:
        threshold: how far any value of a pixel may be from that of the frame that stands for it, as of `PatchDedup`.

    Raises:
        ConfigError: the threshold is no number from 0 to 10.

    Example:
        >>> InferenceConfig(tower=FrameDedup())
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not is_number(self.threshold, most=MOST_DIFFERENCE) or self.threshold < 0:
            raise ConfigError(
                f"FrameDedup.threshold={shown(self.threshold)}, wanted a number from 0 to {MOST_DIFFERENCE:g}, in "
                "values of pixels as the tower is given them"
            )

    def apply(self, cells: Tensor, grid: CellGrid) -> Tensor:
        owner = torch.arange(len(grid), device=cells.device)
        for start, (t, h, w) in grid:
            frames = cells[start : start + t * h * w].view(t, -1)
            order = torch.arange(t, device=cells.device)
            alike = repeating(frames[1:], frames[:-1], self.threshold)
            parent = torch.cat([order[:1], order[:-1].where(alike, order[1:])])
            first = bounded(frames, parent, float(self.threshold))
            owner[start : start + t * h * w] -= ((order - first) * (h * w)).repeat_interleave(h * w)
        return owner

    def describe(self) -> str:
        alike = "exactly" if self.threshold == 0 else f"within {self.threshold:g} of each value"
        return f"Frames of videos that repeat the one before {alike} are encoded once."
