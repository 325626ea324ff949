"""LLaVA-NeXT: newline embeddings stand among the visual features, behind each row of tiles."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mminfer.layout import Modality
from mminfer.models.base import ModelAdapter, VisualUnit


class LlavaNextAdapter(ModelAdapter):
    """Marks the newlines: they stand for no patch, so no merge may touch them."""

    def split_units(self, modality: Modality, output: Any) -> list[VisualUnit]:
        return [VisualUnit(x, self.patches(x)) for x in output.pooler_output]

    def patches(self, features: Tensor) -> Tensor:
        """[n] float32: 0 at newlines, else 1."""
        newline: Tensor = self.base.image_newline.to(features)
        return features.ne(newline).any(-1).float()
