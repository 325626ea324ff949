"""How sure a mean of few losses is: an upper bound by the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

DRAWS = 4000
LEAST_DRAWN = 4  # losses; fewer give resamples without any spread too often
LEAST_SURE = 0.95  # of so few, the least confidence that a bound has


def upper_bound(losses: Sequence[float], confidence: float = 0.95, seed: int = 0) -> float:
    """What the mean loss of such samples is below, with this confidence.

    Losses are never below zero and skewed, so that a resample that looks good has little spread as well: the bootstrap
    is of the mean divided by its own standard error. Of two or three losses, Student's interval.

    Args:
        losses: one for each content; two or more.
        confidence: of the one-sided bound, in (0.5, 1).
        seed: of the resamples.

    Returns:
        The bound; infinite where a loss is.

    Reference:
        Efron & Tibshirani, An Introduction to the Bootstrap (1993), section 12.5, the bootstrap-t interval.
    """
    x = torch.tensor(list(losses), dtype=torch.float64)
    if len(x) < 2 or not bool(x.isfinite().all()):
        return math.inf
    mean, error = float(x.mean()), float(x.std()) / math.sqrt(len(x))
    if error == 0:
        return mean
    if len(x) < LEAST_DRAWN:
        return mean + error * _student(max(confidence, LEAST_SURE), len(x) - 1)
    drawn = x[torch.randint(len(x), (DRAWS, len(x)), generator=torch.Generator().manual_seed(seed))]
    errors = drawn.std(1) / math.sqrt(len(x))
    t = (drawn.mean(1) - mean) / errors.clamp_min(1e-9 * error)
    return mean - error * float(t.quantile(1 - confidence))


def _student(confidence: float, freedom: int) -> float:
    """The quantile of Student's distribution with one or two degrees of freedom, in closed form."""
    if freedom == 1:
        return math.tan(math.pi * (confidence - 0.5))
    return (2 * confidence - 1) / math.sqrt(2 * confidence * (1 - confidence))


def likely(losses: Sequence[float]) -> float:
    """One standard error above the mean: what settings are chosen by, before they are checked."""
    x = torch.tensor(list(losses), dtype=torch.float64)
    if not len(x) or not bool(x.isfinite().all()):
        return math.inf
    return float(x.mean()) + (float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else 0.0)
