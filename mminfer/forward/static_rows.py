"""A layer's cache as rows that stay where they are in memory, and the attention of one new token over them."""

from __future__ import annotations

from typing import NamedTuple

from mminfer_kernels import packed_decode_attention
from torch import Tensor


class StaticRows(NamedTuple):
    """Keys and values of a layer, at places that change only when the layer needs more room.

    Args:
        keys: [R, D], whole buffers, spare rows included.
        values: [R, D].
        first: [B, G] int64, the row at which each sequence's and head's entries begin.
        lengths: [B, G] int64, how many there are.
        log_mass: [R] float32, added to the logits; None: nothing is.
        most: entries a head for which there is room.
    """

    keys: Tensor
    values: Tensor
    first: Tensor
    lengths: Tensor
    log_mass: Tensor | None
    most: int

    def attend(self, new_rows: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Writes one new entry of each head and attends to all; nothing here depends on the step but values of tensors.

        Args:
            new_rows: [B * G] int64, where the new entries go; `lengths` has them counted in.
            q: [B, H, 1, D].
            k: [B, G, 1, D], of the new entries.
            v: [B, G, 1, D].
            scale: factor of the scores.
            window: the query sees its last `window` keys only; None: all.
        """
        keys, values, first, lengths, log_mass, most = self
        keys.index_copy_(0, new_rows, k.reshape(-1, k.shape[-1]).to(keys.dtype))
        values.index_copy_(0, new_rows, v.reshape(-1, v.shape[-1]).to(values.dtype))
        if window is not None and most > window:
            seen, most = lengths.clamp_max(window), window
            first, lengths = first + lengths - seen, seen
        return packed_decode_attention(q, keys, values, first, lengths, scale, log_mass, most)
