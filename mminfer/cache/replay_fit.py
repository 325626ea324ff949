"""Entries fitted to queries: what stays weighs and says, to those that were replayed, what all of them did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mminfer.technique import CacheEntries, ReplayedStretch

RIDGE = 0.3  # how strongly what is fitted is held to what it was, beside the mean attention that an entry receives
STEPS = 10  # in which masses are fitted
MOST = 20.0  # the largest mass, of one
TINY = torch.finfo(torch.float32).tiny


def fitted_entries(entries: CacheEntries, looked: Sequence[ReplayedStretch], keep: Sequence[Tensor]) -> CacheEntries:
    """The entries, values and log-masses of those that stay fitted to what the replayed queries read in their stretch.

    Args:
        entries: of one layer; those that a stretch holds are the last.
        looked: the stretches; none: nothing is fitted.
        keep: of each head, [S] bool, those that stay.
    """
    if not looked or all(bool(kept.all()) for kept in keep):
        return entries
    mass = entries.values.new_zeros(entries.keys.shape[:3], dtype=torch.float32)
    if entries.log_mass is not None:
        mass += entries.log_mass
    out, count = replace(entries, values=entries.values.clone(), log_mass=mass), looked[-1].last
    for head, (part, kept) in enumerate(zip(out.heads(), keep, strict=True)):  # views: what is written is in `out`
        older = len(part) - count
        for stretch in looked:
            rows = slice(older + stretch.first, older + stretch.last)
            if not bool(kept[rows].all()):
                fit_stretch(part, rows, kept[rows], stretch, head)
    return out


def fit_stretch(part: CacheEntries, rows: slice, keep: Tensor, stretch: ReplayedStretch, head: int) -> None:
    """Writes fitted values and log-masses for the entries of one head's stretch that stay.

    Args:
        part: the head's entries, written in place.
        rows: where those of the stretch lie.
        keep: [n] bool, of these.
        stretch: what looked at them.
        head: which key/value head.
    """
    keys, values, queries = part.keys[0, 0, rows], part.values[0, 0, rows], _queries(stretch, head)
    movable, own, log_mass, flags = keep[keep], values, None, keep
    if stretch.earlier is not None:
        earlier = stretch.earlier
        ahead = earlier.keys.shape[1]
        keys, own = (torch.cat([a[head], b]) for a, b in ((earlier.keys, keys), (earlier.values, values)))
        flags, movable = pad(keep, (ahead, 0), value=True), pad(movable, (ahead, 0), value=False)
        log_mass = None if earlier.log_mass is None else pad(earlier.log_mass[head], (0, len(values)))
    with torch.autocast(keys.device.type, enabled=False):
        fitted_values, mass = fitted(queries, keys, own, flags, movable, stretch.scale, log_mass)
    values[keep] = fitted_values[movable].to(values.dtype)
    if part.log_mass is not None:
        part.log_mass[0, 0, rows][keep] = mass[movable]


def _queries(stretch: ReplayedStretch, head: int) -> Tensor:
    """[R, D], those that look with one key/value head."""
    return stretch.queries.unflatten(0, (stretch.peaks.shape[0], -1))[head].flatten(0, 1)


def fitted(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    keep: Tensor,
    movable: Tensor,
    scale: float,
    log_mass: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-masses and values of one head's entries that stay, such that queries read there what they read among all.

    Masses first, so that what stays weighs as much to every query as all did (by projected gradients, since a mass is
    positive); then values. Both are least squares with a ridge that holds entries to what they were.

    Args:
        queries: [R, D].
        keys: [N, D], all entries.
        values: [N, D].
        keep: [N] bool, those that stay.
        movable: [k] bool, of those that stay, which may change.
        scale: factor of the logits.
        log_mass: [N] float32, added to them; None: 0.

    Returns:
        Values [k, D] and log-masses [k], float32.

    Reference:
        Attention Matching (arXiv 2602.16284) section 3: masses and values for chosen keys. The ridge is ours.
    """
    places = keep.nonzero()[:, 0]
    logits = (queries.float() * scale) @ keys.float().mT  # [R, N]: in half precision they would overflow, or round
    if log_mass is not None:
        logits += log_mass
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    of_all = weights.sum(-1, keepdim=True).reciprocal_()
    own, kept = values.float(), weights.index_select(1, places).mul_(of_all)
    still = own.index_select(0, places)
    factor = torch.where(movable, fitted_masses(kept).nan_to_num_(1.0), 1.0)  # of a model that gives nan
    kept *= factor
    kept /= kept.sum(-1, keepdim=True).clamp_min_(TINY)
    missing = (weights @ own).mul_(of_all).addmm_(kept, still, alpha=-1)  # [R, D]
    kept *= movable
    ridge = RIDGE * kept.square().sum() / max(len(places), 1) + TINY
    if len(queries) < len(places):
        change = kept.mT @ _solved(kept @ kept.mT, ridge, missing)
    else:
        change = _solved(kept.mT @ kept, ridge, kept.mT @ missing)
    mass = factor.log() if log_mass is None else factor.log() + log_mass.index_select(0, places)
    return still + change.nan_to_num_(0.0, 0.0, 0.0), mass  # of a model that gives nan


def fitted_masses(shares: Tensor) -> Tensor:
    """Factors [k], from 1 / MOST to MOST, by which shares [R, k] of attention add up to 1 for each query, about.

    Projected gradients with momentum; each factor has a step of its own, the largest that cannot overshoot where
    nothing is negative.
    """
    ridge = RIDGE * shares.square().sum() / max(shares.shape[1], 1) + TINY
    step = (shares.mT @ shares.sum(-1)).add_(ridge).reciprocal_()
    wanted = shares.sum(0).add_(ridge)
    factor = ahead = torch.ones_like(wanted)
    pace = 1.0
    for _ in range(STEPS):
        last, pace_was, pace = factor, pace, (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        gradient = (shares.mT @ (shares @ ahead)).addcmul_(ahead, ridge).sub_(wanted)
        factor = torch.addcmul(ahead, gradient, step, value=-1).clamp_(1 / MOST, MOST)
        ahead = factor.lerp(last, (1 - pace_was) / pace)
    return factor


def _solved(matrix: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """(matrix + ridge * 1)^-1 right, of a matrix [n, n] that is positive semidefinite."""
    matrix.diagonal().add_(ridge)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(right, factor)
