"""Attention over entries whose heads differ in number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mminfer.forward.attention import Visibility, causal_attention
from mminfer.technique import CacheEntries

BLOCK_ELEMENTS = 1 << 24  # of the mask of log-masses, which is made for so many queries at a time


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
    """[1, H, S, D]: a prompt's attention over packed entries, head by head.

    Args:
        q: [1, H, S, D].
        entries: packed, those of the queries' rows last in each head.
        scale: factor of the logits.
        visible: which entries of the longest head each query sees.
    """
    heads = entries.heads()
    out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)  # as the host reads it next
    parts = zip(
        q.chunk(len(heads), 1), out.chunk(len(heads), 1), heads, of_heads(entries.lengths, visible), strict=True
    )
    for q_head, out_head, head, (_, own) in parts:
        if head.log_mass is None:
            out_head.copy_(causal_attention(q_head, head.keys, head.values, scale, own))
        else:
            out_head.copy_(_weighed_attention(q_head, head, scale, own))
    return out


def _weighed_attention(q: Tensor, head: CacheEntries, scale: float, visible: Visibility) -> Tensor:
    """[1, H, S, D]: the attention of one key/value head's queries, log-masses added to the logits."""
    entries, queries = len(head), q.shape[2]
    places, last_key = visible.query_index, visible.last_key
    if places is None:
        places = torch.arange(entries - queries, entries, device=q.device)
    reach, columns = places if last_key is None else last_key, torch.arange(entries, device=q.device)
    if head.log_mass is None:
        raise ValueError("entries without log-masses")
    mass, blocks, rows = head.log_mass[0, 0].to(q.dtype), [], max(1, BLOCK_ELEMENTS // entries)
    for block, ends, own in zip(q.split(rows, 2), reach.split(rows), places.split(rows), strict=True):
        hidden = columns > ends[:, None]
        if visible.window is not None:
            hidden |= columns <= own[:, None] - visible.window
        mask = mass.expand(len(ends), -1).masked_fill(hidden, -torch.inf)
        blocks.append(
            scaled_dot_product_attention(block, head.keys, head.values, attn_mask=mask, scale=scale, enable_gqa=True)
        )
    return torch.cat(blocks, 2)


# TAKEN OVER by the op of the same name once it is there; see decode.py.
@torch.no_grad()
def packed_decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    log_mass: Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """Attention of one new query of each sequence over packed segments.

    Args:
        q: [B, H, 1, D].
        keys: [R, D].
        values: [R, D].
        first: [B, G] int64, the row at which each segment begins.
        lengths: [B, G] int64, its entries.
        scale: factor of the logits.
        log_mass: [R] float32, added to the logits.
        longest: the largest of `lengths`.
    """
    groups, out = first.shape[1], torch.empty_like(q)
    per_group = q.shape[1] // groups
    for b, (starts, counts) in enumerate(zip(first.tolist(), lengths.tolist(), strict=True)):
        for g, (start, count) in enumerate(zip(starts, counts, strict=True)):
            heads, rows = slice(g * per_group, (g + 1) * per_group), slice(start, start + count)
            mask = None if log_mass is None else log_mass[rows].to(q.dtype)[None]
            own = q[b, heads].transpose(0, 1)  # the heads of a group as rows
            out[b, heads] = scaled_dot_product_attention(
                own, keys[rows][None], values[rows][None], attn_mask=mask, scale=scale
            ).transpose(0, 1)
    return out
