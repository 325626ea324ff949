"""The rule of `grow_regions` in plain PyTorch: in rounds, those join that are each other's best, by Ward's rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

COSINE_ROUNDING = 1e-5  # by which a float32 cosine of equal tokens may miss 1
CACHED = 1 << 18  # numbers gathered at a time: what a core's cache holds, with room for their partners
GATHERED = 1 << 24  # the same on a GPU


@dataclass(frozen=True, eq=False)
class Bounds:
    """How far regions grow.

    Args:
        threshold: mean cosine of a region's members to each other, at least; None: any.
        largest: patches of a region, at most; None: any number.
        group: [P] int64: regions are counted by it, and no pair joins two.
        spare: [groups] int64: how many regions each group has to lose; None: all.
    """

    threshold: float | None = None
    largest: int | None = None
    group: Tensor | None = None
    spare: Tensor | None = None


def row_dots(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """See `mminfer_kernels.row_dots`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    step = max(1, (CACHED if x.device.type == "cpu" else GATHERED) // max(1, x.shape[1]))
    pairs = zip(first.split(step), second.split(step), strict=True)
    return torch.cat([(x.index_select(0, a).to(wide).mul_(x.index_select(0, b))).sum(-1) for a, b in pairs])


def grow_regions(
    x: Tensor,
    sizes: Tensor,
    pairs: Tensor,
    threshold: float | None,
    largest: int | None,
    group: Tensor | None,
    spare: Tensor | None,
    block: Tensor | None,
) -> Tensor:
    """See `mminfer_kernels.grow_regions`."""
    bounds, units = Bounds(threshold, largest, group, spare), normalize(x.float(), dim=-1)
    found, joins = _Regions(units, sizes.float(), largest), _Joins(len(x), bounds, pairs.device)
    edges = found.within(torch.stack([pairs.amin(0), pairs.amax(0)]))
    dots = found.dots(edges)
    while edges.shape[1]:
        union = found.union(edges, dots)
        may = joins.undecided(edges, union.cost)
        if threshold is not None:
            may &= union.alike >= threshold - COSINE_ROUNDING
        kept = may.nonzero()[:, 0]
        edges, dots, cost = edges[:, kept], dots[kept], union.cost[kept]
        chosen = _mutual(edges, cost, len(x), block)
        joins.note(edges[:, chosen], cost[chosen])
        edges, dots = found.join(edges, dots, chosen, union.facts[kept[chosen]])
    return joins.owners()


class _Union(NamedTuple):
    """What is known of the unions of E pairs of regions.

    Attributes:
        facts: [E, 4], as of regions.
        cost: [E], how much each scatters beyond its parts.
        alike: [E], the mean cosine of its members, each with each other.
    """

    facts: Tensor
    cost: Tensor
    alike: Tensor


class _Regions:
    """Regions as they grow, each by its first member.

    Known of each are the sum of its members' unit vectors by size ([P, C]), and facts ([P, 4]): the square of this sum,
    its patches, and the sums of the members' own squares and squared sizes, which are no cosines of two.
    """

    def __init__(self, units: Tensor, sizes: Tensor, largest: int | None) -> None:
        self._largest, self._sums = largest, units.mul_(sizes[:, None])
        norms = self._sums.square().sum(-1)
        self._facts = torch.stack([norms, sizes, norms, sizes.square()], 1)
        self._label = torch.arange(len(units), device=units.device)

    def within(self, edges: Tensor) -> Tensor:
        """Those of the edges whose union is not too large."""
        return edges if self._largest is None else edges[:, self._facts[:, 1][edges].sum(0) <= self._largest]

    def dots(self, edges: Tensor) -> Tensor:
        """[E] float32: products of two regions' sums."""
        return row_dots(self._sums, edges[0], edges[1])

    def union(self, edges: Tensor, dots: Tensor) -> _Union:
        """Of the two regions of each edge."""
        parts = self._facts.index_select(0, edges.flatten()).view(2, -1, 4)
        facts = parts.sum(0)
        facts[:, 0] += 2 * dots
        norm, size, own, squares = facts.unbind(1)
        scatter = (parts[:, :, 0] / parts[:, :, 1]).sum(0)
        cost = (scatter - norm / size).clamp_min(COSINE_ROUNDING)  # equal tokens are equally good
        return _Union(facts, cost, (norm - own) / (size.square() - squares))

    def join(self, edges: Tensor, dots: Tensor, chosen: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
        """Joins the regions of some edges, no two of which touch; the edges that are left, and their products."""
        into, gone = edges[:, chosen]
        count, changed = len(self._label), torch.zeros_like(self._label, dtype=torch.bool)
        self._facts[into], self._label[gone], changed[into] = facts, into, True
        self._sums.index_add_(0, into, self._sums.index_select(0, gone))
        ends = self._label[edges]
        keys, place = (ends.amin(0) * count + ends.amax(0)).sort()
        ends = torch.stack([keys // count, keys % count])
        first = ends[0] != ends[1]
        first[1:] &= keys[1:] != keys[:-1]
        if self._largest is not None:
            first &= self._facts[:, 1][ends].sum(0) <= self._largest
        ends, dots = ends[:, first], dots[place[first]]
        stale = changed[ends].any(0).nonzero()[:, 0]
        if len(stale):
            dots[stale] = self.dots(ends[:, stale])
        return ends, dots


class _Joins:
    """The joins so far, and of which it is known that they stand or fall where a group may lose so many regions.

    A join costs at least what those before it cost that made its two regions.
    """

    def __init__(self, count: int, bounds: Bounds, device: torch.device) -> None:
        self._spare, self._group = bounds.spare, bounds.group
        self._height = torch.zeros(count, dtype=torch.float32, device=device)
        self._edges, self._costs = torch.empty(2, 0, dtype=torch.int64, device=device), self._height[:0]
        self._limit = None if self._spare is None else torch.where(self._spare > 0, torch.inf, -torch.inf)

    def undecided(self, edges: Tensor, cost: Tensor) -> Tensor:
        """[E] bool: the edges that may come to be joined yet."""
        if self._limit is None or self._group is None:
            return cost == cost  # what is not a number is never joined
        return torch.maximum(cost, self._height[edges].amax(0)) <= self._limit[self._group[edges[0]]]

    def note(self, edges: Tensor, cost: Tensor) -> None:
        """Takes joins of different regions down, the first end's to go on."""
        cost = torch.maximum(cost, self._height[edges].amax(0))
        self._height[edges[0]] = cost
        self._edges, self._costs = torch.cat([self._edges, edges], 1), torch.cat([self._costs, cost])
        if self._limit is None or self._group is None or self._spare is None:
            return
        counts = self._group[self._edges[0]].bincount(minlength=len(self._spare))
        full = counts >= self._spare.clamp_min(1)
        if bool(full.any()):
            last = (counts.cumsum(0) - counts + self._spare - 1)[full]
            self._limit[full] = self._costs[self._by_group()[last]]

    def owners(self) -> Tensor:
        """[P] int64: the first member of each one's region, by the joins that stand."""
        edges = self._edges
        if self._spare is not None and self._group is not None:
            order = self._by_group()
            group = self._group[edges[0, order]]
            counts = group.bincount(minlength=len(self._spare))
            place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[group]
            edges = edges[:, order[place < self._spare[group]]]
        owner = torch.arange(len(self._height), device=edges.device)
        owner[edges[1]] = edges[0]
        while not torch.equal(further := owner[owner], owner):
            owner = further
        return owner

    def _by_group(self) -> Tensor:
        """The joins by group, in each by cost."""
        order = self._costs.argsort(stable=True)
        return order if self._group is None else order[self._group[self._edges[0, order]].argsort(stable=True)]


def _mutual(edges: Tensor, cost: Tensor, count: int, block: Tensor | None) -> Tensor:
    """[n] int64: the edges that are the best of both their regions, or the first of equally good ones."""
    best = _least(edges, cost, count, torch.inf)
    equal = (best[edges] == cost).all(0).nonzero()[:, 0]
    ends, turn = edges[:, equal], equal
    if block is not None:
        turn = equal + (block[ends[0]] != block[ends[1]]) * edges.shape[1]
    return equal[(_least(ends, turn, count, torch.iinfo(turn.dtype).max)[ends] == turn).all(0)]


def _least(edges: Tensor, values: Tensor, count: int, most: float) -> Tensor:
    """[P]: the least value of each one's edges."""
    return values.new_full((count,), most).scatter_reduce_(0, edges.flatten(), values.repeat(2), "amin")
