"""Replay's rules on plain tensors: sharing one budget over all heads, and values fitted to what was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mminfer.technique import CacheEntries, ReplayedStretch

RIDGE = 0.1  # how strongly fitted values are held to their own, beside the mean attention that an entry receives
FOR_PICTURE = 1.0  # what is added to the score of one entry of each picture: from here on entries are promised
BELOW = 1 - 2**-20  # the largest score of an entry that is not
LEAST = 1e-30  # of an entry that was judged; 0 says that it was not


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


def fitted_values(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    keep: Tensor,
    movable: Tensor,
    scale: float,
    log_mass: Tensor | None = None,
) -> Tensor:
    """Values of one head's entries that stay, such that queries read among these what they read among all.

    Least squares with a ridge that holds them to their own values.

    Args:
        queries: [R, D].
        keys: [N, D], all entries.
        values: [N, D].
        keep: [N] bool, those that stay.
        movable: [k] bool, of those that stay, whose values may change.
        scale: factor of the logits.
        log_mass: [N] float32, added to them; None: 0.

    Returns:
        [k, D] float32.

    Reference:
        Attention Matching (arXiv 2602.16284) section 3: values for chosen keys in closed form. That the logits keep
        no log-masses of their own, and the ridge, are ours.
    """
    places = keep.nonzero()[:, 0]
    logits = (queries @ keys.mT).float().mul_(scale)  # [R, N]
    if log_mass is not None:
        logits += log_mass
    logits = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    own, kept = values.float(), logits.index_select(1, places)
    kept /= kept.sum(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    still = own.index_select(0, places)
    missing = (logits @ own).div_(logits.sum(-1, keepdim=True)) - kept @ still  # [R, D]
    kept *= movable
    ridge = kept.square().sum() * (RIDGE / max(len(places), 1)) + torch.finfo(torch.float32).tiny
    if len(queries) < len(places):
        change = kept.mT @ _solved(kept @ kept.mT, ridge, missing)
    else:
        change = _solved(kept.mT @ kept, ridge, kept.mT @ missing)
    return still + change


def _solved(matrix: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """(matrix + ridge * 1)^-1 right, of a matrix [n, n] that is positive semidefinite."""
    matrix.diagonal().add_(ridge)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(right, factor)


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
    places = (torch.arange(count, device=score.device) + 0.5) / count
    return score.masked_scatter(unjudged, others.clamp_max(1).quantile(places))


def fit_stretch(keys: Tensor, values: Tensor, keep: Tensor, stretch: ReplayedStretch, head: int) -> None:
    """Writes fitted values for the entries of one head's stretch that stay.

    Args:
        keys: [n, D].
        values: [n, D], written in place.
        keep: [n] bool.
        stretch: what looked at them.
        head: which key/value head.
    """
    heads = stretch.peaks.shape[0]
    queries = stretch.queries.unflatten(0, (heads, -1))[head].flatten(0, 1)
    stays, earlier = keep, stretch.earlier
    movable, own, log_mass = stays[stays], values, None
    if earlier is not None:
        ahead = earlier.keys.shape[1]
        keys, own = (torch.cat([a[head], b]) for a, b in ((earlier.keys, keys), (earlier.values, values)))
        keep, movable = (pad(flags, (ahead, 0), value=flag) for flags, flag in ((keep, True), (movable, False)))
        log_mass = None if earlier.log_mass is None else pad(earlier.log_mass[head], (0, len(values)))
    fitted = fitted_values(queries, keys, own, keep, movable, stretch.scale, log_mass)
    values[stays] = fitted[movable].to(values.dtype)
