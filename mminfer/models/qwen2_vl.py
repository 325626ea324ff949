"""Qwen2-VL and Qwen2.5-VL: three rotary axes (M-RoPE), and a position offset that the host keeps on the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mminfer.cells import CellGrid
from mminfer.layout import Modality, TokenLayout
from mminfer.models.adapter import ModelAdapter
from mminfer.models.ragged import RaggedTower
from mminfer.models.vision import PIXEL_INPUTS, VisionTower, VisionWork

try:
    from transformers.vision_utils import get_vision_position_ids
except ImportError:  # of hosts whose towers work out themselves what rows they are given
    get_vision_position_ids = None  # type: ignore[assignment]


class RaggedQwen(RaggedTower):
    """The tower takes rows, their places, and the ends of their sequences: it is handed those of the rows that stay."""

    def cells(self, pixels: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, CellGrid] | None:
        side = self._module.spatial_merge_size
        grid = CellGrid(tuple((t, h // side, w // side) for t, h, w in given["grid_thw"].tolist()))
        return pixels.view(len(grid), -1), grid

    def run(self, pixels: Tensor, given: Mapping[str, Any], grid: CellGrid, owner: Tensor) -> tuple[Any, VisionWork]:
        kept = (owner == torch.arange(len(owner))).nonzero()[:, 0]
        area = self._module.spatial_merge_size**2
        rows = (kept[:, None] * area + torch.arange(area)).flatten().to(pixels.device)
        place = torch.searchsorted(kept, owner).to(pixels.device)
        lengths = [_lengths(grid.frame[kept], area)]
        facts, lengths = self.facts(given["grid_thw"], grid, kept, rows, lengths)
        output = self._module(pixels.index_select(0, rows), **{**given, **facts})
        self.check_rows(len(output.pooler_output), len(kept))
        output.pooler_output = output.pooler_output.index_select(0, place)
        features = getattr(output, "deepstack_features", None)
        if features is not None:
            output.deepstack_features = [x.index_select(0, place) for x in features]
        pairs = self.pairs([int(x.square().sum()) for x in lengths])
        return output, VisionWork(len(lengths[0]), len(rows), len(rows), pairs, len(kept))

    def facts(
        self, grid_thw: Tensor, grid: CellGrid, kept: Tensor, rows: Tensor, lengths: list[Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What the tower would work out for whole pictures, and rows of each sequence, of each kind of layer.

        Args:
            grid_thw: as the host's tower takes it.
            grid: of all cells.
            kept: [K] int64, cells that stay.
            rows: [K * patches of a cell] int64, their patches.
            lengths: of full attention, the rows of each sequence.
        """
        positions = get_vision_position_ids(grid_thw, self._module.spatial_merge_size)
        return {"position_ids": positions[rows], "cu_seqlens": ends(lengths[0], rows.device)}, lengths

    def pairs(self, counts: list[int]) -> tuple[int, ...]:
        """Query-key pairs of each layer, given those of each kind."""
        return (counts[0],) * len(self._whole.pairs)


def _lengths(group: Tensor, area: int) -> Tensor:
    """Rows of each group that has any: [K] int64, the group of each cell, ascending."""
    counts = group.bincount()
    return counts[counts > 0] * area


def ends(lengths: Tensor, device: torch.device) -> Tensor:
    """[n + 1] int32: where sequences of these lengths begin and end."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)


class Qwen2VLTower(VisionTower):
    """All images packed into one sequence, in which each frame (a pair of video frames) looks at itself alone."""

    convolution = "visual.patch_embed.proj"
    layer_list = "visual.blocks"
    attention = "attn"
    projector = "visual.merger"
    module = "visual"
    ragged = RaggedQwen

    def takes_cells(self) -> bool:
        return get_vision_position_ids is not None and super().takes_cells()

    def frames(self, modality: Modality, inputs: Mapping[str, Any]) -> int:
        return 1  # the grid says it of each

    def pictures(self, modality: Modality, inputs: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        pixels, name = PIXEL_INPUTS[modality], f"{modality.name.lower()}_grid_thw"
        if set(inputs) != {pixels, name}:
            return None
        pieces = inputs[pixels].split(inputs[name].prod(-1).tolist())
        return [{pixels: piece, name: size} for piece, size in zip(pieces, inputs[name], strict=True)]

    def chosen(self, modality: Modality, inputs: Mapping[str, Any], some: list[int]) -> dict[str, Any] | None:
        found = self.pictures(modality, inputs) or []
        pixels, name = PIXEL_INPUTS[modality], f"{modality.name.lower()}_grid_thw"
        return {pixels: torch.cat([found[i][pixels] for i in some]), name: inputs[name][some]}

    def work(self, modality: Modality, inputs: Mapping[str, Any]) -> VisionWork:
        rows = inputs[PIXEL_INPUTS[modality]].shape[0]
        grid = inputs[f"{modality.name.lower()}_grid_thw"].tolist()
        frames = sum(t for t, _, _ in grid)
        merged = rows // self.base.visual.spatial_merge_size**2
        return VisionWork(frames, rows, rows, self.pairs(grid), merged)

    def pairs(self, grid: list[list[int]]) -> tuple[int, ...]:
        """Query-key pairs in each layer, of images of so many frames, rows and columns of patches."""
        return (sum(t * (h * w) ** 2 for t, h, w in grid),) * len(self.layers)


class Qwen2VLAdapter(ModelAdapter):
    """M-RoPE positions: temporal, height, width."""

    tower_kind = Qwen2VLTower
    position_axes = 3
    host_state = ("rope_deltas",)

    def marked(self, layout: TokenLayout, inputs: Mapping[str, Any], mask: Tensor) -> TokenLayout:
        return replace(layout, image_id=self.frame_ids(layout))

    def frame_ids(self, layout: TokenLayout) -> Tensor:
        """[T] int64: a video comes as one unit, but no merge may cross its frames.

        A frame starts where height and width are back at the unit's first token's.
        """
        if len(layout.visual_rows) == 0:
            return layout.image_id
        rows = layout.visual_rows
        unit, grid = layout.image_id[rows], layout.position[1:, rows]
        first = (unit != unit.roll(1)).long()
        first[0] = 1
        origin = grid[:, first.nonzero()[:, 0]][:, first.cumsum(0) - 1]
        starts = (grid == origin).all(0).long()
        image_id = layout.image_id.clone()
        image_id[rows] = starts.cumsum(0) - 1
        return image_id

    def host_positions(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        grids_named = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        names = ("position_ids", "input_ids", "mm_token_type_ids", *grids_named)
        here = {n: x.cpu() if isinstance(x := inputs.get(n), Tensor) else x for n in names}
        position_ids, ids, types, *_ = here.values()
        if position_ids is None and ids is not None:
            types = self._token_types(ids) if types is None else types
            grids = {name: here[name] for name in grids_named if here[name] is not None}
            position_ids, _ = self.base.get_rope_index(
                ids, mm_token_type_ids=types, attention_mask=mask.long(), **grids
            )
        if position_ids is None or position_ids.dim() == 2:
            return super().host_positions({**inputs, "position_ids": position_ids}, mask).expand(3, -1)
        # `generate` puts the plain text positions in front of the three axes.
        return position_ids[-3:].expand(3, *mask.shape)[:, mask].double()

    def _token_types(self, input_ids: Tensor) -> Tensor:
        config: Any = self.model.config
        return (input_ids == config.image_token_id).int() + 2 * (input_ids == config.video_token_id).int()

    def rotary_sections(self, rotary: Any) -> list[int] | None:
        if not hasattr(rotary, "recomposition_frequencies"):
            return None  # older hosts give every axis its own table and put them together in the attention
        return list(self.text_config.rope_parameters["mrope_section"])
