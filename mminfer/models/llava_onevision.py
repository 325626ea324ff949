"""LLaVA-OneVision: LLaVA-NeXT's images, and videos that come as one run of frames."""

from __future__ import annotations

import math
from typing import Any

import torch

from mminfer.layout import Modality
from mminfer.models.base import VisualUnit
from mminfer.models.llava_next import LlavaNextAdapter


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """Cuts a video into its frames."""

    least_images_in_a_call = 2  # an image that comes alone is cut into tiles

    def split_units(self, modality: Modality, output: Any) -> list[VisualUnit]:
        if modality is Modality.IMAGE:
            return super().split_units(modality, output)
        vision = self.model.config.vision_config
        per_frame = math.ceil(vision.image_size // vision.patch_size / 2) ** 2
        units = []
        for video in output.pooler_output:  # [frames * per_frame, C], and a newline that older hosts add later
            newline = self.base.image_newline.to(video)[None]
            patches = video[:-1] if torch.equal(video[-1:], newline) else video
            frames = list(patches.split(per_frame))
            frames[-1] = torch.cat([frames[-1], newline])
            units += [VisualUnit(x, self.patches(x)) for x in frames]
        return units
