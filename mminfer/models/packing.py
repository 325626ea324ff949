"""Putting the rows of a prompt together: embeddings of tokens, and what stands in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from mminfer.layout import Modality, TokenLayout


class PackedRows:
    """Rows of a prompt while they are put together; text until something else is put in their place.

    What rows are is noted on the CPU; only what they hold is where the model is.

    Args:
        embeds: [T, C] embeddings of the token ids.
    """

    def __init__(self, embeds: Tensor) -> None:
        count = len(embeds)
        self.embeds = embeds
        self._modality = torch.zeros(count, dtype=torch.int8)
        self._image_id = torch.full((count,), -1)
        self._size = torch.ones(count, dtype=torch.float32)
        self._num_parts = 0
        self._companions: Tensor | None = None  # [T, K, C]
        self._stand_in: Tensor | None = None  # [T]

    def put(self, rows: Tensor, features: Tensor, modality: Tensor, part: Tensor, size: Tensor) -> None:
        """Embeddings ([K, C]) of some rows; on the CPU modality, part (counted from 0) and patches of each ([K])."""
        self.embeds = self.embeds.index_copy(0, self._there(rows), features.to(self.embeds))
        self._modality[rows] = modality.to(self._modality)
        visual = modality != Modality.TEXT
        self._image_id[rows[visual]] = (self._num_parts + part[visual]).to(self._image_id)
        self._size[rows] = size.to(self._size)
        self._num_parts += int(part.max()) + 1

    def accompany(self, rows: Tensor, companions: list[Tensor]) -> None:
        """What joins the hidden states of these rows behind the first layers, if the model has such features."""
        if not companions:
            return
        features = torch.cat(companions).to(self.embeds)  # [K, levels, C]
        if self._companions is None:
            self._companions = features.new_zeros(len(self.embeds), *features.shape[1:])
        self._companions.index_copy_(0, self._there(rows), features)

    def stand_in(self, rows: Tensor, back: Tensor) -> None:
        """Says of these rows ([K]) which others stand for them: those so many places back among them ([K])."""
        if self._stand_in is None:
            self._stand_in = torch.arange(len(self._image_id))
        self._stand_in[rows] = rows[torch.arange(len(rows)) - back]

    def _there(self, rows: Tensor) -> Tensor:
        return rows.to(self.embeds.device, non_blocking=True)

    def layout(self, sequence: Tensor, position: Tensor, next_position: Tensor) -> TokenLayout:
        visual = self._modality != Modality.TEXT
        return TokenLayout(
            sequence=sequence,
            modality=self._modality,
            image_id=self._image_id,
            size=self._size,
            source=torch.arange(len(sequence)),
            position=position,
            next_position=next_position,
            companions=None if self._companions is None else self._companions[self._there(visual.nonzero()[:, 0])],
            stand_in=self._stand_in,
        )
