"""Embeddings that the user gave: which rows of a prompt they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mminfer.errors import InputError
from mminfer.inputs.parts import EmbeddingPart
from mminfer.layout import GivenRows, Modality

_MODALITIES = {"visual": Modality.IMAGE, "text": Modality.TEXT}


def given_rows(input_ids: Tensor, mask: Tensor | None, filler_id: int, parts: Sequence[EmbeddingPart]) -> GivenRows:
    """Where the embeddings of these parts, in order, stand in the prompt.

    Args:
        input_ids: [B, N].
        mask: [B, N], 0 at padding; None: no padding.
        filler_id: the token that stands for a row.
        parts: in the order of the prompt.

    Raises:
        InputError: the template dropped some.
    """
    places = input_ids == filler_id if mask is None else (input_ids == filler_id) & mask.bool()
    lengths = [len(part) for part in parts]
    if int(places.sum()) != sum(lengths):
        raise InputError(
            f"the model's chat template shows {int(places.sum())} of {sum(lengths)} rows of the embeddings: this model "
            "takes none"
        )
    modality = torch.tensor([int(_MODALITIES[part.modality]) for part in parts], dtype=torch.int8)
    repeats = torch.tensor(lengths)
    return GivenRows(
        places,
        torch.cat([part.embedding.to(input_ids.device) for part in parts]),
        modality.repeat_interleave(repeats).to(input_ids.device),
        torch.repeat_interleave(repeats).to(input_ids.device),
    )
