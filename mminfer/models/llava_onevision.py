"""LLaVA-OneVision: newline embeddings stand among the visual features, and videos come as one run of frames."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mminfer.layout import Modality
from mminfer.models.base import ModelAdapter, VisualUnit


class LlavaOnevisionAdapter(ModelAdapter):
    """Marks the newlines (they stand for no patch) and cuts a video into its frames."""

    def split_units(self, modality: Modality, features: Any) -> list[VisualUnit]:
        if modality is Modality.IMAGE:
            return [VisualUnit(x, self._patches(x)) for x in features]
        vision = self.model.config.vision_config
        per_frame = math.ceil(vision.image_size // vision.patch_size / 2) ** 2
        units = []
        for video in features:  # [frames * per_frame, C], and a newline that older hosts add later
            newline = self.base.image_newline.to(video)[None]
            patches = video[:-1] if torch.equal(video[-1:], newline) else video
            frames = list(patches.split(per_frame))
            frames[-1] = torch.cat([frames[-1], newline])
            units += [VisualUnit(x, self._patches(x)) for x in frames]
        return units

    def _patches(self, features: Tensor) -> Tensor:
        newline: Tensor = self.base.image_newline.to(features)
        return features.ne(newline).any(-1).float()
