"""Merging that follows content: neighbours in a picture's grid become one token as far as they are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from mminfer_kernels import merge_rows
from torch import Tensor
from torch.nn.functional import normalize

from mminfer.errors import ConfigError, shown
from mminfer.layout import TokenLayout
from mminfer.technique import MERGE_SHARES, MergeTechnique, check_fraction, is_number, is_whole
from mminfer.tokens.grid import Grid, grid_of

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec

GATHERED = 1 << 24  # numbers gathered at a time while regions are compared


@dataclass(frozen=True)
class RegionMerge(MergeTechnique):
    """Merging of neighbours in a picture's grid, region by region, as far as they are alike.

    Tokens left and right of each other, or above and below (in videos also one moment later), join into regions, the
    most alike first. What a picture shows decides how many there are: blanks, sky and walls collapse, text keeps its
    tokens. An area is told from text by its being one both ways: a pair joins only where two lines of it are alike, so
    that a word above the same word, or a digit beside its like, stays. The members of a region are alike on average,
    all with all, so that no chain of neighbours grows across a gradient. A region becomes one token, the mean of its
    patches, and stands where its middle one stood.

    Without a threshold likeness and the share asked for decide: regions grow anywhere, by Ward's rule, which grows
    small ones before large ones, until so many are left.

    Args:
        threshold: mean cosine of a region's members to each other, at least, in [-1, 1]; None: any.
        largest: patches of a region, at most; None: any number.
        ratio: fraction of a sequence's visual tokens below which merging does not go, in (0, 1]; None: no bound.
        across_frames: whether tokens of a video may also join those at the same place of the next frame. Only of
            frames with nothing between them in the prompt.

    Raises:
        ConfigError: a setting is out of range, or neither threshold nor ratio is given.

    Reference:
        Ours. The order of joining is Ward's (Hierarchical grouping to optimize an objective function, 1963), on unit
        vectors, between neighbours alone.

    Example:
        >>> RegionMerge()  # blanks and areas alone
        >>> RegionMerge(threshold=None, largest=None, ratio=0.15)  # a share of the tokens, whatever they show
    """

    threshold: float | None = 0.99
    largest: int | None = 4
    ratio: float | None = None
    across_frames: bool = False

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_fraction("RegionMerge.ratio", self.ratio)
        if self.threshold is not None and (not is_number(self.threshold, most=1) or self.threshold < -1):
            raise ConfigError(f"RegionMerge.threshold={shown(self.threshold)}, wanted a cosine from -1 to 1, or None")
        if self.largest is not None and not is_whole(self.largest, least=2):
            raise ConfigError(
                f"RegionMerge.largest={shown(self.largest)}, wanted a number of patches, 2 or more, or None"
            )
        if self.threshold is None and self.ratio is None:
            raise ConfigError("RegionMerge has neither threshold nor ratio, wanted one of them")
        if not isinstance(self.across_frames, bool):
            raise ConfigError(f"RegionMerge.across_frames={shown(self.across_frames)}, wanted True or False")

    def check(self, spec: ModelSpec) -> None:
        """Any model will do."""

    def apply(self, inputs_embeds: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        grid = grid_of(layout)
        if self.ratio == 1 or len(grid.rows) < 2:
            return inputs_embeds, layout
        region = self._regions(inputs_embeds[grid.rows], grid, layout)
        rows = torch.arange(len(layout), device=region.device)
        owner = rows.clone()
        owner[grid.rows] = grid.rows[_middles(grid, region)[region]]
        stays = owner == rows
        index, gone = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
        target, weight = torch.searchsorted(index, owner[gone]), layout.size.where(layout.size > 0, 1)
        embeds, _ = merge_rows(inputs_embeds[index], inputs_embeds[gone], target, weight[index], weight[gone])
        size = layout.size[index].index_add(0, target, layout.size[gone])
        return embeds, layout.merge(index, size, owner)

    def _regions(self, x: Tensor, grid: Grid, layout: TokenLayout) -> Tensor:
        """[P] int64: the first member of each patch's region; x: [P, C]."""
        bounds = Bounds(self.threshold, self.largest)
        units, sequence = normalize(x.float(), dim=-1), layout.sequence[grid.rows]
        right, below = grid.beside()
        pairs = _pairs(right, below) if self.threshold is None else _area_pairs(units, right, below, self.threshold)
        if self.across_frames:
            pairs = torch.cat([pairs, _both(grid.later(layout))], 1)
        if self.ratio is not None:
            count = sequence.bincount(minlength=layout.num_sequences)
            bounds = replace(bounds, group=sequence, spare=count - (count * self.ratio).round().long().clamp_min(1))
        return regions(units, layout.size[grid.rows], pairs, bounds)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        """Cosines of neighbours, and of the regions that grow from them: about twice as many in all."""
        return sum(2 * spec.hidden_size * 2 * 2 * tokens for tokens in lengths)

    def describe(self) -> str:
        where = "Neighbours in a picture's grid" if self.threshold is None else "Areas of a picture that are alike"
        alike = "" if self.threshold is None else f" of mean cosine {self.threshold:g} or more"
        most = "" if self.largest is None else f", of {self.largest} patches at most"
        least = "" if self.ratio is None else f", until {100 * self.ratio:g} % of the tokens are left"
        return f"{where} become regions{alike}{most}, one token each{least}."

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"regions": cls()}

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        steps = {f"{share} %": cls(threshold=None, largest=None, ratio=share / 100) for share in MERGE_SHARES}
        return {"regions": steps}


def _both(other: Tensor) -> Tensor:
    """[2, n] int64: each with its other one, where there is one."""
    one = (other >= 0).nonzero()[:, 0]
    return torch.stack([one, other[one]])


def _pairs(right: Tensor, below: Tensor) -> Tensor:
    return torch.cat([_both(right), _both(below)], 1)


def _area_pairs(units: Tensor, right: Tensor, below: Tensor, threshold: float) -> Tensor:
    """The pairs that lie in a square of two by two whose four sides are alike."""
    alike = [_alike(units, other) >= threshold for other in (right, below)]  # -1 where there is none
    corner = alike[0] & alike[1]
    corner &= alike[0][below] & alike[1][right]
    first = corner.nonzero()[:, 0]
    beside, under = right[first], below[first]
    last = right[under]
    sides = [(first, beside), (under, last), (first, under), (beside, last)]
    pairs = torch.cat([torch.stack(side) for side in sides], 1)
    return pairs.unique(dim=1)


def _alike(units: Tensor, other: Tensor) -> Tensor:
    """[P]: cosines of each one with its other; -2 where there is none."""
    step = max(1, GATHERED // units.shape[1])
    parts = [(own * units[ids]).sum(-1) for own, ids in zip(units.split(step), other.split(step), strict=True)]
    return torch.cat(parts).where(other >= 0, -2)


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


def regions(units: Tensor, sizes: Tensor, pairs: Tensor, bounds: Bounds) -> Tensor:
    """Regions of alike neighbours.

    In rounds: of the pairs of neighbouring regions that may join, those join that are each other's best. The best is
    the one whose union scatters least beyond its parts (Ward).

    Args:
        units: [P, C] float32, unit vectors.
        sizes: [P] float32, how many patches each stands for.
        pairs: [2, E] int64, neighbours.
        bounds: how far they grow.

    Returns:
        [P] int64: the first member of each one's region.
    """
    found, spare = _Regions(units, sizes), bounds.spare
    first, second = pairs.amin(0), pairs.amax(0)
    edges = torch.stack([first, second])
    dots = found.dots(edges)
    while edges.shape[1]:
        cost, alike, size = found.judge(edges, dots)
        may = torch.ones_like(alike, dtype=torch.bool)
        if bounds.threshold is not None:
            may &= alike >= bounds.threshold
        if bounds.largest is not None:
            may &= size <= bounds.largest
        if spare is not None and bounds.group is not None:
            may &= spare[bounds.group[edges[0]]] > 0
        edges, dots, cost = edges[:, may], dots[may], cost[may]
        if not edges.shape[1]:
            break
        joins = _mutual(edges, cost, len(units))
        if spare is not None and bounds.group is not None:
            joins = _cheapest(joins, cost, bounds.group[edges[0]], spare)
            spare = spare - bounds.group[edges[0, joins]].bincount(minlength=len(spare))
        edges, dots = found.join(edges, dots, joins)
    return found.region


class _Regions:
    """Regions as they grow, and what is known of each: the sum of its members' unit vectors by size, and its patches.

    Attributes:
        region: [P] int64, the first member of each one's region.
    """

    def __init__(self, units: Tensor, sizes: Tensor) -> None:
        self.region = torch.arange(len(units), device=units.device)
        self._sums, self._sizes = units * sizes[:, None], sizes.clone()
        self._norms, self._squares = self._sums.square().sum(-1), sizes.square()

    def dots(self, edges: Tensor) -> Tensor:
        """[E] float32: products of two regions' sums."""
        step = max(1, GATHERED // self._sums.shape[1])
        return torch.cat([(self._sums[a] * self._sums[b]).sum(-1) for a, b in edges.split(step, 1)])

    def judge(self, edges: Tensor, dots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of unions: how much they scatter beyond their parts, the mean cosine of their members, their patches."""
        a, b = edges
        size, norm = self._sizes[a] + self._sizes[b], self._norms[a] + self._norms[b] + 2 * dots
        scatter = self._norms[a] / self._sizes[a] + self._norms[b] / self._sizes[b] - norm / size
        own = self._squares[a] + self._squares[b]
        return scatter, (norm - own) / (size.square() - own), size

    def join(self, edges: Tensor, dots: Tensor, joins: Tensor) -> tuple[Tensor, Tensor]:
        """Joins the regions of some edges, no two of which touch; the edges that are left, and their products."""
        into, gone = edges[:, joins]
        self._norms[into] += self._norms[gone] + 2 * dots[joins]
        for column in (self._sums, self._sizes, self._squares):
            column[into] += column[gone]
        label = torch.arange(len(self.region), device=edges.device)
        label[gone] = into
        self.region = label[self.region]
        ends = label[edges].sort(0).values
        apart = ends[0] != ends[1]
        keys, origin = (ends[0] * len(label) + ends[1])[apart].unique(return_inverse=True)
        place = torch.empty_like(keys).scatter_(0, origin, apart.nonzero()[:, 0])
        ends, dots = ends[:, place], dots[place]
        changed = torch.zeros_like(label, dtype=torch.bool)
        changed[into] = True
        stale = changed[ends].any(0)
        if bool(stale.any()):
            dots[stale] = self.dots(ends[:, stale])
        return ends, dots


def _mutual(edges: Tensor, cost: Tensor, count: int) -> Tensor:
    """[n] int64: the edges that are the best of both their regions."""
    rank = torch.empty_like(edges[0])
    rank[cost.argsort(stable=True)] = torch.arange(len(rank), device=rank.device)
    best = torch.full((count,), len(rank), device=rank.device)
    for end in edges:
        best.scatter_reduce_(0, end, rank, "amin")
    return (best[edges] == rank).all(0).nonzero()[:, 0]


def _cheapest(joins: Tensor, cost: Tensor, group: Tensor, spare: Tensor) -> Tensor:
    """Of these edges, in each group the cheaper half, and no more than it has to spare; group: [E] int64."""
    order = joins[cost[joins].argsort(stable=True)]
    order = order[group[order].argsort(stable=True)]
    own = group[order]
    counts = own.bincount(minlength=len(spare))
    place = torch.arange(len(order), device=own.device) - (counts.cumsum(0) - counts)[own]
    return order[place < torch.minimum((counts + 1) // 2, spare)[own]]


def _middles(grid: Grid, region: Tensor) -> Tensor:
    """[P] int64: for the first member of each region, the member nearest to its centre, the first of several."""
    place, size = torch.stack([grid.y, grid.x], 1).double(), region.bincount(minlength=len(region))
    centre = torch.zeros_like(place).index_add_(0, region, place) / size.clamp_min(1)[:, None]
    order = (place - centre[region]).square().sum(-1).argsort(stable=True)
    order = order[region[order].argsort(stable=True)]
    return order[(size.cumsum(0) - size).clamp_max(len(region) - 1)]
