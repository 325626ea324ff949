"""Qwen2.5-VL: Qwen2-VL with a vision tower that looks through windows in most of its layers."""

from __future__ import annotations

from mminfer.models.qwen2_vl import Qwen2VLAdapter, Qwen2VLTower


class Qwen25VLTower(Qwen2VLTower):
    """Windows tile each frame from its corner on; those at the far edges are cut off."""

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
