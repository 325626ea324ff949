"""Which rows of a pass go by a second time, where they stand then, and which of them look together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mminfer.forward.rotary import Tables
from mminfer.forward.rows import Rows
from mminfer.layout import TokenLayout
from mminfer.technique import ReplayPlan

GROUP = 512  # rows that are replayed together: more would find each other


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that go by together, a picture or a piece of text.

    Args:
        rows: [n] int64, among those replayed.
        is_visual: whether they are a picture's.
    """

    rows: Tensor
    is_visual: bool

    @cached_property
    def place(self) -> slice | Tensor:
        """The rows as an index: a slice where they stand side by side, so that what is taken there is not copied."""
        first, last = self.rows[0].item(), self.rows[-1].item()
        return slice(first, last + 1) if last - first + 1 == len(self.rows) else self.rows


@dataclass(frozen=True, eq=False)
class Stretch:
    """Entries that are judged together, and the rows that look at them.

    Args:
        sequence: whose.
        sources: first and one past the last of the packed rows that made them.
        groups: of the rows replayed.
        references: [H / G, R] int64, among the rows replayed: those whose queries are handed over, for each of the
            query heads that share entries.
    """

    sequence: int
    sources: tuple[int, int]
    groups: list[Group]
    references: Tensor


class ReplayedRows:
    """The rows of one pass as they go by a second time.

    Args:
        hidden: [T, C], the rows as they enter.
        layout: of these, at the positions where they stand.
        plan: how they are looked at.
        sharing: query heads that share entries.

    Attributes:
        rows: [K] int64, those of them that go by again.
        layout: of these, at the positions that follow their stretch.
        stretch: entries that each looks at.
        outputs: whether what entries write is asked for.
    """

    def __init__(self, hidden: Tensor, layout: TokenLayout, plan: ReplayPlan, sharing: int) -> None:
        self.stretch, self.outputs = plan.stretch, plan.outputs
        self._scratch: Tensor | None = None
        wanted = _worth_replaying(hidden, layout, plan)
        parts = [
            (sequence, first, last)
            for sequence, (start, stop) in enumerate(layout.spans)
            for first, last in _stretches(layout, start, stop, plan.stretch)
        ]
        chosen = [_replayed_rows(layout, wanted, first, last, plan.text) for _, first, last in parts]
        self.rows = torch.cat(chosen)
        self.layout = layout.select(self.rows)
        position = self.layout.position.clone()
        self.stretches: list[Stretch] = []
        start = 0
        for (sequence, first, last), rows in zip(parts, chosen, strict=True):
            groups = _groups(self.layout, start, start + len(rows))
            behind = layout.position[:, first:last].amax().floor() + 1
            for group in groups:
                position[:, group.rows] = _placed(position[:, group.rows], group.is_visual) + behind
            sources = (int(layout.source[first]), int(layout.source[last - 1]) + 1)
            asking = [g.rows for g in groups if g.is_visual] or [g.rows for g in groups]
            self.stretches.append(
                Stretch(sequence, sources, groups, _some(torch.cat(asking), plan.references, sharing))
            )
            start += len(rows)
        self.layout = replace(self.layout, position=position, run_before=None, host=None)

    def scratch(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory of this shape that each layer and stretch writes anew: fresh one costs more than what is written."""
        size, held = prod(shape), self._scratch
        if held is None or len(held) < size or (held.dtype, held.device) != (like.dtype, like.device):
            held = self._scratch = like.new_empty(size)
        return held[:size].view(*shape)

    def tables(self, rows: Rows) -> Tables:
        """Rotary tables of those of the rows that go by again, made as those of all of them are."""
        return rows.rotate(rows.hidden[None], self.layout.position[:, None])


def _stretches(layout: TokenLayout, start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """First and one past the last row of about equal stretches, at most `size` long unless a picture is longer."""
    if stop <= start:
        return []
    owner = layout.image_id[start:stop]
    longest = max(owner[owner >= 0].bincount().tolist(), default=0)
    even = -(-(stop - start) // -(-(stop - start) // size))
    cuts = layout.cuts(start, stop, max(even, longest))
    return list(itertools.pairwise(cuts))


def _worth_replaying(hidden: Tensor, layout: TokenLayout, plan: ReplayPlan) -> Tensor:
    """[T] bool: all but visual rows that are alike the one before them, of the same image."""
    wanted = torch.ones_like(layout.is_visual)
    if plan.alike < 1 and len(layout) > 1:
        alike = cosine_similarity(hidden[1:].float(), hidden[:-1].float(), dim=-1) >= plan.alike
        wanted[1:] = ~(alike & layout.is_visual[1:] & (layout.image_id[1:] == layout.image_id[:-1]))
    return wanted


def _replayed_rows(layout: TokenLayout, wanted: Tensor, first: int, last: int, text: bool) -> Tensor:
    """[n] int64, ascending: the rows of a stretch that go by again."""
    rows = torch.arange(first, last, device=layout.sequence.device)
    visual = layout.is_visual[first:last]
    return rows[wanted[first:last] if text or not bool(visual.any()) else wanted[first:last] & visual]


def _groups(layout: TokenLayout, start: int, stop: int) -> list[Group]:
    """Rows start .. stop by pictures, and what is text, in pieces of `GROUP` at most."""
    rows, visual = torch.arange(start, stop, device=layout.sequence.device), layout.is_visual[start:stop]
    own = layout.image_id[start:stop]
    gap = (layout.source[start + 1 : stop] - layout.source[start : stop - 1] > 1) & (own[1:] != own[:-1])
    breaks = gap | (visual[1:] != visual[:-1])
    ends = torch.cat([breaks.nonzero()[:, 0] + 1, breaks.new_tensor([stop - start], dtype=torch.int64)])
    runs = rows.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    groups = [Group(piece, True) for run in runs if bool(visual[run[0] - start]) for piece in run.split(GROUP)]
    text = rows[~visual]
    return groups + [Group(piece, False) for piece in text.split(GROUP) if len(piece)]


def _placed(position: Tensor, is_visual: bool) -> Tensor:
    """Positions ([A, n]) moved to the beginning; text, which may be of several runs, closes ranks."""
    if is_visual:
        return position - position[:, 0].amin()
    return torch.arange(position.shape[1], dtype=position.dtype, device=position.device).expand_as(position)


def _some(rows: Tensor, count: int, times: int) -> Tensor:
    """[times, n] int64: at most `count` of the rows for each time, evenly spread and others each time, if there are."""
    count = min(count, len(rows))
    places = (
        torch.arange(count * times, dtype=torch.float32, device=rows.device)
        .add(0.5)
        .mul(len(rows) / max(count * times, 1))
    )
    return rows[places.long()].view(count, times).mT
