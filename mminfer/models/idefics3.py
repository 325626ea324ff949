"""Idefics3 and SmolVLM: the language model is `text_model`, and a chat's tiles come in one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mminfer.layout import Modality
from mminfer.models.adapter import ModelAdapter
from mminfer.models.spec import VisualUnit
from mminfer.models.vision import VisionTower, VisionWork


class Idefics3Tower(VisionTower):
    """All tiles are padded to one size; no patch looks at padding, and tiles of nothing else are left out."""

    convolution = "vision_model.embeddings.patch_embedding"
    layer_list = "vision_model.encoder.layers"
    projector = "connector"
    pooling = ""
    module = "vision_model"

    @property
    def cell_side(self) -> int:
        return int(self.config.scale_factor)

    def pictures(self, modality: Modality, inputs: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        tiles = self._real_tiles(inputs)
        return None if tiles is None else VisionTower.pictures(self, modality, tiles)

    def chosen(self, modality: Modality, inputs: Mapping[str, Any], some: list[int]) -> dict[str, Any] | None:
        tiles = self._real_tiles(inputs)
        return None if tiles is None else {name: x[some][None] for name, x in tiles.items()}

    def _real_tiles(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Pixels and mask of the tiles that are encoded, [tiles, ...]; None where there is more, or no such tile."""
        if not set(inputs) <= {"pixel_values", "pixel_attention_mask"}:
            return None
        real = _are_real(inputs["pixel_values"])
        return {name: x.flatten(0, 1)[real] for name, x in inputs.items()} if bool(real.any()) else None

    def work(self, modality: Modality, inputs: Mapping[str, Any]) -> VisionWork:
        work = super().work(modality, inputs)
        mask = inputs.get("pixel_attention_mask")
        if mask is None or work.images == 0:
            return work
        tall, wide = self.patch_sides[-2:]
        real = mask.flatten(0, 1)[_are_real(inputs["pixel_values"])].unfold(1, tall, tall).unfold(2, wide, wide)
        seen = int((real.sum((-1, -2)) > 0).sum())
        return replace(work, pairs=(work.rows // work.images * seen,) * len(self.layers))

    def images(self, modality: Modality, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        _, height, width = super().images(modality, inputs)
        return int(_are_real(inputs["pixel_values"]).sum()), height, width

    def projected(self, rows: int, patches: int) -> int:
        return patches // int(self.config.scale_factor) ** 2


def _are_real(pixel_values: torch.Tensor) -> torch.Tensor:
    """[batch * tiles] bool: the tiles that are not all zero."""
    return pixel_values.flatten(0, 1).flatten(1).ne(0).any(1)


class Idefics3Adapter(ModelAdapter):
    """Cuts the features into tiles, which are images of their own."""

    tower_kind = Idefics3Tower
    language_model_name = "text_model"

    def split_units(self, modality: Modality, output: Any) -> list[VisualUnit]:
        # a list of [tiles of one chat * n, C]; [tiles, n, C] on older hosts
        features = torch.cat([x.flatten(0, -2) for x in output.pooler_output])
        return [VisualUnit.of_patches(x) for x in features.split(self.base.image_seq_len)]
