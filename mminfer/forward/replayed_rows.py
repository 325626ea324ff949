"""Which rows of a pass go by a second time, where they stand then, and which of them look together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from mminfer_kernels.replay_attention import rows_of_entries
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mminfer.forward.rotary import Tables
from mminfer.forward.rows import Rows
from mminfer.forward.written import sample_step
from mminfer.layout import TokenLayout
from mminfer.technique import ReplayPlan

GROUP = 512  # rows that are replayed together: more would find each other


@dataclass(frozen=True)
class Group:
    """Rows that go by together, a picture or a piece of text each.

    Args:
        first: the first among those replayed, where the others follow it.
        last: one past the last.
        is_visual: whether they are a picture's.
    """

    first: int
    last: int
    is_visual: bool

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def place(self) -> slice:
        return slice(self.first, self.last)


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


@dataclass(frozen=True, eq=False)
class Together:
    """All stretches of a sequence that look in one call, where nothing came before this pass.

    Args:
        rows: first and one past the last of the rows replayed that are the sequence's.
        edges: first and one past the last of each stretch's entries, among the sequence's.
        groups: [M, 4] int32, as `replay_attention` takes it.
        seen: [2, N] int32, likewise.
        longest: rows of the longest group.
        references: [H / G, R] int64, of all stretches, among the sequence's rows.
        sample: [n] int64, those of the sequence's rows that say how much attention writes, stretch by stretch.
        samples: how many these are of each stretch.
    """

    rows: slice
    edges: list[tuple[int, int]]
    groups: Tensor
    seen: Tensor
    longest: int
    references: Tensor
    sample: Tensor
    samples: list[int]


class ReplayedRows:
    """The rows of one pass as they go by a second time.

    Args:
        hidden: [T, C], the rows as they enter.
        layout: of these, at the positions where they stand.
        plan: how they are looked at.
        sharing: query heads that share entries.

    Attributes:
        rows: [K] int64, those of them that go by again, group by group.
        layout: of these, at the positions that follow their stretch.
        stretch: entries that each looks at.
        outputs: whether what entries write is asked for.
    """

    def __init__(self, hidden: Tensor, layout: TokenLayout, plan: ReplayPlan, sharing: int) -> None:
        self.stretch, self.outputs = plan.stretch, plan.outputs
        self._scratch: Tensor | None = None
        self._together: tuple[TokenLayout, list[Together | None]] | None = None
        own = layout.on_host
        wanted = _worth_replaying(hidden, layout, plan)
        parts = [
            (sequence, first, last)
            for sequence, (start, stop) in enumerate(layout.spans)
            for first, last in _stretches(own, start, stop, plan.stretch)
        ]
        chosen: list[Tensor] = []
        self.stretches: list[Stretch] = []
        for sequence, first, last in parts:
            runs = _runs(own, _replayed_rows(own, wanted, first, last, plan.text))
            ends = itertools.accumulate(map(len, runs), initial=sum(map(len, chosen)))
            is_visual = [bool(own.is_visual[run[0]]) for run in runs]
            groups = [Group(a, b, v) for (a, b), v in zip(itertools.pairwise(ends), is_visual, strict=True)]
            asking = [torch.arange(g.first, g.last) for g in groups if g.is_visual or not any(is_visual)]
            references = _some(torch.cat(asking), plan.references, sharing).to(layout.device, non_blocking=True)
            sources = (int(own.source[first]), int(own.source[last - 1]) + 1)
            self.stretches.append(Stretch(sequence, sources, groups, references))
            chosen += runs
        rows = torch.cat(chosen)
        again, device = own.select(rows), layout.device
        position = again.position.clone()
        for (_, first, last), stretch in zip(parts, self.stretches, strict=True):
            behind = own.position[:, first:last].amax().floor() + 1
            for group in stretch.groups:
                position[:, group.place] = _placed(position[:, group.place], group.is_visual) + behind
        self.rows = rows.to(device, non_blocking=True)
        self.layout = layout.select(rows).placed_as(replace(again, position=position, run_before=None))

    def scratch(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory of this shape that each layer and stretch writes anew: fresh one costs more than what is written."""
        size, held = prod(shape), self._scratch
        if held is None or len(held) < size or (held.dtype, held.device) != (like.dtype, like.device):
            held = self._scratch = like.new_empty(size)
        return held[:size].view(*shape)

    def together(self, attended: TokenLayout) -> list[Together | None]:
        """For each sequence how its stretches look in one call at the entries of these rows; None: it has none."""
        if self._together is None or self._together[0] is not attended:  # the first layer, or rows have left
            own = [[x for x in self.stretches if x.sequence == b] for b in range(attended.num_sequences)]
            made = [_together(x, attended, b) if x else None for b, x in enumerate(own)]
            self._together = attended, made
        return self._together[1]

    def tables(self, rows: Rows) -> Tables:
        """Rotary tables of those of the rows that go by again, made as those of all of them are."""
        return rows.rotate(rows.hidden[None], self.layout.position[:, None])


def _together(stretches: Sequence[Stretch], attended: TokenLayout, sequence: int) -> Together:
    """Of one sequence, whose entries are those of these rows."""
    start, stop = attended.spans[sequence]
    source, device = attended.on_host.source[start:stop], attended.device
    edges = [tuple(torch.searchsorted(source, torch.tensor(x.sources)).tolist()) for x in stretches]
    begun = stretches[0].groups[0].first
    of_all = [(g, a, b) for x, (a, b) in zip(stretches, edges, strict=True) for g in x.groups]
    groups = torch.tensor([(g.first - begun, g.last - begun, a, b) for g, a, b in of_all], dtype=torch.int32)
    samples = [
        torch.cat([torch.arange(g.first, g.last, sample_step(sum(map(len, x.groups)))) for g in x.groups]) - begun
        for x in stretches
    ]
    there = (groups, rows_of_entries(groups, stop - start), torch.cat(samples))
    on_device = [x.to(device, non_blocking=True) for x in there]
    references = torch.cat([x.references for x in stretches], 1)
    return Together(
        rows=slice(begun, of_all[-1][0].last),
        edges=[(a, b) for a, b in edges],
        groups=on_device[0],
        seen=on_device[1],
        longest=max(len(g) for g, *_ in of_all),
        references=references - begun if begun else references,
        sample=on_device[2],
        samples=[len(x) for x in samples],
    )


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
    """[T] bool, on the CPU: all but visual rows that are alike the one before them, of the same image."""
    wanted, own = torch.ones(len(layout), dtype=torch.bool), layout.on_host
    if plan.alike < 1 and len(layout) > 1:
        alike = (cosine_similarity(hidden[1:].float(), hidden[:-1].float(), dim=-1) >= plan.alike).cpu()
        wanted[1:] = ~(alike & own.is_visual[1:] & (own.image_id[1:] == own.image_id[:-1]))
    return wanted


def _replayed_rows(layout: TokenLayout, wanted: Tensor, first: int, last: int, text: bool) -> Tensor:
    """[n] int64, ascending: the rows of a stretch that go by again."""
    rows, visual = torch.arange(first, last), layout.is_visual[first:last]
    return rows[wanted[first:last] if text or not bool(visual.any()) else wanted[first:last] & visual]


def _runs(layout: TokenLayout, rows: Tensor) -> list[Tensor]:
    """These rows ([n] int64, ascending) by pictures, and behind them what is text, in pieces of `GROUP` at most."""
    visual, own, source = layout.is_visual[rows], layout.image_id[rows], layout.source[rows]
    gap = (source.diff() > 1) & (own[1:] != own[:-1])
    breaks = gap | (visual[1:] != visual[:-1])
    ends = torch.cat([breaks.nonzero()[:, 0] + 1, torch.tensor([len(rows)])])
    runs = rows.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    pictures = [run for run in runs if len(run) and bool(layout.is_visual[run[0]])]
    return [piece for run in (*pictures, rows[~visual]) for piece in run.split(GROUP) if len(piece)]


def _placed(position: Tensor, is_visual: bool) -> Tensor:
    """Positions ([A, n]) moved to the beginning; text, which may be of several runs, closes ranks."""
    if is_visual:
        return position - position[:, 0].amin()
    return torch.arange(position.shape[1], dtype=position.dtype).expand_as(position)


def _some(rows: Tensor, count: int, times: int) -> Tensor:
    """[times, n] int64: at most `count` of the rows for each time, evenly spread and others each time, if there are."""
    count = min(count, len(rows))
    places = torch.arange(count * times, dtype=torch.float32).add(0.5).mul(len(rows) / max(count * times, 1))
    return rows[places.long()].view(count, times).mT
