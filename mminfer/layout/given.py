"""Rows of a prompt whose embeddings the user gave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GIVEN_ROWS = "given_rows"  # the name among model inputs under which `GivenRows` travel


@dataclass(frozen=True)
class GivenRows:
    """Rows of a prompt whose embeddings the user gave.

    Args:
        mask: [B, N] bool, the places of the rows in the padded batch.
        features: [K, C], the rows in order.
        modality: [K] int8, a `Modality`.
        part: [K] int64, which part a row belongs to.
    """

    mask: Tensor
    features: Tensor
    modality: Tensor
    part: Tensor

    def repeated(self, copies: int) -> GivenRows:
        """Every sequence so many times in a row, as beams repeat a batch; copies are parts of their own."""
        rows = torch.arange(len(self.part), device=self.part.device).split(self.mask.sum(1).tolist())
        order = torch.cat([own for own in rows for _ in range(copies)])
        copy = torch.cat([torch.full_like(own, n) for own in rows for n in range(copies)])
        return GivenRows(
            self.mask.repeat_interleave(copies, 0),
            self.features[order],
            self.modality[order],
            self.part[order] + copy * (int(self.part.max()) + 1),
        )
