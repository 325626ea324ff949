"""Assembling: the model inputs of one piece after the other, and what was read by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mminfer.errors import InputError
from mminfer.inputs.content import PendingPart
from mminfer.inputs.cutting import Piece
from mminfer.inputs.joints import Joints
from mminfer.inputs.model_inputs import InputBuilder
from mminfer.inputs.parts import VideoPart
from mminfer.inputs.transcript import Transcript
from mminfer.layout import GIVEN_ROWS, GivenRows, Modality
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
        joints: know what the processor writes for media.
    """

    def __init__(self, builder: InputBuilder, adapter: ModelAdapter, transcript: Transcript, joints: Joints) -> None:
        self._builder, self._adapter, self._joints = builder, adapter, joints
        self._longest: int | None = None  # frames of the longest video of a piece
        self.rendered, self.ids = transcript.rendered, list(transcript.ids)
        self.unread = list(transcript.unread)

    def inputs(self, piece: Piece) -> dict[str, Any]:
        """Of one sequence without padding, at the host's positions from 0 on."""
        parts = [part.load() if isinstance(part, PendingPart) else part for part in (*piece.media, *piece.embeddings)]
        self._check_lengths([len(part.frames) for part in parts if isinstance(part, VideoPart)])
        inputs = self._builder.piece(piece.before + piece.text, parts, first=not self.rendered)
        if piece.dropped:
            inputs = _without_end(inputs, piece.dropped)
        read = inputs["input_ids"][0].tolist()
        if self.unread and self.unread != read[:1]:
            inputs, read = self._answered(inputs), self.unread + read
        self.unread = []
        ids: Tensor = inputs["input_ids"]
        inputs["attention_mask"] = None  # one sequence, which is not padded
        positions = self._adapter.host_positions(inputs, torch.ones(ids.shape, dtype=torch.bool))[:, None]
        inputs["position_ids"] = positions if self._adapter.position_axes > 1 else positions[0]
        self.rendered += piece.text
        self.ids += read
        return inputs

    def _check_lengths(self, frames: Sequence[int]) -> None:
        """Refuses videos of a piece that the processor would write another text for beside those of an earlier one."""
        if not frames:
            return
        if self._longest not in (None, max(frames)) and self._joints.pads_videos:
            raise InputError(
                f"a video of {max(frames)} frames after one of {self._longest}: what this model reads for a video "
                "depends on the longest one of the prompt, so that it cannot be read piece by piece: take as many "
                "frames of each, or leave prefill_chunk_size out"
            )
        self._longest = max(frames)

    def _answered(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs with the rest of an answer in front.

        An answer is text whatever its tokens are: a placeholder that the model chose goes in as the row of that token,
        and nobody looks for an image of it.
        """
        marks = self._builder.markers.added_ids & set(self.unread)
        if not marks:
            return _prefixed(inputs, self.unread)
        ids = inputs["input_ids"].new_tensor(self.unread)
        with torch.no_grad():
            rows = self._adapter.model.get_input_embeddings()(ids)
        longer = _prefixed(inputs, [self._builder.markers.plain_id] * len(ids))
        return {**longer, GIVEN_ROWS: _texts_before(rows, longer["input_ids"], longer.get(GIVEN_ROWS))}


def _texts_before(rows: Tensor, ids: Tensor, others: GivenRows | None) -> GivenRows:
    """Given rows of a prompt ([1, N]) that begins with such rows of text ([K, C]), and those behind them."""
    count, kind = len(rows), torch.int8
    if others is None:
        others = GivenRows(torch.zeros_like(ids, dtype=torch.bool), rows[:0], ids.new_empty(0, dtype=kind), ids[0, :0])
    mask = others.mask.clone()
    mask[:, :count] = True
    return GivenRows(
        mask,
        torch.cat([rows, others.features.to(rows)]),
        torch.cat([others.modality.new_full((count,), int(Modality.TEXT)), others.modality]),
        torch.cat([others.part.new_zeros(count), others.part + 1]),
    )


def _without_end(inputs: dict[str, Any], token_ids: Sequence[int]) -> dict[str, Any]:
    """Inputs without these tokens of text at their end."""
    ids: Tensor = inputs["input_ids"]
    count = ids.shape[1] - len(token_ids)
    if ids[0, count:].tolist() != list(token_ids):
        raise InputError(
            "the processor writes another text behind this medium than behind others, so that the prompt cannot be "
            "read piece by piece: leave prefill_chunk_size out"
        )
    shorter = {
        name: inputs[name][:, :count] for name in ("input_ids", "attention_mask", *TOKEN_TYPES) if name in inputs
    }
    if GIVEN_ROWS in inputs:
        rows = inputs[GIVEN_ROWS]
        shorter[GIVEN_ROWS] = replace(rows, mask=rows.mask[:, :count])
    return {**inputs, **shorter}


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
