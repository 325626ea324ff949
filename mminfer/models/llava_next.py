"""LLaVA-NeXT: newline embeddings stand among the visual features, behind each row of tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from mminfer.layout import Modality
from mminfer.models.adapter import ModelAdapter
from mminfer.models.spec import VisualUnit
from mminfer.models.vision import PIXEL_INPUTS, VisionTower


class LlavaNextTower(VisionTower):
    """An image is cut into tiles by its size; where pixels are padded to the most tiles, the rest is left out."""

    cells_are_tokens = False  # tiles are put together, and cut to the image's shape

    def images(self, modality: Modality, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        pixels = inputs[PIXEL_INPUTS[modality]]
        count, height, width = super().images(modality, inputs)
        if pixels.dim() < 5:  # tiles behind one another
            return count, height, width
        tiles = self.tiles(inputs)
        return sum(min(n, pixels.shape[1]) for n in tiles), height, width

    def pictures(self, modality: Modality, inputs: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        found = super().pictures(modality, inputs)
        pixels = PIXEL_INPUTS[modality]
        if found is None or inputs[pixels].dim() < 5 or modality is Modality.VIDEO:
            return found
        return [{**one, pixels: one[pixels][:n]} for one, n in zip(found, self.tiles(inputs), strict=True)]

    def tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        """Of each image, the view of the whole included."""
        side, shapes = self.config.vision_config.image_size, self.config.image_grid_pinpoints
        return [image_size_to_num_patches(size, shapes, side) for size in inputs["image_sizes"].tolist()]


class LlavaNextAdapter(ModelAdapter):
    """Marks the newlines: they stand for no patch, so no merge may touch them."""

    tower_kind = LlavaNextTower

    def split_units(self, modality: Modality, output: Any) -> list[VisualUnit]:
        return [VisualUnit(x, self.patches(x)) for x in output.pooler_output]

    def patches(self, features: Tensor) -> Tensor:
        """[n] float32, on the CPU: 0 at newlines, else 1."""
        newline: Tensor = self.base.image_newline.to(features)
        return features.ne(newline).any(-1).float().cpu()
