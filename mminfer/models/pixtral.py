"""Pixtral's vision tower: images of any size packed into one sequence, each looking at itself alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mminfer.cells import CellGrid
from mminfer.layout import Modality
from mminfer.models.adapter import ModelAdapter
from mminfer.models.ragged import RaggedTower, ahead_of, cut, only_rows_of, output_of, patch_owners
from mminfer.models.vision import PIXEL_INPUTS, VisionTower, VisionWork, grids


class RaggedPixtral(RaggedTower):
    """Images in one sequence: rows leave it ahead of the layers, with their positions and their part of the mask."""

    def cells(self, pixels: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, CellGrid] | None:
        sizes, side = self._sizes(pixels, given), self._tower.cell_side
        if any(rows % side or columns % side for rows, columns in sizes):
            return None
        patch = self._tower.patch_sides[-1]
        own = [one[None, :, : h * patch, : w * patch] for one, (h, w) in zip(pixels, sizes, strict=True)]
        grid = CellGrid(tuple((1, h // side, w // side) for h, w in sizes))
        return torch.cat([cut(one, side * patch) for one in own]), grid

    def run(self, pixels: Tensor, given: Mapping[str, Any], grid: CellGrid, owner: Tensor) -> tuple[Any, VisionWork]:
        side, stands, done = self._tower.cell_side, [], 0
        for start, (t, h, w) in grid:
            own = owner[start : start + t * h * w].view(t, h, w) - start
            stands.append(patch_owners(own, side)[0] + done)
            done += len(stands[-1])
        patches = torch.cat(stands)
        kept = (patches == torch.arange(len(patches))).nonzero()[:, 0]
        index, place = kept[None].to(pixels.device), torch.searchsorted(kept, patches).to(pixels.device)
        with ahead_of(self._tower.part("vision_tower.transformer"), lambda m, a, g: only_rows_of(a, g, index)[:2]):
            output = self._module(pixels, **given)
        self.check_rows(output.last_hidden_state.shape[1], len(kept))
        image = torch.repeat_interleave(torch.tensor([len(x) for x in stands]))
        pairs = (int(image[kept].bincount().square().sum()),) * len(self._whole.pairs)
        whole = output_of([output], lambda states: states[0].index_select(1, place))
        return whole, replace(self._whole, rows=len(kept), pairs=pairs)

    def _sizes(self, pixels: Tensor, given: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of patches of each image."""
        tall, wide = self._tower.patch_sides[-2:]
        sizes = given.get("image_sizes")
        found = [pixels.shape[-2:]] * len(pixels) if sizes is None else torch.as_tensor(sizes).tolist()
        return [(h // tall, w // wide) for h, w in found]


class PixtralTower(VisionTower):
    """Pixtral behind LLaVA's projector, or behind Mistral 3's, which merges neighbouring patches first."""

    convolution = "vision_tower.patch_conv"
    layer_list = "vision_tower.transformer.layers"
    attention = "attention"
    ragged = RaggedPixtral

    @property
    def cell_side(self) -> int:
        return int(getattr(self.config, "spatial_merge_size", 1))

    def pictures(self, modality: Modality, inputs: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        found, pixels = super().pictures(modality, inputs), PIXEL_INPUTS[modality]
        if found is None or "image_sizes" not in inputs:
            return found
        sizes = inputs["image_sizes"].tolist()
        return [{**one, pixels: one[pixels][:, :h, :w]} for one, (h, w) in zip(found, sizes, strict=True)]

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
