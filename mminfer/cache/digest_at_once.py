"""Pieces of several layers' entries become fewer at once, by few launches: as a GPU does it, farthest first and joined.

What each entry joins is told while the centres are chosen, so that nothing is compared twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from mminfer_kernels import k_centres
from torch import Tensor
from torch.nn.functional import normalize

from mminfer.cache.digest_rules import Piece, parts_of, sizes_of
from mminfer.technique import CacheEntries

MOST_BYTES = 1 << 27  # of their entries; what becomes of them takes a few times as much
COSINES = 1 << 26  # at a time, each to each
LENGTHS_ALIKE = 0.5  # of pieces that go together, the shortest as a part of the longest: the rest is padding


class _Place(NamedTuple):
    """A piece.

    Args:
        first: where it begins among the entries of all layers.
        length: how many entries it has.
        kept: how many are to be left.
        into: where these begin among all that is left.
    """

    first: int
    length: int
    kept: int
    into: int


class _Left(NamedTuple):
    """Entries that are left, side by side.

    Args:
        into: [K] int64, on the CPU: where each goes among all that is left; -1: nowhere, it fills up.
        place: [G, K] int64, the entry at which each stands.
        both: [G, K, 2 D], keys and values.
        size: [G, K], how many each stands for.
    """

    into: Tensor
    place: Tensor
    both: Tensor
    size: Tensor


def digested_at_once(layers: Sequence[CacheEntries], pieces: Sequence[Sequence[Piece]]) -> list[CacheEntries]:
    """As `digested`, by its default rule: what is left of all layers' entries, in their order."""
    largest = max(entries.keys.nbytes + entries.values.nbytes for entries in layers)
    parts = parts_of(len(layers), largest, MOST_BYTES)
    return [kept for part in parts for kept in _of_part(layers[part], pieces[part])]


def _of_part(layers: Sequence[CacheEntries], pieces: Sequence[Sequence[Piece]]) -> list[CacheEntries]:
    """Layers that are side by side in memory."""
    begins = [0, *accumulate(map(len, layers))][:-1]
    moved = [
        piece._replace(first=begin + piece.first)
        for begin, own in zip(begins, pieces, strict=True)
        for piece in sorted(own)
    ]
    ends = list(accumulate((piece.kept for piece in moved), initial=0))
    places = [_Place(*piece, into) for piece, into in zip(moved, ends[:-1], strict=True)]
    both = torch.cat([_and_nothing([getattr(e, name)[0] for e in layers]) for name in ("keys", "values")], -1)
    size = _and_nothing([sizes_of(entries) for entries in layers])
    with torch.autocast(both.device.type, enabled=False):
        found = [_clustered(both, size, batch) for batch in _batches(places, both.shape[0])]
    if whole := [place for place in places if place.kept == place.length]:
        found.append(_as_they_are(both, size, whole))
    into = torch.cat([left.into for left in found])
    order = torch.empty(ends[-1], dtype=torch.int64)
    order[into[into >= 0]] = (into >= 0).nonzero()[:, 0]
    order = order.to(both.device, non_blocking=True)
    place, both, size = (torch.cat(column, 1).index_select(1, order) for column in list(zip(*found, strict=True))[1:])
    columns = _others(layers, place)
    width = layers[0].keys.shape[3]
    columns |= {"keys": both[None, :, :, :width], "values": both[None, :, :, width:], "size": size[None]}
    lengths = [sum(piece.kept for piece in own) for own in pieces]
    of_layers = {name: None if x is None else x.split(lengths, 2) for name, x in columns.items()}
    return [CacheEntries.of({n: None if x is None else x[i] for n, x in of_layers.items()}) for i in range(len(layers))]


def _and_nothing(columns: Sequence[Tensor]) -> Tensor:
    """[G, N + 1, ...]: a column of all layers' entries, and a last one that is nothing, to pad pieces with."""
    nothing = columns[0].new_zeros((1,) * columns[0].dim())
    return torch.cat([*columns, nothing.expand_as(columns[0][:, :1])], 1)


def _others(layers: Sequence[CacheEntries], place: Tensor) -> dict[str, Tensor | None]:
    """Columns [1, G, K] beside keys, values and sizes, at these places ([G, K]) of all layers' entries."""
    out: dict[str, Tensor | None] = {}
    for name in layers[0].columns:
        held = [column for entries in layers if (column := entries.columns[name]) is not None]
        if name not in ("keys", "values", "size") and len(held) == len(layers):
            out[name] = torch.cat(held, 2).gather(2, place[None])
    return out


def _as_they_are(both: Tensor, size: Tensor, whole: Sequence[_Place]) -> _Left:
    """Pieces that keep all they have."""
    rows = torch.cat([torch.arange(p.first, p.first + p.length) for p in whole])
    into = torch.cat([torch.arange(p.into, p.into + p.length) for p in whole])
    there = rows.to(both.device, non_blocking=True)
    return _Left(into, there.expand(both.shape[0], -1), both.index_select(1, there), size.index_select(1, there))


def _batches(places: Sequence[_Place], groups: int) -> Iterator[Sequence[_Place]]:
    """Pieces that become fewer, as many as go together."""
    batch: list[_Place] = []
    shorter = [place for place in places if place.kept < place.length]
    for place in sorted(shorter, key=lambda place: place.length, reverse=True):
        longest = batch[0].length if batch else place.length
        full = (len(batch) + 1) * groups * longest**2 > COSINES
        if batch and (full or place.length < LENGTHS_ALIKE * longest):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _clustered(both: Tensor, size: Tensor, batch: Sequence[_Place]) -> _Left:
    """Pieces of n entries at most, R of them, as fewer entries each: m at most."""
    firsts, lengths, kept, into = torch.tensor(batch).unbind(1)
    turn, along = torch.arange(int(kept.max())), torch.arange(batch[0].length)
    index = (firsts[:, None] + along).where(along < lengths[:, None], both.shape[1] - 1)
    sets = torch.stack([kept, lengths])[:, None].repeat(1, both.shape[0], 1)
    index, (counts, points) = (x.to(both.device, non_blocking=True) for x in (index, sets))
    rows = both[:, index].float()  # [G, R, n, 2 D]
    alike = normalize(normalize(rows.unflatten(-1, (2, -1)), dim=-1).flatten(-2), dim=-1)
    centre, owner = k_centres(alike @ alike.mT, counts, len(turn), points)
    weight = (owner[:, :, None] == centre[..., None]) * size[:, index][:, :, None]  # [G, R, m, n]
    grown = weight.sum(-1)
    joined = (weight @ rows).div_(grown[..., None]).to(both.dtype)
    place = (centre + index[:, :1]).flatten(1)
    into = (into[:, None] + turn).where(turn < kept[:, None], -1)
    return _Left(into.flatten(), place, joined.flatten(1, 2), grown.flatten(1))
