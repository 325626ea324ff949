"""Gemma 3: images attend in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mminfer.layout import TokenLayout
from mminfer.models.adapter import ModelAdapter
from mminfer.models.vision import VisionTower


class Gemma3Tower(VisionTower):
    """Patches are averaged to a fixed number of tokens an image, which one bare matrix projects."""

    @property
    def projector_weights(self) -> int:
        return int(self.part("multi_modal_projector.mm_input_projection_weight").numel())

    @property
    def cell_side(self) -> int:
        return int(self.part("multi_modal_projector").kernel_size)

    def projected(self, rows: int, patches: int) -> int:
        return int(self.config.mm_tokens_per_image)


class Gemma3Adapter(ModelAdapter):
    """Marks each run of image tokens."""

    tower_kind = Gemma3Tower
    bidirectional_images = True

    def marked(self, layout: TokenLayout, inputs: Mapping[str, Any], mask: Tensor) -> TokenLayout:
        types = inputs.get("token_type_ids")
        if types is None:  # then the host, too, has every token look back only
            return layout
        is_image = types[:, -mask.shape[1] :].cpu()[mask] == 1
        return replace(layout, block=_runs(is_image, layout.sequence))


def _runs(is_image: Tensor, sequence: Tensor) -> Tensor:
    """[T] int64: the run of image tokens that a token belongs to, -1 outside."""
    goes_on = is_image & is_image.roll(1) & (sequence == sequence.roll(1))
    goes_on[:1] = False
    return ((is_image & ~goes_on).cumsum(0) - 1).where(is_image, -1)
