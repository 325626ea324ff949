"""Pieces of all layers' entries become fewer together: what is alike is joined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot, pad

from mminfer.cache import digest_rules
from mminfer.cache.digest_at_once import digested_at_once
from mminfer.cache.digest_rules import Piece, Rule, sizes_of
from mminfer.technique import CacheEntries

KEPT_ALIKE = 0.5  # what pieces that go together keep, at least, as a share of the most: the rest is padding
# Cosines at a time, each to each: on a CPU no more than its cache holds.
COSINES_ON_CPU, COSINES = 1 << 18, 1 << 26
AT_ONCE_ON = frozenset({"cuda"})  # devices that would wait for launches: see `digested_at_once`


class _Place(NamedTuple):
    """A piece that becomes shorter.

    Args:
        layer: of which layer.
        piece: which of its entries.
        into: where what is left of it begins among all that is left.
    """

    layer: int
    piece: Piece
    into: int


class _Left(NamedTuple):
    """Entries that are left, side by side.

    Args:
        into: [K] int64, on the CPU: where each goes among all that is left; -1: nowhere, it fills up.
        place: [G, K] int64, the entry of its layer at which each stands.
        keys: [G, K, D].
        values: [G, K, D].
        size: [G, K], how many each stands for.
    """

    into: Tensor
    place: Tensor
    keys: Tensor
    values: Tensor
    size: Tensor


def digested(layers: Sequence[CacheEntries], pieces: Sequence[Sequence[Piece]], rule: Rule) -> list[CacheEntries]:
    """What is left of all layers' entries, in their order.

    Args:
        layers: on one device; their `size` is how many entries of the prompt each stands for, without it one each.
        pieces: of each layer, none of which overlap; what is in none is dropped.
        rule: how they become fewer.
    """
    if rule == Rule() and layers[0].keys.device.type in AT_ONCE_ON:
        return digested_at_once(layers, pieces)
    found: list[_Left] = []
    shorter: dict[int, list[_Place]] = {}
    lengths, begun = [sum(piece.kept for piece in own) for own in pieces], 0
    for layer, own in enumerate(pieces):
        whole = []
        for piece in sorted(own):
            if piece.kept == piece.length:
                whole.append(_Place(layer, piece, begun))
            else:
                shorter.setdefault(piece.length, []).append(_Place(layer, piece, begun))
            begun += piece.kept
        found += [_as_they_are(layers[layer], whole)] if whole else []
    for alike in shorter.values():
        batches = _batches(alike, layers[0].keys.shape[1], layers[0].keys.device.type == "cpu")
        with torch.autocast(layers[0].keys.device.type, enabled=False):
            found += [_clustered(layers, batch, rule) for batch in batches]
    into = torch.cat([left.into for left in found])
    order = torch.empty(begun, dtype=torch.int64)
    order[into[into >= 0]] = (into >= 0).nonzero()[:, 0]
    order = order.to(layers[0].keys.device, non_blocking=True)
    columns = [torch.cat(column, 1).index_select(1, order)[None] for column in list(zip(*found, strict=True))[1:]]
    of_layers = zip(layers, *(column.split(lengths, 2) for column in columns), strict=True)
    return [entries.merged(*own) for entries, *own in of_layers]


def _as_they_are(entries: CacheEntries, whole: Sequence[_Place]) -> _Left:
    """Pieces of one layer that keep all they have."""
    rows = torch.cat([torch.arange(p.first, p.first + p.length) for _, p, _ in whole])
    into = torch.cat([torch.arange(start, start + p.length) for _, p, start in whole])
    there = rows.to(entries.keys.device, non_blocking=True)
    taken = [x.index_select(1, there) for x in (entries.keys[0], entries.values[0], sizes_of(entries))]
    return _Left(into, there.expand(entries.keys.shape[1], -1), *taken)


def _batches(alike: Iterable[_Place], groups: int, on_cpu: bool) -> Iterator[list[_Place]]:
    """Pieces of one length that become fewer together, those of a layer side by side."""
    batch: list[_Place] = []
    for place in sorted(alike, key=lambda place: place.piece.kept, reverse=True):
        most = COSINES_ON_CPU if on_cpu else COSINES
        full = (len(batch) + 1) * groups * place.piece.length**2 > most
        if batch and (full or place.piece.kept < KEPT_ALIKE * batch[0].piece.kept):
            yield sorted(batch)
            batch = []
        batch.append(place)
    if batch:
        yield sorted(batch)


def _clustered(layers: Sequence[CacheEntries], batch: Sequence[_Place], rule: Rule) -> _Left:
    """Pieces of one length n, R of them, as fewer entries each."""
    length, kept = batch[0].piece.length, torch.tensor([p.piece.kept for p in batch])
    blocks = []
    for layer, own in groupby(batch, key=lambda p: p.layer):
        index = torch.tensor([p.piece.first for p in own])[:, None] + torch.arange(length)
        entries, index = layers[layer], index.to(layers[layer].keys.device, non_blocking=True)
        columns = (entries.keys[0], entries.values[0], sizes_of(entries))
        blocks.append((index.expand(entries.keys.shape[1], *index.shape), *(x[:, index] for x in columns)))
    place, keys, values, size = (torch.cat(column, 1) for column in zip(*blocks, strict=True))  # [G, R, n, ...]
    groups, runs, n, width = keys.shape
    turn = torch.arange(int(kept.max()))
    valid = turn < kept[:, None]  # [R, m]
    into = torch.tensor([p.into for p in batch])[:, None] + turn
    there = valid.to(keys.device, non_blocking=True)
    alike = normalize(torch.cat([normalize(keys.float(), dim=-1), normalize(values.float(), dim=-1)], -1), dim=-1)
    if rule.spread == "farthest":
        centre = digest_rules.farthest_first(alike @ alike.mT, len(turn))
    else:
        even = ((turn.float() + 0.5) * n / kept[:, None]).long().clamp_max(n - 1)
        centre = even.to(keys.device, non_blocking=True).expand(groups, runs, len(turn))
    if rule.join:
        keys, values, size = _joined(keys, values, size, alike, centre, there)
    else:
        wide = centre[..., None].expand(*centre.shape, width)
        keys, values = keys.gather(2, wide), values.gather(2, wide)
        size = size.sum(2, keepdim=True) / kept[:, None].to(keys.device, non_blocking=True)  # each stands for as many
        size = size.expand(centre.shape)
    order = centre.where(there, n).argsort(-1)
    wide = order[..., None].expand(*order.shape, width)
    place, size = place.gather(2, centre).gather(2, order), size.gather(2, order)
    found = (place, keys.gather(2, wide), values.gather(2, wide), size)
    return _Left(into.where(valid, -1).flatten(), *(x.flatten(1, 2) for x in found))


def _joined(
    keys: Tensor, values: Tensor, size: Tensor, alike: Tensor, centre: Tensor, there: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, weighted by size, of the entries nearest to each of the centres that are there, m among n."""
    likeness = alike @ alike.gather(2, centre[..., None].expand(*centre.shape, alike.shape[-1])).mT
    near = likeness.masked_fill(~there[:, None], -torch.inf).argmax(-1)
    n, m = alike.shape[2], centre.shape[-1]
    turn = torch.arange(m, device=near.device).expand(centre.shape)
    near = pad(near, (0, 1)).scatter(2, centre.where(there, n), turn)[..., :n]  # itself, among equals
    weight = one_hot(near, m).to(size.dtype) * size[..., None]  # [G, R, n, m]
    grown = weight.sum(2)
    keys, values = ((weight.mT @ x.float() / grown[..., None]).to(x.dtype) for x in (keys, values))
    return keys, values, grown
