"""InternVL: its own tower, whose patches are shuffled together before the projector."""

from __future__ import annotations

from mminfer.models.adapter import ModelAdapter
from mminfer.models.vision import VisionTower


class InternVLTower(VisionTower):
    """A class token stands before the patches; squares of patches go through the projector as one row."""

    convolution = "vision_tower.embeddings.patch_embeddings.projection"
    layer_list = "vision_tower.encoder.layer"
    attention = "attention"
    class_token = "vision_tower.embeddings.cls_token"

    @property
    def cell_side(self) -> int:
        return round(1 / self.config.downsample_ratio)

    def projected(self, rows: int, patches: int) -> int:
        return round(patches * self.config.downsample_ratio**2)


class InternVLAdapter(ModelAdapter):
    """InternVL."""

    tower_kind = InternVLTower
