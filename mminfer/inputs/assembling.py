"""Assembling: the model inputs of one piece after the other, and what was read by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mminfer.inputs.content import PendingPart
from mminfer.inputs.cutting import Piece
from mminfer.inputs.model_inputs import InputBuilder
from mminfer.inputs.transcript import Transcript
from mminfer.layout import GIVEN_ROWS
from mminfer.models.adapter import ModelAdapter

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


class Assembling:
    """Makes model inputs of pieces of one chat, in order. Media that were not open are opened for it.

    Attributes:
        rendered: the text of the chat as far as it was handed out.
        ids: its token ids as far as they were handed out.
        unread: token ids that were generated before and not handed out yet.

    Args:
        builder: makes inputs.
        adapter: knows positions.
        transcript: what was read before; answers that were cut short go in with the first piece.
    """

    def __init__(self, builder: InputBuilder, adapter: ModelAdapter, transcript: Transcript) -> None:
        self._builder, self._adapter = builder, adapter
        self.rendered, self.ids = transcript.rendered, list(transcript.ids)
        self.unread = list(transcript.unread)

    def inputs(self, piece: Piece) -> dict[str, Any]:
        """Of one sequence without padding, at the host's positions from 0 on."""
        parts = [part.load() if isinstance(part, PendingPart) else part for part in (*piece.media, *piece.embeddings)]
        inputs = self._builder.piece(piece.text, parts, first=not self.rendered)
        if self.unread and self.unread != inputs["input_ids"][0, :1].tolist():
            inputs = _prefixed(inputs, self.unread)
        self.unread = []
        ids: Tensor = inputs["input_ids"]
        inputs["attention_mask"] = None  # one sequence, which is not padded
        positions = self._adapter.host_positions(inputs, torch.ones_like(ids, dtype=torch.bool))[:, None]
        inputs["position_ids"] = positions if self._adapter.position_axes > 1 else positions[0]
        self.rendered += piece.text
        self.ids += ids[0].tolist()
        return inputs


def _prefixed(inputs: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
    """Inputs with tokens of text in front."""
    ids: Tensor = inputs["input_ids"]
    longer = {"input_ids": torch.cat([ids.new_tensor([token_ids]), ids], 1)}
    for name in TOKEN_TYPES:
        if name in inputs:
            longer[name] = _zeros_before(inputs[name], len(token_ids))
    if GIVEN_ROWS in inputs:
        rows = inputs[GIVEN_ROWS]
        longer[GIVEN_ROWS] = replace(rows, mask=_zeros_before(rows.mask, len(token_ids)))
    return {**inputs, **longer}


def _zeros_before(values: Tensor, count: int) -> Tensor:
    return torch.cat([values.new_zeros(1, count), values], 1)
