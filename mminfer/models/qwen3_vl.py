"""Qwen3-VL: interleaved M-RoPE, features that join the first layers (DeepStack), time stamps between frames."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mminfer.cells import CellGrid
from mminfer.layout import Modality, TokenLayout
from mminfer.models.qwen2_vl import Qwen2VLAdapter, Qwen2VLTower, RaggedQwen
from mminfer.models.spec import VisualUnit
from mminfer.models.vision import linear_weights


class RaggedQwen3(RaggedQwen):
    """Learned positions, too, are those of the rows that stay."""

    def facts(
        self, grid_thw: Tensor, grid: CellGrid, kept: Tensor, rows: Tensor, lengths: list[Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        found, lengths = super().facts(grid_thw, grid, kept, rows, lengths)
        visual = self._module
        index, weight = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.config.spatial_merge_size,
        )
        return {**found, "interp_indices": index[rows], "interp_weights": weight[rows]}, lengths


class Qwen3VLTower(Qwen2VLTower):
    """Rows of some layers go through mergers of their own."""

    ragged = RaggedQwen3

    @property
    def projector_weights(self) -> int:
        return super().projector_weights + linear_weights(self.part("visual.deepstack_merger_list"))

    def takes_cells(self) -> bool:
        return hasattr(self.part(self.module), "interpolation_mode") and super().takes_cells()


class Qwen3VLAdapter(Qwen2VLAdapter):
    """Carries DeepStack's features along with their tokens; frames are the runs between the time stamps."""

    tower_kind = Qwen3VLTower
    interleaved_axes = True

    def split_units(self, modality: Modality, output: Any) -> list[VisualUnit]:
        units = super().split_units(modality, output)
        lengths = [len(unit.features) for unit in units]
        # K of the tensors of all images, or of their lists
        levels = [x if isinstance(x, Tensor) else torch.cat(list(x)) for x in output.deepstack_features]
        companions = torch.stack(levels, 1).split(lengths)
        return [replace(unit, companions=x) for unit, x in zip(units, companions, strict=True)]

    def frame_ids(self, layout: TokenLayout) -> Tensor:
        rows = layout.visual_rows
        unit, image_id = layout.image_id[rows], layout.image_id.clone()
        starts = (unit != unit.roll(1)) | (rows != rows.roll(1) + 1)
        image_id[rows] = starts.cumsum(0) - 1
        return image_id

    def rotary_sections(self, rotary: Any) -> list[int] | None:
        return list(rotary.mrope_section)
