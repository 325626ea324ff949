"""Which entries are fitted together: what heads hold of stretches, of all layers, in batches of about one size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mminfer.cache.replay_fit import Asked, fitted
from mminfer.technique import NOTHING, CacheEntries, ReplayedStretch, by_device

# The smallest of what is fitted together, as a share of the largest: the rest is padding.
ALIKE_ENTRIES, ALIKE_KEPT = 0.9, 0.25
# Weights of a query and an entry at a time: on a CPU no more than its cache holds, since one head keeps it busy.
WEIGHTS_ON_CPU, WEIGHTS = 1 << 16, 1 << 26


class _Part(NamedTuple):
    """What one head holds of one stretch, where something leaves it.

    Args:
        stretch: what looked at it.
        keys: [n, D].
        values: [n, D].
        head: which key/value head.
        begin: where it begins among all entries of all layers.
        first: the first of its entries that stay among all that stay.
        kept: how many do.
    """

    stretch: ReplayedStretch
    keys: Tensor
    values: Tensor
    head: int
    begin: int
    first: int
    kept: int

    @property
    def ahead(self) -> int:
        """How many other entries its queries read beside it; all of them stay."""
        return 0 if self.stretch.earlier is None else self.stretch.earlier.keys.shape[1]

    @property
    def entries(self) -> int:
        return self.ahead + len(self.keys)

    @property
    def queries(self) -> Tensor:
        """[R, D], those that look with its head."""
        return self.stretch.queries.unflatten(0, (self.stretch.peaks.shape[0], -1))[self.head].flatten(0, 1)

    @property
    def kind(self) -> tuple[object, ...]:
        """What parts have in common that are fitted together."""
        queries, scale = self.stretch.queries, self.stretch.scale
        return (queries.shape[1:], len(queries) // self.stretch.peaks.shape[0], scale, self.keys.dtype)


def fitted_together(
    layers: Sequence[CacheEntries],
    looked: Sequence[Sequence[ReplayedStretch]],
    keep: Sequence[Tensor],
    kept: Sequence[CacheEntries],
) -> list[CacheEntries]:
    """What stays of each layer, with values and log-masses fitted to what replayed queries read in their stretch.

    Args:
        layers: all entries of each; those that stretches hold are the last.
        looked: the stretches of each layer.
        keep: of each layer [S] bool, on the CPU, head behind head: which entries stay.
        kept: of each layer those, packed.
    """
    out = list(kept)
    for own in by_device(layers):
        parts = _parts([layers[i] for i in own], [looked[i] for i in own], [keep[i] for i in own])
        if not parts:
            continue
        weighed = [kept[i].weighed() for i in own]
        values = torch.cat([entries.values[0, 0] for entries in weighed])
        mass = torch.cat([there[0, 0] for entries in weighed if (there := entries.log_mass) is not None])
        places = torch.cat([keep[i] for i in own]).nonzero()[:, 0]
        for batch in _batches(parts):
            (_fit if len(batch) > 1 else _fit_one)(batch, places, values, mass)
        sizes = [len(entries) for entries in weighed]
        for i, entries, *columns in zip(own, weighed, values.split(sizes), mass.split(sizes), strict=True):
            new_values, new_mass = (column[None, None] for column in columns)
            out[i] = replace(entries, values=new_values, log_mass=new_mass)
    return out


def _parts(
    layers: Sequence[CacheEntries], looked: Sequence[Sequence[ReplayedStretch]], keep: Sequence[Tensor]
) -> list[_Part]:
    """What something leaves; arguments as `fitted_together`'s."""
    begun, found = 0, []
    for entries, stretches in zip(layers, looked, strict=True):
        fresh = entries.last(stretches[-1].last).unpacked()
        for head, length in enumerate(entries.lengths):
            for stretch in stretches:
                rows = slice(stretch.first, stretch.last)
                begin = begun + length - stretches[-1].last + stretch.first
                found.append(_Part(stretch, fresh.keys[0, head, rows], fresh.values[0, head, rows], head, begin, 0, 0))
            begun += length
    before = torch.cat([keep[0].new_zeros(1), *keep]).cumsum(0)
    begins = torch.tensor([part.begin for part in found])
    ends = begins + torch.tensor([len(part.keys) for part in found])
    counted = zip(found, before[begins].tolist(), before[ends].tolist(), strict=True)
    return [part._replace(first=a, kept=b - a) for part, a, b in counted if 0 < b - a < len(part.keys)]


def _batches(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Parts that are fitted together."""
    kinds: dict[object, list[_Part]] = {}
    for part in parts:
        kinds.setdefault(part.kind, []).append(part)
    for kind in kinds.values():
        for same in _alike(kind, lambda part: part.entries, ALIKE_ENTRIES):
            weights = WEIGHTS_ON_CPU if same[0].keys.device.type == "cpu" else WEIGHTS
            most = max(1, weights // max(len(same[0].queries) * same[0].entries, 1))
            for own in _alike(same, lambda part: part.ahead + part.kept, ALIKE_KEPT):
                yield from (own[i : i + most] for i in range(0, len(own), most))


def _alike(parts: Iterable[_Part], size: Callable[[_Part], int], share: float) -> Iterator[list[_Part]]:
    """The parts by size, the largest first, those together that have at least a share of the first of them."""
    own: list[_Part] = []
    for part in sorted(parts, key=size, reverse=True):
        if own and size(part) < share * size(own[0]):
            yield own
            own = []
        own.append(part)
    if own:
        yield own


def _fit(parts: Sequence[_Part], places: Tensor, values: Tensor, mass: Tensor) -> None:
    """Writes fitted values and log-masses for the entries of some parts that stay.

    Args:
        parts: these.
        places: [K] int64, on the CPU: all entries that stay, among all of all layers.
        values: [K, D], written in place.
        mass: [K] float32, likewise.
    """
    device = values.device
    ahead, begin, first, kept = (
        torch.tensor(column)[:, None]
        for column in zip(*((p.ahead, p.begin, p.first, p.kept) for p in parts), strict=True)
    )
    turn = torch.arange(int((ahead + kept).max()))
    movable = (turn >= ahead) & (turn < ahead + kept)
    rows = (first + turn - ahead).clamp(0, len(places) - 1)  # among those that stay
    own = torch.where(movable, places[rows] - begin + ahead, turn.where(turn < ahead, 0))
    own, counts, may = (x.to(device, non_blocking=True) for x in (own, (ahead + kept)[:, 0], movable))
    queries, scale = torch.stack([p.queries for p in parts]), parts[0].stretch.scale
    asked = Asked(queries, _joined(parts, "keys"), _joined(parts, "values"), own, counts, may, scale, _masses(parts))
    with torch.autocast(device.type, enabled=False):
        new_values, new_mass = fitted(asked)
    found, into = (x.to(device, non_blocking=True) for x in (movable.flatten().nonzero()[:, 0], rows[movable]))
    values.index_copy_(0, into, new_values.flatten(0, 1).index_select(0, found).to(values.dtype))
    mass.index_copy_(0, into, new_mass.flatten().index_select(0, found))


def _fit_one(parts: Sequence[_Part], places: Tensor, values: Tensor, mass: Tensor) -> None:
    """`_fit` of a single part, without what pads several, whose bookkeeping would show on a CPU."""
    (part,) = parts
    device, into = values.device, slice(part.first, part.first + part.kept)
    own = torch.cat([torch.arange(part.ahead), places[into] + (part.ahead - part.begin)])
    movable = torch.ones(1, len(own), dtype=torch.bool)
    movable[0, : part.ahead] = False
    own, counts, may = (x.to(device, non_blocking=True) for x in (own[None], torch.tensor([len(own)]), movable))
    keys, said = (_joined(parts, name) if part.ahead else getattr(part, name)[None] for name in ("keys", "values"))
    with torch.autocast(device.type, enabled=False):
        found = fitted(Asked(part.queries[None], keys, said, own, counts, may, part.stretch.scale, _masses(parts)))
    values[into], mass[into] = (
        column[0, part.ahead :].to(x.dtype) for column, x in zip(found, (values, mass), strict=True)
    )


def _joined(parts: Sequence[_Part], name: str) -> Tensor:
    """[P, N, D]: keys or values of all entries of each part; shorter ones are filled up by their last."""
    pieces = []
    for part in parts:
        if part.stretch.earlier is not None:
            pieces.append(getattr(part.stretch.earlier, name)[part.head])
        pieces.append(getattr(part, name))
    return _filled(torch.cat(pieces), [part.entries for part in parts])


def _masses(parts: Sequence[_Part]) -> Tensor | None:
    """[P, N] float32: log-masses of the same, `NOTHING` for what fills up; None: all are 0."""
    sizes, earlier = [part.entries for part in parts], [part.stretch.earlier for part in parts]
    if len(set(sizes)) == 1 and all(x is None or x.log_mass is None for x in earlier):
        return None
    longest, device = max(sizes), parts[0].keys.device
    beyond = torch.arange(longest) >= torch.tensor(sizes)[:, None]
    mass = torch.zeros(beyond.shape, dtype=torch.float32).masked_fill_(beyond, NOTHING)
    mass = mass.to(device, non_blocking=True)
    for own, part, before in zip(mass, parts, earlier, strict=True):
        if before is not None and before.log_mass is not None:
            own[: part.ahead] = before.log_mass[part.head]
    return mass


def _filled(flat: Tensor, sizes: Sequence[int]) -> Tensor:
    """[P, N, D]: of rows of so many in turn, each with rows of its own; shorter ones are filled up by their last."""
    if len(set(sizes)) == 1:
        return flat.unflatten(0, (len(sizes), sizes[0]))
    ends = torch.tensor(sizes).cumsum(0)[:, None]
    rows = (ends - torch.tensor(sizes)[:, None] + torch.arange(max(sizes))).minimum(ends - 1)
    return flat[rows.to(flat.device, non_blocking=True)]
