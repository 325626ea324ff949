"""Entries of a first pass, behind which nothing lies: all layers are chosen from together, and not one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from mminfer.cache.replay_rules import scores_at_rest, side_by_side
from mminfer.technique import CacheEntries

COLUMNS = {"keys", "values", "is_visual", "score"}


def nothing_before(layers: Sequence[CacheEntries], counts: Sequence[int]) -> bool:
    """Whether all entries are new, of one device, and have the columns that `Replay` asks for alone.

    Args:
        layers: the entries.
        counts: of each layer, how many entries of a head are new.
    """
    return len({entries.keys.device for entries in layers}) == 1 and all(
        not entries.is_packed
        and len(entries) == count
        and {name for name, x in entries.columns.items() if x is not None} == COLUMNS
        for entries, count in zip(layers, counts, strict=True)
    )


def head_by_head(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """[S]: scores [G, N] of layers side by side, with so many entries a head each, head behind head of each layer."""
    if len(set(counts)) == 1:
        return scores.unflatten(1, (len(counts), counts[0])).transpose(0, 1).flatten()
    heads = torch.arange(0, scores.numel(), scores.shape[1])[:, None]
    begins = accumulate(counts[:-1], initial=0)
    places = [(heads + begin + torch.arange(n)).flatten() for begin, n in zip(begins, counts, strict=True)]
    return scores.flatten()[torch.cat(places).to(scores.device, non_blocking=True)]


def scored(layers: Sequence[CacheEntries], flat: Tensor) -> list[CacheEntries]:
    """The entries of all layers with these scores ([S], as `head_by_head` has them)."""
    own = flat.split([entries.total for entries in layers])
    return [replace(entries, score=x.view(entries.keys.shape[:3])) for entries, x in zip(layers, own, strict=True)]


def select_together(layers: Sequence[CacheEntries], keep: Tensor, flat: Tensor) -> list[CacheEntries]:
    """What stays of each layer, packed, with scores at rest and log-masses of 0.

    Args:
        layers: all entries, heads alike; what is visual is so in all heads.
        keep: [S] bool, on the CPU, head behind head.
        flat: [S] float32, their scores.
    """
    device, places = flat.device, keep.nonzero()[:, 0]
    totals, counts = [entries.total for entries in layers], [len(entries) for entries in layers]
    lengths = _kept_of_heads(keep, [n for entries in layers for n in entries.lengths])
    heads = len(layers[0].lengths)
    of_layers = [tuple(lengths[i : i + heads]) for i in range(0, len(lengths), heads)]
    sizes = [sum(own) for own in of_layers]
    layer = torch.arange(len(layers)).repeat_interleave(torch.tensor(sizes))
    within = places - torch.tensor([0, *accumulate(totals[:-1])])[layer]
    head, place = within // torch.tensor(counts)[layer], within % torch.tensor(counts)[layer]
    column = place + torch.tensor([0, *accumulate(counts[:-1])])[layer]
    places, head, place, column = (x.to(device, non_blocking=True) for x in (places, head, place, column))
    visual = side_by_side([entries.is_visual[0, 0] for entries in layers if entries.is_visual is not None])[column]
    score = scores_at_rest(flat[places], layers[0].keys.dtype)
    mass = flat.new_zeros(len(score))
    parts = zip(layers, of_layers, *(x.split(sizes) for x in (head, place, visual, score, mass)), strict=True)
    return [
        CacheEntries(
            keys=entries.keys[0][own_head, own_place][None, None],
            values=entries.values[0][own_head, own_place][None, None],
            is_visual=is_visual[None, None],
            score=own_score[None, None],
            log_mass=own_mass[None, None],
            head_lengths=kept,
        )
        for entries, kept, own_head, own_place, is_visual, own_score, own_mass in parts
    ]


def _kept_of_heads(keep: Tensor, lengths: Sequence[int]) -> list[int]:
    """How many of each head's entries stay."""
    before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
    return before[torch.tensor([0, *accumulate(lengths)])].diff().tolist()
