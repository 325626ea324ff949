"""Replay's choice on plain tensors: one budget shared by score over all layers and heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mminfer.technique import CacheEntries, ReplayedStretch

FOR_PICTURE = 1.0  # what is added to the score of one entry of each picture: from here on entries are promised
BELOW = 1 - 2**-20  # the largest score of an entry that is not
LARGEST = 1e30  # of what is told of an entry
LEAST = 1e-30  # of an entry that was judged; 0 says that it was not
BELOW_AT_REST = 1 - 2**-8  # as `BELOW`, in bfloat16


def shared_choice(scores: Sequence[Tensor], total: int, sure: float) -> list[Tensor]:
    """Which entries stay, of all heads together: what is promised, the best of each head up to its sure part, the best.

    Args:
        scores: of each head, [S] float32; from `FOR_PICTURE` on they are promised.
        total: entries to keep.
        sure: of an even share, what each head is sure of, in [0, 1]; one entry at least.

    Returns:
        Of each head [S] bool.
    """
    lengths = [len(score) for score in scores]
    flat = torch.cat(list(scores))
    keep = torch.zeros_like(flat, dtype=torch.bool)
    if total >= len(flat):
        return list((~keep).split(lengths))
    least = max(int(sure * total / len(scores)), 1)
    for score, chosen in zip(scores, keep.split(lengths), strict=True):
        chosen[score.topk(min(least, len(score))).indices] = True
    ranks = torch.where(flat >= FOR_PICTURE, flat + 2, flat + keep)
    keep[:] = False
    keep[ranks.topk(total).indices] = True
    return list(keep.split(lengths))


def asked_for(stretch: ReplayedStretch) -> Tensor:
    """[G, n] float32, from 0 to 1: how much the entries of a stretch were asked for.

    It is the most that any query was given of them: x / (1 + x) of its share of the query's attention times what it
    writes, or the share alone where that is not known.
    """
    if stretch.written is None:
        return stretch.peaks
    given = (stretch.peaks * stretch.written).clamp_max(LARGEST)
    return given / (1 + given)


def one_for_each(peaks: Tensor, first: Tensor) -> Tensor:
    """[G, N] bool: of each run of entries, the one that is asked for most in any head.

    Args:
        peaks: [G, N] float32.
        first: [R, 2] int64, first and one past the last entry of each run.
    """
    out = torch.zeros_like(peaks, dtype=torch.bool)
    for start, stop in first.tolist():
        head, place = divmod(int(peaks[:, start:stop].argmax()), stop - start)
        out[head, start + place] = True
    return out


def with_scores(entries: CacheEntries, fresh: Tensor) -> CacheEntries:
    """The entries with new scores for the last ones of each head; fresh: [G, R] float32."""
    count, parts = fresh.shape[1], []
    for head, new in zip(entries.heads(), fresh.clamp_min(LEAST), strict=True):
        if head.score is None:
            raise ValueError("entries without scores")
        parts.append(torch.cat([by_age(head.score[0, 0, : len(head) - count], new), new]))
    joined = torch.cat(parts)[None, None] if entries.is_packed else torch.stack(parts)[None]
    return replace(entries, score=joined)


def at_rest(entries: CacheEntries) -> CacheEntries:
    """The entries with scores as they are held until a later pass: in two bytes where keys are of a half type.

    None comes to be promised by it, and none that was promised no longer is.
    """
    score = entries.score
    if score is None or entries.keys.element_size() > 2:
        return entries
    held = torch.where(score < FOR_PICTURE, score.clamp_max(BELOW_AT_REST), score).to(torch.bfloat16)
    return replace(entries, score=held)


def by_age(score: Tensor, new: Tensor) -> Tensor:
    """Scores [S] in which entries that no replay has judged, of generated tokens, have taken the others' by age.

    As great a share of them stays as of all others, the latest first.

    Args:
        score: [S] float32, 0 where nobody has judged.
        new: [R] float32, those of entries that have just been judged.
    """
    unjudged = score == 0
    count = int(unjudged.sum())
    if not count:
        return score
    others = torch.cat([score[~unjudged], new])
    if not len(others):
        return score
    places = (torch.arange(count, dtype=score.dtype, device=score.device) + 0.5) / count
    return score.masked_scatter(unjudged, others.clamp_max(1).quantile(places))
