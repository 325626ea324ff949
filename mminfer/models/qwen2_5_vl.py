"""Qwen2.5-VL: Qwen2-VL with a vision tower that looks through windows in most of its layers."""

from __future__ import annotations

import torch
from torch import Tensor

from mminfer.cells import CellGrid
from mminfer.models.qwen2_vl import Qwen2VLAdapter, Qwen2VLTower, RaggedQwen, ends


class RaggedQwen25(RaggedQwen):
    """Windows are made of the cells that stay; those that lost all of theirs are none."""

    def facts(
        self, grid_thw: Tensor, grid: CellGrid, kept: Tensor, rows: Tensor, lengths: list[Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        from transformers.vision_utils import get_vision_window_index

        found, lengths = super().facts(grid_thw, grid, kept, rows, lengths)
        visual = self._module
        index, bounds = get_vision_window_index(
            grid_thw.cpu(), visual.spatial_merge_size, visual.window_size, visual.patch_size
        )
        area = visual.spatial_merge_size**2
        window = torch.repeat_interleave(bounds.diff().long() // area)
        new = torch.full((len(grid),), -1)
        new[kept] = torch.arange(len(kept))
        stays = new[index] >= 0
        counts = window[stays].bincount()
        windowed = counts[counts > 0] * area
        device = rows.device
        own = {"window_index": new[index[stays]].to(device), "cu_window_seqlens": ends(windowed, device)}
        return {**found, **own}, [*lengths, windowed]

    def pairs(self, counts: list[int]) -> tuple[int, ...]:
        full, windowed = counts
        return tuple(
            full if i in self._module.fullatt_block_indexes else windowed for i in range(len(self._whole.pairs))
        )


class Qwen25VLTower(Qwen2VLTower):
    """Windows tile each frame from its corner on; those at the far edges are cut off."""

    ragged = RaggedQwen25

    def pairs(self, grid: list[list[int]]) -> tuple[int, ...]:
        visual = self.base.visual
        unit = visual.spatial_merge_size
        side = unit * (visual.window_size // unit // visual.patch_size)
        windowed = sum(t * _squares(h, side) * _squares(w, side) for t, h, w in grid)
        (full, *_), whole = super().pairs(grid), set(visual.fullatt_block_indexes)
        return tuple(full if i in whole else windowed for i in range(len(self.layers)))


def _squares(length: int, window: int) -> int:
    """Sum of the squares of the stretches into which windows cut a length."""
    return length // window * window**2 + (length % window) ** 2


class Qwen25VLAdapter(Qwen2VLAdapter):
    """Qwen2.5-VL."""

    tower_kind = Qwen25VLTower
