"""Attention over entries whose heads differ in number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from mminfer_kernels import packed_prompt_attention
from torch import Tensor

from mminfer.forward.attention import Visibility, causal_attention
from mminfer.technique import CacheEntries


def of_heads(lengths: Sequence[int], visible: Visibility) -> Iterator[tuple[int, Visibility]]:
    """For each head its entries, and which of them each query sees.

    Args:
        lengths: entries of each head; the queries' own are the last of all.
        visible: the same for the longest head.
    """
    longest = max(lengths)
    for length in lengths:
        less, index, last_key = longest - length, visible.query_index, visible.last_key
        yield (
            length,
            replace(
                visible,
                query_index=None if index is None else index - less,
                last_key=None if last_key is None else last_key - less,
            ),
        )


def packed_attention(q: Tensor, entries: CacheEntries, scale: float, visible: Visibility) -> Tensor:
    """[1, H, S, D]: a prompt's attention over packed entries.

    Args:
        q: [1, H, S, D].
        entries: packed, those of the queries' rows last in each head.
        scale: factor of the logits.
        visible: which entries of the longest head each query sees.
    """
    if visible.last_key is None and visible.window is None:
        return _in_one_call(q, entries, scale, visible.query_index)
    heads = entries.heads()
    out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)  # as the host reads it next
    parts = zip(
        q.chunk(len(heads), 1), out.chunk(len(heads), 1), heads, of_heads(entries.lengths, visible), strict=True
    )
    for q_head, out_head, head, (_, own) in parts:
        out_head.copy_(causal_attention(q_head, head.keys, head.values, scale, own, head.log_mass))
    return out


def _in_one_call(q: Tensor, entries: CacheEntries, scale: float, query_index: Tensor | None) -> Tensor:
    """The same where each query sees its own place and all before it."""
    lengths = entries.lengths
    first, of_all = (torch.tensor(x).to(q.device, non_blocking=True) for x in ([0, *accumulate(lengths[:-1])], lengths))
    mass = entries.log_mass
    from_end = None if query_index is None else query_index - max(lengths)
    keys, values = entries.keys[0, 0], entries.values[0, 0]
    return packed_prompt_attention(
        q, keys, values, first, of_all, scale, from_end, None if mass is None else mass[0, 0]
    )
