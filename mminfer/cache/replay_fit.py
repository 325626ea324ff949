"""Entries fitted to queries: what stays weighs and says, to those that were replayed, what all of them did."""

from __future__ import annotations

from typing import NamedTuple

import torch
from mminfer_kernels import fit_masses
from torch import Tensor

RIDGE = 0.3  # how strongly what is fitted is held to what it was, beside the mean attention that an entry receives
STEPS = 10  # in which masses are fitted
MOST = 20.0  # the largest mass, of one
TINY = torch.finfo(torch.float32).tiny


class Asked(NamedTuple):
    """Entries of P heads that queries read, and which of them stay.

    Args:
        queries: [P, R, D].
        keys: [P, N, D], all entries.
        values: [P, N, D].
        places: [P, k] int64: those that stay; where a head has fewer, any behind them.
        counts: [P] int64, how many of these do stay.
        movable: [P, k] bool: of those that stay, which may change.
        scale: factor of the logits.
        log_mass: [P, N] float32, added to them; None: 0.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    places: Tensor
    counts: Tensor
    movable: Tensor
    scale: float
    log_mass: Tensor | None = None


def fitted(asked: Asked) -> tuple[Tensor, Tensor]:
    """Values and log-masses of the entries that stay, such that queries read there what they read among all.

    Masses first, so that what stays weighs as much to every query as all did (by projected gradients, since a mass is
    positive); then values. Both are least squares with a ridge that holds entries to what they were.

    Returns:
        Values [P, k, D] and log-masses [P, k], float32.

    Reference:
        Attention Matching (arXiv 2602.16284) section 3: masses and values for chosen keys. The ridge is ours.
    """
    # [P, N, R]: halves would overflow, round
    logits = _product(asked.keys.float(), (asked.queries.float() * asked.scale).mT)
    if asked.log_mass is not None:
        logits += asked.log_mass[..., None]
    weights = logits.sub_(logits.amax(1, keepdim=True)).exp_()
    of_all = weights.sum(1, keepdim=True).reciprocal_()
    own, movable, counts = asked.values.float(), asked.movable[..., None], asked.counts
    stays = torch.arange(asked.places.shape[1], device=counts.device) < counts[:, None]
    kept = _rows(weights, asked.places).mul_(of_all).mul_(stays[..., None])
    still = _rows(own, asked.places)
    factor = fitted_masses(kept, counts)[..., None].nan_to_num_(1.0).where(movable, 1.0)  # of a model that gives nan
    kept *= factor
    kept /= kept.sum(1, keepdim=True).clamp_min_(TINY)
    missing = _product(weights.mT, own).mul_(of_all.mT).baddbmm_(kept.mT, still, alpha=-1)  # [P, R, D]
    kept *= movable
    ridge = _ridge(kept, counts)
    if kept.shape[2] < kept.shape[1]:
        change = _product(kept, _solved(_product(kept.mT, kept), ridge, missing))
    else:
        change = _solved(_product(kept, kept.mT), ridge, _product(kept, missing))
    mass = factor[..., 0].log()
    if asked.log_mass is not None:
        mass += asked.log_mass.gather(1, asked.places)
    return still + change.nan_to_num_(0.0, 0.0, 0.0), mass  # of a model that gives nan


def fitted_masses(shares: Tensor, counts: Tensor) -> Tensor:
    """Factors [P, k], from 1 / MOST to MOST, by which shares [P, k, R] of attention add up to 1 for each query, about.

    Projected gradients with momentum; each factor has a step of its own, the largest that cannot overshoot where
    nothing is negative. Shares beyond the counts ([P] int64) are 0, and their factors stay 1.
    """
    return fit_masses(shares, counts, RIDGE, STEPS, MOST)


def _ridge(shares: Tensor, counts: Tensor) -> Tensor:
    """[P, 1, 1]: by which what is fitted to shares [P, k, R] is held to what it was, of so many entries each."""
    return (shares.square().sum((1, 2)) * RIDGE / counts + TINY)[:, None, None]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[P, a, b]: left @ right; on a CPU a matrix times a vector takes half the time of a batch of one."""
    return (left[0] @ right[0])[None] if len(left) == 1 else left @ right


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """[P, k, C]: rows of x, [P, N, C]."""
    heads, size = x.shape[:2]
    if heads == 1:
        return x[0].index_select(0, places[0])[None]
    of_all = places + torch.arange(0, heads * size, size, device=places.device)[:, None]
    return x.flatten(0, 1).index_select(0, of_all.flatten()).unflatten(0, places.shape)


def _solved(matrix: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """(matrix + ridge * 1)^-1 right, of matrices [P, n, n] that are positive semidefinite; ridge: [P, 1, 1]."""
    matrix.diagonal(dim1=1, dim2=2).add_(ridge[..., 0])
    factor, _ = torch.linalg.cholesky_ex(matrix)
    half = torch.linalg.solve_triangular(factor, right, upper=False)  # `cholesky_solve` goes one by one on some GPUs
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)
