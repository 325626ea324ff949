"""Replay's choice on plain tensors: one budget shared by score over all layers and heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from mminfer.technique import CacheEntries, ReplayedStretch

FOR_PICTURE = 1.0  # what is added to the score of one entry of each picture: from here on entries are promised
BELOW = 1 - 2**-20  # the largest score of an entry that is not
LARGEST = 1e30  # of what is told of an entry
LEAST = 1e-30  # of an entry that was judged; 0 says that it was not
BELOW_AT_REST = 1 - 2**-8  # as `BELOW`, in bfloat16


def shared_choice(scores: Tensor, lengths: Sequence[int], total: int, sure: float) -> Tensor:
    """Which entries stay, of all heads together: what is promised, the best of each head up to its sure part, the best.

    Args:
        scores: [S] float32, head behind head; from `FOR_PICTURE` on they are promised.
        lengths: entries of each head.
        total: entries to keep.
        sure: of an even share, what each head is sure of, in [0, 1]; one entry at least.

    Returns:
        [S] bool, on the CPU, where what follows from it is worked out.
    """
    if total >= len(scores):
        return torch.ones(len(scores), dtype=torch.bool)
    heads, longest, least = len(lengths), max(lengths), max(int(sure * total / len(lengths)), 1)
    inside = (torch.arange(longest) < torch.tensor(lengths)[:, None]).flatten().nonzero()[:, 0]
    inside = inside.to(scores.device, non_blocking=True)
    by_head = scores.new_full((heads * longest,), -torch.inf).index_copy_(0, inside, scores).view(heads, longest)
    best = by_head.topk(min(least, longest)).indices
    safe = torch.zeros_like(by_head).scatter_(1, best, 1.0).flatten()[inside]
    ranks = torch.where(scores >= FOR_PICTURE, scores + 2, scores + safe)
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, ranks.topk(total).indices, True).cpu()


def asked_for(stretches: Sequence[ReplayedStretch]) -> Tensor:
    """[G, N] float32, from 0 to 1: how much the entries of these stretches, one behind the other, were asked for.

    It is the most that any query was given of them: x / (1 + x) of its share of the query's attention times what it
    writes, or the share alone where that is not known.
    """
    written = [stretch.written for stretch in stretches if stretch.written is not None]
    if 0 < len(written) < len(stretches):
        return side_by_side([asked_for([stretch]) for stretch in stretches])
    peaks = side_by_side([stretch.peaks for stretch in stretches])
    if not written:
        return peaks
    given = (peaks * side_by_side(written)).clamp_max_(LARGEST)
    return given / (1 + given)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """[..., N]: all parts, where the first is."""
    return torch.cat([part.to(parts[0].device) for part in parts], -1)


def run_numbers(is_visual: Sequence[Tensor]) -> Tensor:
    """[N] int64: in which run of visual entries each stands, of layers ([n] bool each) one behind the other.

    -1 stands for none. No run goes on from one layer into the next.
    """
    flags = side_by_side(is_visual)
    after = torch.ones(len(flags), dtype=torch.bool)
    after[list(accumulate(map(len, is_visual[:-1]), initial=0))] = False  # what a layer begins with
    goes_on = torch.cat([flags[:1], flags[:-1]]) & after.to(flags.device, non_blocking=True)
    return ((flags & ~goes_on).cumsum(0) - 1).where(flags, -1)


def one_for_each(peaks: Tensor, run: Tensor) -> Tensor:
    """[G, N] bool: of each run of entries, the one that is asked for most in any head, the first of equal ones.

    Args:
        peaks: [G, N] float32.
        run: [N] int64, which run each entry is in; -1: in none.
    """
    group, code = run + 1, torch.arange(peaks.numel(), device=peaks.device).view(peaks.shape)
    most = peaks.new_full((len(run) + 1,), -torch.inf).scatter_reduce_(0, group, peaks.amax(0), "amax")
    best = (peaks == most[group]) & (run >= 0)
    first = code.where(best, peaks.numel())
    first = first.new_full((len(run) + 1,), peaks.numel()).scatter_reduce_(0, group, first.amin(0), "amin")[group]
    return best & (code == first)


def with_scores(layers: Sequence[CacheEntries], fresh: Sequence[Tensor]) -> list[CacheEntries]:
    """The entries of all layers with new scores for the last ones of each head.

    Args:
        layers: the entries.
        fresh: of each layer [G, R] float32, none of them 0: that says that nobody has judged.
    """
    held = [_held_scores(entries, new.shape[1]) for entries, new in zip(layers, fresh, strict=True)]
    heads = [score for of_layer in held for score in of_layer]
    unjudged = iter(_zeros(heads) if any(map(len, heads)) else [0] * len(heads))
    out = []
    for entries, older, new in zip(layers, held, fresh, strict=True):
        parts = [by_age(score, own, next(unjudged)) for score, own in zip(older, new, strict=True)]
        if not any(map(len, parts)):
            joined = new.reshape(entries.keys.shape[:3])
        elif entries.is_packed:
            joined = torch.cat([x for pair in zip(parts, new, strict=True) for x in pair])[None, None]
        else:
            joined = torch.cat([torch.stack(parts), new], 1)[None]
        out.append(replace(entries, score=joined))
    return out


def _held_scores(entries: CacheEntries, new: int) -> list[Tensor]:
    """[S] float32 of each head: the scores of all but the last `new` entries."""
    if entries.score is None:
        raise ValueError("entries without scores")
    flat = entries.score[0].flatten().split(entries.lengths)
    return [score[: len(score) - new] for score in flat]


def at_rest(entries: CacheEntries) -> CacheEntries:
    """The entries with scores as they are held until a later pass: in two bytes where keys are of a half type.

    None comes to be promised by it, and none that was promised no longer is.
    """
    score = entries.score
    return entries if score is None else replace(entries, score=scores_at_rest(score, entries.keys.dtype))


def scores_at_rest(score: Tensor, dtype: torch.dtype) -> Tensor:
    """`at_rest`'s scores, of entries whose keys are of this type; those that are at rest stay as they are."""
    if dtype.itemsize > 2 or score.dtype == torch.bfloat16:
        return score
    return torch.where(score < FOR_PICTURE, score.clamp_max(BELOW_AT_REST), score).to(torch.bfloat16)


def _zeros(scores: Sequence[Tensor]) -> list[int]:
    """How many numbers of each are 0, asked of the device once."""
    found = side_by_side(scores).eq(0).cpu()
    return [int(own.sum()) for own in found.split([len(score) for score in scores])]


def by_age(score: Tensor, new: Tensor, unjudged: int) -> Tensor:
    """Scores [S] in which entries that no replay has judged, of generated tokens, have taken the others' by age.

    As great a share of them stays as of all others, the latest first.

    Args:
        score: [S] float32, 0 where nobody has judged.
        new: [R] float32, those of entries that have just been judged.
        unjudged: how many of the scores are 0.
    """
    if not unjudged:
        return score
    nobody = score == 0
    judged = score.masked_fill(nobody, torch.inf).sort().values[: len(score) - unjudged]
    places = (torch.arange(unjudged, dtype=torch.float32, device=score.device) + 0.5) / unjudged
    return score.masked_scatter(nobody, torch.cat([judged, new]).clamp_max(1).quantile(places))
