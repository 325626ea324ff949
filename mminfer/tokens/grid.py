"""Where the tokens of an image stand in its grid, as far as a layout tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mminfer.layout import Modality, TokenLayout


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the P tokens that stand for patches stand, each in the grid of its view.

    Args:
        rows: [P] int64, ascending, of the layout.
        view: [P] int64, ascending from 0.
        y: [P] int64, from 0 in each view.
        x: [P] int64.
        first: [views] int64, the first of each view among the P.
        width: [views] int64.
        height: [views] int64.
    """

    rows: Tensor
    view: Tensor
    y: Tensor
    x: Tensor
    first: Tensor
    width: Tensor
    height: Tensor

    def beside(self) -> tuple[Tensor, Tensor]:
        """Of each token the one to its right and the one below it, among the P: [P] int64 each, -1 where none is."""
        place, at = self._places
        width = self.width[self.view]
        right = at[(place + 1).clamp_max(len(place) - 1)].where(self.x + 1 < width, -1)
        below = at[(place + width).clamp_max(len(place) - 1)].where(self.y + 1 < self.height[self.view], -1)
        return right, below

    def later(self, layout: TokenLayout) -> Tensor:
        """Of each token of a video the one at its place in the next frame: [P] int64, -1 where none is.

        Only of frames of one shape with nothing between them in the prompt.
        """
        place, at = self._places
        follows = self._follows(layout)
        goes_on = torch.cat([follows[1:], follows.new_zeros(1)])[self.view]
        step = torch.cat([self.first.diff(), self.first.new_zeros(1)])[self.view]
        return at[(place + step).clamp_max(len(place) - 1)].where(goes_on, -1)

    @property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Where each token would stand, were those of a view in order of line and column; and who stands there: [P]."""
        place = self.y * self.width[self.view] + self.x + self.first[self.view]
        return place, torch.empty_like(place).scatter_(0, place, torch.arange(len(place), device=place.device))

    def _follows(self, layout: TokenLayout) -> Tensor:
        """[views] bool: frames of a video of one shape with the one before them, and nothing between them."""
        start = self.rows[self.first]
        is_video = layout.modality[start] == Modality.VIDEO
        last = torch.cat([self.first[1:], self.first.new_tensor([len(self.rows)])]) - 1
        out = torch.zeros_like(is_video)
        out[1:] = is_video[1:] & is_video[:-1] & (layout.sequence[start][1:] == layout.sequence[start][:-1])
        out[1:] &= (self.width[1:] == self.width[:-1]) & (self.height[1:] == self.height[:-1])
        out[1:] &= start[1:] - self.rows[last[:-1]] == 1
        return out


def grid_of(layout: TokenLayout) -> Grid:
    """The grids of all pictures and frames of a prompt, before anything left it.

    By the axes of M-RoPE where the model has them; else by the marks between lines (newlines, breaks), else as a
    square; tokens that form no grid stand in one line. An image is one view; but where a small view of the whole
    stands before the lines of a larger one, as in LLaVA-NeXT, these are two.
    """
    rows = ((layout.image_id >= 0) & (layout.size > 0)).nonzero()[:, 0]
    if not len(rows):
        return Grid(*(rows,) * 7)
    owner = layout.image_id[rows]
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = owner[1:] != owner[:-1]
    lines = begins.clone()
    lines[1:] |= rows.diff() > 1
    view = (begins | _second_views(begins, lines)).cumsum(0) - 1
    first = torch.ones_like(view, dtype=torch.bool)
    first[1:] = view[1:] != view[:-1]
    starts, order = first.nonzero()[:, 0], torch.arange(len(view), device=view.device)
    line = (lines | first).cumsum(0) - 1
    order, line = order - starts[view], line - line[starts][view]
    counts = view.bincount()
    height = line.new_zeros(len(counts)).scatter_reduce_(0, view, line, "amax") + 1
    side = counts.double().sqrt().round().long()
    width = torch.where(height == 1, side, counts // height).clamp_min(1)
    whole = torch.where(height == 1, side**2 == counts, counts % height == 0)
    fits = whole & _all_in(view, (line == order // width[view]) | (height == 1)[view], len(counts))
    width = torch.where(fits, width, counts)
    y, x = order // width[view], order % width[view]
    height = counts // width
    if layout.position.shape[0] == 3:
        y, x, height, width = _by_axes(layout.position[1:, rows], view, counts, (y, x, height, width))
    return Grid(rows, view, y, x, starts, width, height)


def _second_views(begins: Tensor, lines: Tensor) -> Tensor:
    """[P] bool: the first token of the second view of an image, whose lines are as long as its last one."""
    image, starts = begins.cumsum(0) - 1, lines.nonzero()[:, 0]
    length = torch.cat([starts[1:], starts.new_tensor([len(begins)])]) - starts
    of = image[starts]
    count = of.bincount()
    last = count.cumsum(0) - 1
    first = last - count + 1
    small = (length[first] - length[last]) * (count > 1)
    out = torch.zeros_like(begins)
    out[(starts[first] + small)[small > 0]] = True
    return out


def _by_axes(position: Tensor, view: Tensor, counts: Tensor, otherwise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """y, x, height and width by M-RoPE's axes (position [2, P]), for views whose tokens fill a rectangle there."""
    (y, height), (x, width) = (_ranks(axis, view, len(counts)) for axis in position)
    fits = height * width == counts
    code = (y * width[view] + x + (counts.cumsum(0) - counts)[view]).where(fits[view], 0)
    taken = torch.zeros(len(view), dtype=torch.int64, device=view.device).scatter_add_(0, code, fits[view].long())
    fits &= _all_in(view, taken == 1, len(counts))
    flags = (fits[view], fits[view], fits, fits)
    return tuple(torch.where(*three) for three in zip(flags, (y, x, height, width), otherwise, strict=True))


def _ranks(position: Tensor, view: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[P] int64: which of the places in its view each one has, whatever the step between them; and [count] how many."""
    least = position.new_full((count,), torch.inf).scatter_reduce_(0, view, position, "amin")
    offset = position - least[view]
    places, rank = (view * (offset.amax() + 1) + offset).unique(return_inverse=True)
    first = rank.new_full((count,), len(places)).scatter_reduce_(0, view, rank, "amin")
    return rank - first[view], first.diff(append=first.new_tensor([len(places)]))


def _all_in(view: Tensor, flags: Tensor, count: int) -> Tensor:
    """[count] bool: whether all of a view's flags are set."""
    return torch.zeros(count, dtype=torch.int64, device=view.device).index_add_(0, view, (~flags).long()) == 0
