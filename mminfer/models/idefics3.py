"""Idefics3 and SmolVLM: the language model is `text_model`, and a chat's tiles come in one run."""

from __future__ import annotations

from typing import Any

import torch

from mminfer.layout import Modality
from mminfer.models.base import ModelAdapter, VisualUnit


class Idefics3Adapter(ModelAdapter):
    """Cuts the features into tiles, which are images of their own."""

    language_model_name = "text_model"

    def split_units(self, modality: Modality, output: Any) -> list[VisualUnit]:
        # a list of [tiles of one chat * n, C]; [tiles, n, C] on older hosts
        features = torch.cat([x.flatten(0, -2) for x in output.pooler_output])
        return [VisualUnit.of_patches(x) for x in features.split(self.base.image_seq_len)]
