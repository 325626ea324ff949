"""Tokens that leave by lot before the model: chance at exactly as many tokens as a merging leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mminfer.layout import TokenLayout
from mminfer.technique import MergeTechnique, check_fraction, check_seed, draw_lot

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


@dataclass(frozen=True)
class DropByLot(MergeTechnique):
    """Of each image's or frame's patches so many stay, drawn by lot; the others are gone from the first layer on.

    Args:
        ratio: kept fraction of an image's tokens, in (0, 1]; at least one token stays.
        seed: of the lot.

    Raises:
        ConfigError: a setting is out of range.
    """

    ratio: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("DropByLot.ratio", self.ratio)
        check_seed("DropByLot.seed", self.seed)

    def check(self, spec: ModelSpec) -> None:
        """Any model will do."""

    def apply(self, inputs_embeds: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        rows = ((layout.image_id >= 0) & (layout.size > 0)).nonzero()[:, 0]
        if self.ratio == 1 or not len(rows):
            return inputs_embeds, layout
        _, image, counts = layout.image_id[rows].unique_consecutive(return_inverse=True, return_counts=True)
        lot = draw_lot((len(rows),), self.seed, 0, inputs_embeds)
        order = (image + 0.5 * lot.double()).argsort()  # image by image
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[image]
        wanted = (counts * self.ratio).round().clamp_min(1)
        stays = torch.ones(len(layout), dtype=torch.bool, device=rows.device)
        stays[rows[order[place >= wanted[image]]]] = False
        index = stays.nonzero()[:, 0]
        return inputs_embeds[index], layout.select(index)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        return 0

    def describe(self) -> str:
        return f"{100 * self.ratio:g} % of an image's tokens stay, drawn by lot."
