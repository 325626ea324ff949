"""Digest's rules on plain tensors: runs of one kind, sharing out a budget, and what is farthest from each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mminfer.technique import CacheEntries

SPREADS = ("farthest", "even")
AT_A_TIME = 8  # layers that are side by side in memory
PIECE = 128  # entries among which alike ones are looked for; a longer run is cut


def runs_of(is_visual: Tensor) -> Tensor:
    """[R, 2] int64: first row and one past the last of each run of visual entries ([N] bool)."""
    edges = torch.cat([is_visual.new_zeros(1), is_visual, is_visual.new_zeros(1)]).int().diff()
    return torch.stack([(edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]], 1)


def share_out(
    most: Sequence[int], weights: Sequence[float], total: int, least: Sequence[int] | None = None
) -> list[int]:
    """Whole numbers in proportion to weights, none above its bound, `total` in all where the bounds allow.

    Args:
        most: upper bounds.
        weights: 0 or more; all 0 count as equal.
        total: what there is to share.
        least: lower bounds, of no more than `total` in all; None: 0.
    """
    bound = torch.tensor(most, dtype=torch.float64)
    given = torch.zeros_like(bound) if least is None else torch.tensor(least, dtype=torch.float64).minimum(bound)
    weight = torch.tensor(weights, dtype=torch.float64)
    weight = weight if float(weight.sum()) > 0 else torch.ones_like(weight)
    weight = weight / weight.sum() + 1e-9  # so that what the needy cannot take goes to somebody
    for _ in range(len(most)):
        left, room = total - float(given.sum()), given < bound
        if left < 1 or not bool(room.any()):
            break
        given = (given + left * weight * room / float((weight * room).sum())).minimum(bound)
    whole = given.floor()
    spare = min(total, int(bound.sum())) - int(whole.sum())
    for i in (given - whole).argsort(descending=True).tolist() * 2:
        if spare > 0 and whole[i] < bound[i]:
            whole[i] += 1
            spare -= 1
    return [int(x) for x in whole]


class Rule(NamedTuple):
    """How entries become fewer.

    Args:
        spread: "farthest" or "even", see `Digest`.
        join: whether the others are averaged into the nearest, or dropped.
    """

    spread: str = "farthest"
    join: bool = True


class Piece(NamedTuple):
    """Entries of one sequence that follow each other, some of which are to be left.

    Args:
        first: where they begin.
        length: how many there are.
        kept: how many are to be left; all: they stay as they are.
    """

    first: int
    length: int
    kept: int


def pieces_of(rows: Tensor, stand_for: Tensor, count: int, each: bool = False) -> list[Piece]:
    """Pieces of one sequence's entries, each in one run; those that keep nothing are left out.

    Args:
        rows: [n] int64, ascending, on the CPU: which entries; a gap begins a new run.
        stand_for: [n] float32, on the CPU: how many entries of the prompt each stands for.
        count: entries to keep of them; runs share by the tokens they stand for, so that what was digested in earlier
            passes does not shrink beside what is new.
        each: whether no run goes empty, where there is one entry for each.
    """
    if not len(rows):
        return []
    runs = _run_lengths(rows)
    if count >= len(rows):
        lengths = kept = runs
    else:
        lengths = [length for run in runs for length in _cut(run)]
        weights = [float(part.sum()) for part in stand_for.split(lengths)]
        kept = share_out(lengths, weights, count)
        if each and count >= len(runs) and not all(kept):
            firsts = [int(i == 0) for run in runs for i, _ in enumerate(_cut(run))]
            kept = share_out(lengths, weights, count, firsts if count < len(lengths) else [1] * len(lengths))
    begins = rows[list(accumulate(lengths[:-1], initial=0))].tolist()
    return [Piece(*facts) for facts in zip(begins, lengths, kept, strict=True) if facts[2]]


def _run_lengths(rows: Tensor) -> list[int]:
    """How many rows follow each other without a gap, run by run."""
    ends = torch.cat([(rows.diff() > 1).nonzero()[:, 0] + 1, rows.new_tensor([len(rows)])])
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def _cut(length: int) -> list[int]:
    """A run's length, cut into about equal pieces of `PIECE` at most."""
    parts = -(-length // PIECE)
    return [length * (i + 1) // parts - length * i // parts for i in range(parts)]


def farthest_first(similarity: Tensor, m: int) -> Tensor:
    """Greedy k-centre: the one least like all, then again and again the one least like any chosen.

    Args:
        similarity: [..., n, n], of each to each.
        m: how many, at most n.

    Returns:
        [..., m] int64, in the order of their choice.
    """
    chosen = [similarity.sum(-1).argmin(-1, keepdim=True)]
    nearest = similarity.new_full(similarity.shape[:-1], -torch.inf)
    for _ in range(m - 1):
        last = similarity.gather(-2, chosen[-1][..., None].expand(*chosen[-1].shape, similarity.shape[-1]))
        nearest = nearest.maximum(last[..., 0, :]).scatter_(-1, chosen[-1], torch.inf)  # never again
        chosen.append(nearest.argmin(-1, keepdim=True))
    return torch.cat(chosen, -1)


def sizes_of(entries: CacheEntries) -> Tensor:
    """[G, N] float32: how many entries of the prompt each stands for."""
    if entries.size is None:
        return entries.keys.new_ones(entries.keys.shape[1:3], dtype=torch.float32)
    return entries.size[0]


def parts_of(layers: int, bytes_each: int, most_bytes: int) -> list[slice]:
    """Which of so many layers go together, in about equal parts of `AT_A_TIME` at most, or of so many bytes."""
    most = max(1, min(AT_A_TIME, most_bytes // max(bytes_each, 1)))
    count = -(-layers // most)
    return [slice(layers * n // count, layers * (n + 1) // count) for n in range(count)]
