"""Digest's rules on plain tensors: runs of one kind, sharing out a budget, and joining what is alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from mminfer.technique import CacheEntries

SPREADS = ("farthest", "even")
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
        each: whether no run goes empty, where there is one entry for each.
    """

    spread: str = "farthest"
    join: bool = True
    each: bool = False


def cluster_runs(
    entries: CacheEntries, rows: Tensor, stand_for: Tensor, count: int, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Some entries of one sequence as fewer, each run by itself.

    Args:
        entries: of which `size` is how many entries of the prompt each stands for; without that column, one each.
        rows: [n] int64, ascending, on the CPU: which entries; a gap begins a new run.
        stand_for: [n] float32, on the CPU: their sizes.
        count: entries to keep of them; runs share by the tokens they stand for, so that what was digested in earlier
            passes does not shrink beside what is new.
        rule: how.

    Returns:
        place [1, G, count] int64, the entry at which each result stands; keys and values [1, G, count, D]; sizes
        [1, G, count] float32.
    """
    sizes = entries.size
    if sizes is None:
        sizes = entries.keys.new_ones(entries.keys.shape[:3], dtype=torch.float32)
    device = sizes.device
    if count >= len(rows):
        there = rows.to(device, non_blocking=True)
        place = there.expand(*entries.keys.shape[:2], len(rows))
        return place, entries.keys[:, :, there], entries.values[:, :, there], sizes[:, :, there]
    runs = _run_lengths(rows)
    lengths = [length for run in runs for length in _pieces(run)]
    weights = [float(part.sum()) for part in stand_for.split(lengths)]
    kept = share_out(lengths, weights, count)
    if rule.each and count >= len(runs) and not all(kept):
        firsts = [int(i == 0) for run in runs for i, _ in enumerate(_pieces(run))]
        kept = share_out(lengths, weights, count, firsts if count < len(lengths) else [1] * len(lengths))
    starts, table = torch.tensor([0, *lengths]).cumsum(0)[:-1], torch.tensor([lengths, kept])
    found = []
    for length, m in table.unique(dim=1).T.tolist():
        if m:
            first = starts[(table[0] == length) & (table[1] == m)]
            index = rows[first[:, None] + torch.arange(length)].to(device, non_blocking=True)  # [runs, length]
            with torch.autocast(device.type, enabled=False):
                found.append(_clustered(entries, sizes, index, m, rule))
    place, keys, values, size = (torch.cat(column, 2) for column in zip(*found, strict=True))
    return place, keys, values, size


def _run_lengths(rows: Tensor) -> list[int]:
    """How many rows follow each other without a gap, run by run."""
    ends = torch.cat([(rows.diff() > 1).nonzero()[:, 0] + 1, rows.new_tensor([len(rows)])])
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def _pieces(length: int) -> list[int]:
    """A run's length, cut into about equal pieces of `PIECE` at most."""
    parts = -(-length // PIECE)
    return [length * (i + 1) // parts - length * i // parts for i in range(parts)]


def _clustered(
    entries: CacheEntries, sizes: Tensor, index: Tensor, m: int, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs of one length, [runs, n] places, as m entries each; flat [1, G, runs * m, ...]."""
    keys, values, size = entries.keys[0][:, index], entries.values[0][:, index], sizes[0][:, index]
    groups, runs, n, width = keys.shape
    place = index.expand(groups, runs, n)
    if m < n:
        alike = normalize(torch.cat([normalize(keys.float(), dim=-1), normalize(values.float(), dim=-1)], -1), dim=-1)
        if rule.spread == "farthest":
            centre = farthest_first(alike @ alike.mT, m)
        else:
            middles = torch.arange(m, dtype=torch.float32, device=index.device) + 0.5
            centre = (middles * n / m).long().expand(groups, runs, m)
        if rule.join:
            keys, values, size = _joined(keys, values, size, alike, centre)
        else:
            wide = centre[..., None].expand(groups, runs, m, width)
            keys, values = keys.gather(2, wide), values.gather(2, wide)
            size = size.sum(2, keepdim=True).expand(groups, runs, m) / m  # each stands for as many
        place = place.gather(2, centre)
    place, keys, values, size = (x.flatten(1, 2)[None] for x in (place, keys, values, size))
    return place, keys, values, size


def _joined(keys: Tensor, values: Tensor, size: Tensor, alike: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, weighted by size, of the entries nearest to each of the centres ([..., m] among [..., n])."""
    near = (alike @ alike.gather(2, centre[..., None].expand(*centre.shape, alike.shape[-1])).mT).argmax(-1)
    m = centre.shape[-1]
    near = near.scatter(2, centre, torch.arange(m, device=near.device).expand(centre.shape))  # itself, among equals
    weight = one_hot(near, m).to(size.dtype) * size[..., None]  # [G, runs, n, m]
    grown = weight.sum(2)
    keys, values = ((weight.mT @ x.float() / grown[..., None]).to(x.dtype) for x in (keys, values))
    return keys, values, grown


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
