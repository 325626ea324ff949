"""Merging that follows content: neighbours in a picture's grid become one token as far as they are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from mminfer_kernels import merge_rows
from torch import Tensor

from mminfer.errors import ConfigError, shown
from mminfer.layout import TokenLayout
from mminfer.technique import MERGE_SHARES, MergeTechnique, check_fraction, is_number
from mminfer.tokens.grid import Grid, grid_of

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec

GATHERED = 1 << 24  # numbers gathered at a time while regions are compared


@dataclass(frozen=True)
class RegionMerge(MergeTechnique):
    """Merging of neighbours in a picture's grid, region by region, as far as they are alike.

    Tokens left and right of each other, or above and below (in videos also one moment later), join into regions, the
    most alike first; what a picture shows decides how many there are: blanks, sky and walls collapse, text keeps its
    tokens. The members of a region are alike on average, all with all, so that no chain of neighbours grows across a
    gradient. A region becomes one token, the mean of its patches, and stands where its middle one stood.

    Args:
        threshold: mean cosine of a region's members to each other, at least, in [-1, 1]; None: any.
        ratio: fraction of a sequence's visual tokens below which merging does not go, in (0, 1]; without a threshold so
            many are left. None: no bound.
        across_frames: whether tokens of a video may also join those at the same place of the next frame. Only of
            frames with nothing between them in the prompt.

    Raises:
        ConfigError: a setting is out of range, or neither threshold nor ratio is given.

    Reference:
        Ours. The order of joining is Ward's (Hierarchical grouping, 1963), on unit vectors, between neighbours alone.
    """

    threshold: float | None = 0.99
    ratio: float | None = None
    across_frames: bool = False

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_fraction("RegionMerge.ratio", self.ratio)
        if self.threshold is not None and (not is_number(self.threshold, most=1) or self.threshold < -1):
            raise ConfigError(f"RegionMerge.threshold={shown(self.threshold)}, wanted a cosine from -1 to 1, or None")
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
        pairs = grid.neighbours(layout, self.across_frames)
        sequence = layout.sequence[grid.rows]
        least = None if self.ratio is None else _targets(sequence, layout.num_sequences, self.ratio)
        region = regions(inputs_embeds[grid.rows], layout.size[grid.rows], pairs, self.threshold, sequence, least)
        middle = _middles(grid, region)
        rows = torch.arange(len(layout), device=region.device)
        owner = rows.clone()
        owner[grid.rows] = grid.rows[middle[region]]
        stays = owner == rows
        index, gone = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
        target, weight = torch.searchsorted(index, owner[gone]), layout.size.where(layout.size > 0, 1)
        embeds, _ = merge_rows(inputs_embeds[index], inputs_embeds[gone], target, weight[index], weight[gone])
        size = layout.size[index].index_add(0, target, layout.size[gone])
        return embeds, layout.merge(index, size, owner)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        """Cosines of neighbours, and of the regions that grow from them: about twice as many in all."""
        return sum(2 * spec.hidden_size * 2 * 2 * tokens for tokens in lengths)

    def describe(self) -> str:
        alike = "" if self.threshold is None else f" as long as their mean cosine is at least {self.threshold:g}"
        least = "" if self.ratio is None else f" until {100 * self.ratio:g} % are left"
        return f"Neighbours in a picture's grid join into regions, the most alike first,{alike}{least}."

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"regions": cls()}

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        return {"regions": {f"{share} %": cls(threshold=None, ratio=share / 100) for share in MERGE_SHARES}}


def regions(
    x: Tensor,
    sizes: Tensor,
    pairs: Tensor,
    threshold: float | None,
    group: Tensor | None = None,
    least: Tensor | None = None,
) -> Tensor:
    """Regions of alike neighbours.

    In rounds: of the pairs of neighbouring regions that are each other's best, those join that may. The best is the one
    whose union scatters least beyond its parts (Ward).

    Args:
        x: [P, C], features.
        sizes: [P] float32, how many patches each stands for.
        pairs: [2, E] int64, neighbours.
        threshold: mean cosine of a region's members to each other, at least; None: any.
        group: [P] int64: regions are counted by it; no pair joins two.
        least: [groups] int64: how many regions of each group are left at least; None: no bound.

    Returns:
        [P] int64: the first member of each one's region.
    """
    count = len(x)
    region = torch.arange(count, device=x.device)
    sums = torch.nn.functional.normalize(x.float(), dim=-1) * sizes[:, None]
    state = _Regions(sums, sizes.clone(), (sizes.clone()))
    a, b = pairs.amin(0), pairs.amax(0)
    dots = state.dots(a, b)
    spare = None if least is None or group is None else group.bincount(minlength=len(least)) - least
    while len(a):
        cost, alike = state.judge(a, b, dots)
        may = torch.ones_like(a, dtype=torch.bool) if threshold is None else alike >= threshold
        a, b, dots, cost = a[may], b[may], dots[may], cost[may]
        if spare is not None and group is not None:
            open_ = spare[group[a]] > 0
            a, b, dots, cost = a[open_], b[open_], dots[open_], cost[open_]
        if not len(a):
            break
        joins = _mutual(a, b, cost, count)
        if spare is not None and group is not None:
            joins = _cheapest(joins, cost, group[a], spare)
            spare = spare - group[a[joins]].bincount(minlength=len(spare))
        into, gone = a[joins], b[joins]
        label = torch.arange(count, device=x.device)
        label[gone] = into
        state.join(into, gone)
        region = label[region]
        changed = torch.zeros(count, dtype=torch.bool, device=x.device)
        changed[into] = True
        a, b = label[a], label[b]
        a, b = torch.minimum(a, b), torch.maximum(a, b)
        key, first = (a * count + b).unique(return_inverse=True)
        place = torch.empty_like(key).scatter_(0, first, torch.arange(len(a), device=x.device))
        a, b, dots = a[place], b[place], dots[place]
        apart = a != b
        a, b, dots = a[apart], b[apart], dots[apart]
        stale = changed[a] | changed[b]
        dots[stale] = state.dots(a[stale], b[stale])
    return region


@dataclass
class _Regions:
    """What is known of each region: the sum of its members' unit vectors by size, its patches, and its square."""

    sums: Tensor
    sizes: Tensor
    squares: Tensor  # of sizes of members

    def __post_init__(self) -> None:
        self.norms = self.sums.square().sum(-1)
        self.squares = self.sizes.square()

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        step = max(1, GATHERED // self.sums.shape[1])
        parts = [(self.sums[i] * self.sums[j]).sum(-1) for i, j in zip(a.split(step), b.split(step), strict=True)]
        return torch.cat(parts) if parts else self.sums.new_zeros(0)

    def judge(self, a: Tensor, b: Tensor, dots: Tensor) -> tuple[Tensor, Tensor]:
        """How much a union would scatter beyond its parts, and the mean cosine of its members to each other."""
        size = self.sizes[a] + self.sizes[b]
        norm = self.norms[a] + self.norms[b] + 2 * dots
        scatter = self.norms[a] / self.sizes[a] + self.norms[b] / self.sizes[b] - norm / size
        own = self.squares[a] + self.squares[b]
        alike = (norm - own) / (size.square() - own)
        return scatter, alike

    def join(self, into: Tensor, gone: Tensor) -> None:
        self.norms[into] += self.norms[gone] + 2 * self.dots(into, gone)
        self.sums[into] += self.sums[gone]
        self.sizes[into] += self.sizes[gone]
        self.squares[into] += self.squares[gone]


def _mutual(a: Tensor, b: Tensor, cost: Tensor, count: int) -> Tensor:
    """Which pairs are the best of both: [n] int64."""
    rank = torch.empty_like(a)
    rank[cost.argsort(stable=True)] = torch.arange(len(a), device=a.device)
    best = torch.full((count,), len(a), device=a.device)
    best.scatter_reduce_(0, a, rank, "amin").scatter_reduce_(0, b, rank, "amin")
    return ((best[a] == rank) & (best[b] == rank)).nonzero()[:, 0]


def _cheapest(joins: Tensor, cost: Tensor, group: Tensor, spare: Tensor) -> Tensor:
    """Of these pairs, in each group the cheaper half, and no more than it has to spare."""
    order = joins[cost[joins].argsort(stable=True)]
    order = order[group[order].argsort(stable=True)]
    own = group[order]
    counts = own.bincount(minlength=len(spare))
    place = torch.arange(len(order), device=own.device) - (counts.cumsum(0) - counts)[own]
    most = torch.minimum((counts + 1) // 2, spare)
    return order[place < most[own]]


def _targets(sequence: Tensor, count: int, ratio: float) -> Tensor:
    """[count] int64: how many tokens of each sequence are to stay."""
    return (sequence.bincount(minlength=count) * ratio).round().long().clamp_min_(1)


def _middles(grid: Grid, region: Tensor) -> Tensor:
    """[P] int64: for the first member of each region, the member nearest to its centre."""
    place = torch.stack([grid.y, grid.x], 1).double()
    count = len(region)
    size = region.bincount(minlength=count).clamp_min_(1)
    centre = torch.zeros_like(place).index_add_(0, region, place) / size[:, None]
    far = (place - centre[region]).square().sum(-1)
    order = far.argsort(stable=True)
    order = order[region[order].argsort(stable=True)]
    counts = region.bincount(minlength=count)
    first = counts.cumsum(0) - counts
    return order[first.clamp_max(count - 1)]
