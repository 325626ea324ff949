"""Patches that repeat their neighbour are encoded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mminfer.errors import ConfigError, shown
from mminfer.technique import CellGrid, TowerTechnique, is_number
from mminfer.tower.repeats import bounded, repeating

MOST_DIFFERENCE = 10.0  # of two values of pixels, as processors scale them


@dataclass(frozen=True)
class PatchDedup(TowerTechnique):
    """Patches that repeat their neighbour on the left or above, pixel for pixel, leave before the vision tower.

    What the tower then encodes of a blank area is one piece, whose token stands for all of the area: margins, gaps
    between lines, and the plain parts of slides, forms and screens cost nothing. A piece is as many patches as the
    host makes one token of, such as two by two; it leaves where all of its pixels repeat those of the piece beside it.
    Pieces that stay keep their places.

    Pictures of which nothing repeats are encoded as without this technique, bit for bit. Of others nothing is lost of
    what they show, but the answers may differ: pieces look at each other inside the tower, and a blank that was many
    is one there.

    Args:
        threshold: how far any value of a pixel may be from that of the piece that stands for it, in values as the
            tower is given them (most processors scale the 256 steps of a channel to a width between 2 and 4.5).

    Raises:
        ConfigError: the threshold is no number from 0 to 10.

    Reference:
        PixelPrune (arXiv 2604.00886), section 3: a patch that is predicted by its neighbours within a threshold leaves
        before the tower. There a patch is compared with its neighbour alone, so that differences add up along a chain;
        here none is farther from what stands for it than the threshold. There tokens leave without a trace; here the
        token that stays is told how many it stands for, which merging goes by.

    Example:
        >>> InferenceConfig(tower=PatchDedup())
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not is_number(self.threshold, most=MOST_DIFFERENCE) or self.threshold < 0:
            raise ConfigError(
                f"PatchDedup.threshold={shown(self.threshold)}, wanted a number from 0 to {MOST_DIFFERENCE:g}, in "
                "values of pixels as the tower is given them"
            )

    def apply(self, cells: Tensor, grid: CellGrid) -> Tensor:
        parent = torch.arange(len(grid), device=cells.device)
        for start, (t, h, w) in grid:
            stop = start + t * h * w
            frames = cells[start:stop].view(t, h, w, -1)
            own = parent[start:stop].view(t, h, w)
            above = repeating(frames[:, 1:], frames[:, :-1], self.threshold)
            own[:, 1:] = own[:, 1:].where(~above, own[:, 1:] - w)
            beside = repeating(frames[:, :, 1:], frames[:, :, :-1], self.threshold)
            left = torch.arange(start, stop, device=cells.device).view(t, h, w)[:, :, :-1]
            own[:, :, 1:] = left.where(beside, own[:, :, 1:])
        return bounded(cells, parent, float(self.threshold))

    def describe(self) -> str:
        alike = "exactly" if self.threshold == 0 else f"within {self.threshold:g} of each value"
        return f"Pieces of pictures that repeat their neighbour {alike} leave before the vision tower."
