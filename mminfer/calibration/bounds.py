"""How sure a mean of few losses is: an upper bound, by what losses are like at worst."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

DRAWS = 4000
# Before any loss is seen, their logarithms are held to spread by so much, as if so many had said so: two or three
# losses that happen to be near each other say little of how far others are.
PRIOR_SPREAD, PRIOR_COUNT = 0.8, 3
NEGLIGIBLE = 0.02  # of the loss that is allowed: less counts as so much
WIDEST = 700.0  # of a logarithm
WILD = 1.5  # spread of the logarithms, beyond which few losses say too little of the largest


def upper_bound(losses: Sequence[float], confidence: float = 0.95, allowed: float = 0.0) -> float:
    """What the mean loss of such samples is below, with this confidence, if losses are no wilder than log-normal.

    No bound on the mean holds for whatever losses there may be: one in a thousand may be huge, and eight samples do not
    say. Losses of samples are skewed like a log-normal distribution or less; for that one the bound is exact, but for
    the prior on the spread, which makes it higher where a few losses are near each other by luck.

    Args:
        losses: one for each content; two or more.
        confidence: of the one-sided bound, in (0.5, 1).
        allowed: loss, of which `NEGLIGIBLE` parts are nothing to tell apart; 0: losses are positive.

    Returns:
        The bound, never below the mean; infinite where a loss is, or of fewer than two.

    Reference:
        Krishnamoorthy & Mathew, Inferences on the means of lognormal distributions using generalized p-values and
        generalized confidence intervals (2003), section 3; floor and prior are ours.
    """
    x = torch.tensor(list(losses), dtype=torch.float64)
    if len(x) < 2 or not bool(x.isfinite().all()):
        return math.inf
    logs = _logs(x, allowed)
    if logs is None:
        return 0.0
    freedom = len(x) - 1 + PRIOR_COUNT
    squares = float((logs - logs.mean()).square().sum()) + PRIOR_COUNT * PRIOR_SPREAD**2
    normal, chi = _pivots(freedom)
    variance = squares / chi
    pivot = float(logs.mean()) + normal * np.sqrt(variance / len(x)) + variance / 2
    return max(float(x.mean()), math.exp(min(float(np.quantile(pivot, confidence)), WIDEST)))


def spread(losses: Sequence[float], allowed: float) -> float:
    """Standard deviation of the logarithms, as `upper_bound` takes them; 0 where there is none."""
    logs = _logs(torch.tensor(list(losses), dtype=torch.float64), allowed)
    return 0.0 if logs is None or len(logs) < 2 or not bool(logs.isfinite().all()) else float(logs.std())


def sure_share(count: int, confidence: float = 0.95) -> float:
    """Of all such samples, how many lose less than the largest of some losses at least, whatever they are like.

    Args:
        count: of the losses.
        confidence: with which it holds.
    """
    return float((1 - confidence) ** (1 / count)) if count else 0.0


def likely(losses: Sequence[float]) -> float:
    """One standard error above the mean: what settings are chosen by, before they are checked."""
    x = torch.tensor(list(losses), dtype=torch.float64)
    if not len(x) or not bool(x.isfinite().all()):
        return math.inf
    return float(x.mean()) + (float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else 0.0)


def _logs(losses: torch.Tensor, allowed: float) -> torch.Tensor | None:
    """Logarithms, small losses raised; None: all of them are nothing."""
    least = max(NEGLIGIBLE * allowed, float(losses.max()) * 1e-6) if len(losses) else 0.0
    return losses.clamp_min(least).log() if least > 0 else None


@lru_cache(maxsize=32)
def _pivots(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal and chi-squared numbers, always the same."""
    generator = np.random.default_rng(freedom)
    return generator.standard_normal(DRAWS), generator.chisquare(freedom, DRAWS)
