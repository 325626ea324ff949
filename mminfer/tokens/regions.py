"""Merging that follows content: neighbours in a picture's grid become one token as far as they are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from mminfer_kernels import COSINE_ROUNDING, gather_rows, grow_regions, row_dots
from torch import Tensor

from mminfer.errors import ConfigError, shown
from mminfer.layout import TokenLayout
from mminfer.technique import MERGE_SHARES, MergeTechnique, check_fraction, is_number, is_whole
from mminfer.tokens.averaging import average
from mminfer.tokens.grid import Grid, grid_of

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


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
        threshold: mean cosine of a region's members to each other, at least, in [0, 1]; None: any.
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
        if self.threshold is not None and (not is_number(self.threshold, most=1) or self.threshold < 0):
            raise ConfigError(f"RegionMerge.threshold={shown(self.threshold)}, wanted a cosine from 0 to 1, or None")
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
        grid = grid_of(layout.on_host)
        if self.ratio == 1 or len(grid.rows) < 2:
            return inputs_embeds, layout
        region = self._regions(inputs_embeds, grid, layout.on_host)
        owner = torch.arange(len(layout))
        owner[grid.rows] = grid.rows[_middles(grid, region)]
        return average(inputs_embeds, layout, owner)

    def _regions(self, x: Tensor, grid: Grid, layout: TokenLayout) -> Tensor:
        """[P] int64: the first member of each patch's region.

        Args:
            x: [T, C], wherever it is.
            grid: of its patches, on the CPU.
            layout: likewise.
        """
        if self.threshold is None:
            right, below = grid.beside()
        else:
            right, below = _in_areas(x, grid, self.threshold - COSINE_ROUNDING)
        steps = (right, below, grid.later(layout)) if self.across_frames else (right, below)
        pairs = torch.cat([_both(step) for step in steps], 1)
        region = torch.arange(len(grid.rows))
        touched = torch.zeros_like(region, dtype=torch.bool)
        touched[pairs.flatten()] = True
        some = touched.nonzero()[:, 0]
        if not len(some):
            return region
        group = spare = None
        if self.ratio is not None:
            sequence = layout.sequence[grid.rows]
            count = sequence.bincount(minlength=layout.num_sequences)
            group, spare = sequence[some], count - (count.double() * self.ratio).round().long().clamp_min(1)
        block = (grid.y // 2 * grid.width.max() + grid.x // 2)[some]  # equal tokens join into squares
        pairs, rows = (touched.cumsum(0) - 1)[pairs], grid.rows[some]
        there, sizes, pairs, block = (fact.to(x.device) for fact in (rows, layout.size[rows], pairs, block))
        group, spare = (None if fact is None else fact.to(x.device) for fact in (group, spare))
        grown = grow_regions(gather_rows(x, there), sizes, pairs, self.threshold, self.largest, group, spare, block)
        region[some] = some[grown.cpu()]
        return region

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


def _in_areas(x: Tensor, grid: Grid, threshold: float) -> tuple[Tensor, Tensor]:
    """`Grid.beside` of those pairs alone that lie in a square of two by two whose four sides are alike; x: [T, C]."""
    right, below = grid.beside()
    rows = grid.rows.to(x.device, non_blocking=True)
    norms = row_dots(x, rows, rows).sqrt().clamp_min(1e-12)

    def alike(other: Tensor, asked: Tensor) -> Tensor:
        """[P] bool: those asked for whose cosine with their other one reaches the threshold."""
        out, pairs = torch.zeros_like(asked), asked.nonzero()[:, 0]
        first, second = (places.to(x.device, non_blocking=True) for places in (pairs, other[pairs]))
        dots = row_dots(x, rows[first], rows[second])
        out[pairs] = (dots >= threshold * norms[first] * norms[second]).cpu()
        return out

    beside = alike(right, right >= 0)
    lines = beside & (below >= 0) & beside[below]  # both lines of the square
    sides = lines.clone()
    sides[right[lines]] = True
    under = alike(below, sides)
    corner = lines & under & under[right]
    lines, columns = corner.clone(), corner.clone()
    lines[below[corner]] = True
    columns[right[corner]] = True
    return right.where(lines, -1), below.where(columns, -1)


def _middles(grid: Grid, region: Tensor) -> Tensor:
    """[P] int64: for each one the member of its region that is nearest to its centre, the first of several."""
    place, size = torch.stack([grid.y, grid.x], 1).double(), region.bincount(minlength=len(region))
    centre = torch.zeros_like(place).index_add_(0, region, place) / size.clamp_min(1)[:, None]
    far = (place - centre[region]).square().sum(-1)
    least = far.new_full(region.shape, torch.inf).scatter_reduce_(0, region, far, "amin")
    near = (far == least[region]).nonzero()[:, 0]
    middle = torch.full_like(region, len(region)).scatter_reduce_(0, region[near], near, "amin")
    return middle[region]
