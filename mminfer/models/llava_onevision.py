"""LLaVA-OneVision: LLaVA-NeXT's images, and videos that come as one run of frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from mminfer.layout import Modality
from mminfer.models.llava_next import LlavaNextAdapter, LlavaNextTower
from mminfer.models.spec import VisualUnit
from mminfer.models.vision import VisionTower


class LlavaOnevisionTower(LlavaNextTower):
    """Only an image that comes alone is cut into tiles; a frame is one."""

    def images(self, modality: Modality, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        if modality is Modality.VIDEO:
            return VisionTower.images(self, modality, inputs)
        return super().images(modality, inputs)

    def tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        tiles, of_sample = super().tiles(inputs), inputs.get("batch_num_images")
        if of_sample is None:
            return tiles
        alone = [count == 1 for count in of_sample.tolist() for _ in range(count)]
        return [count if single else 1 for count, single in zip(tiles, alone, strict=False)]


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """Cuts a video into its frames."""

    tower_kind = LlavaOnevisionTower
    least_images_in_a_call = 2  # an image that comes alone is cut into tiles

    def split_units(self, modality: Modality, output: Any) -> list[VisualUnit]:
        if modality is Modality.IMAGE:
            return super().split_units(modality, output)
        vision = self.model.config.vision_config
        per_frame = math.ceil(vision.image_size // vision.patch_size / 2) ** 2
        units = []
        for video in output.pooler_output:  # [frames * per_frame, C], and a newline that older hosts add later
            newline = self.base.image_newline.to(video)[None]
            whole = len(video) - len(video) % per_frame
            odd = len(video) - whole > 1 or per_frame == 1  # not so many frames: then it is looked at
            ended = torch.equal(video[-1:], newline) if odd else len(video) > whole
            frames = list((video[:-1] if ended else video).split(per_frame))
            frames[-1] = torch.cat([frames[-1], newline])
            units += [VisualUnit.of_patches(x) for x in frames]
            units[-1].size[-1] = 0
        return units
