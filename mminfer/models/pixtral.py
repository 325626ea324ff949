"""Pixtral's vision tower: images of any size packed into one sequence, each looking at itself alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mminfer.layout import Modality
from mminfer.models.adapter import ModelAdapter
from mminfer.models.vision import VisionTower, VisionWork, grids


class PixtralTower(VisionTower):
    """Pixtral behind LLaVA's projector, or behind Mistral 3's, which merges neighbouring patches first."""

    convolution = "vision_tower.patch_conv"
    layer_list = "vision_tower.transformer.layers"
    attention = "attention"

    def work(self, modality: Modality, inputs: Mapping[str, Any]) -> VisionWork:
        images, *size = self.images(modality, inputs)
        padded = grids(torch.tensor([size]), self.patch_sides)[0]
        sizes = inputs.get("image_sizes")
        own = [padded] * images if sizes is None else grids(torch.as_tensor(sizes), self.patch_sides)
        pairs = (sum(n**2 for n in own),) * len(self.layers)
        merged = getattr(self.config, "spatial_merge_size", 1) ** 2
        return VisionWork(images, images * padded, sum(own), pairs, sum(own) // merged)


class LlavaAdapter(ModelAdapter):
    """LLaVA, whose tower may be Pixtral."""

    @property
    def tower(self) -> VisionTower:
        kind = PixtralTower if hasattr(self.base.vision_tower, "patch_conv") else VisionTower
        return kind(self.base, self.model.config)


class Mistral3Adapter(ModelAdapter):
    """Mistral 3."""

    tower_kind = PixtralTower
