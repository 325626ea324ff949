"""The bound is above the mean as often as it says, and infinite where nothing can be said."""

import math

import pytest
import torch

from mminfer.calibration.bounds import NEGLIGIBLE, likely, spread, sure_share, upper_bound


@pytest.mark.parametrize("count", [4, 16])
@pytest.mark.parametrize(("wide", "least"), [(0.7, 0.95), (1.5, 0.85)])
def test_it_covers_the_mean_of_skewed_losses(count, wide, least):
    """As often as it says where logarithms spread by one; of wilder losses less, as the docs say."""
    generator = torch.Generator().manual_seed(1)
    held, draws, mean = 0, 400, math.exp(wide**2 / 2)
    for _ in range(draws):
        losses = torch.randn(count, generator=generator).mul(wide).exp()
        held += upper_bound(losses.tolist(), 0.95, mean) >= mean
    assert held >= least * draws


def test_without_a_prior_spread_luck_is_taken_for_sureness():
    """Four losses near each other, of which the next is ten times as large as often as not: the bound leaves room."""
    assert upper_bound([0.0036, 0.0036, 0.0035, 0.0037], 0.95, 0.05) > 2 * 0.0036
    assert upper_bound([0.0036] * 40, 0.95, 0.05) < 1.2 * 0.0036


def test_more_confidence_is_a_higher_bound():
    losses = [0.01, 0.02, 0.04, 0.01, 0.03]
    bounds = [upper_bound(losses, confidence) for confidence in (0.8, 0.9, 0.95)]
    assert sum(losses) / 5 < bounds[0] < bounds[1] < bounds[2]
    assert upper_bound(losses * 4) < bounds[2]
    assert upper_bound(losses) == upper_bound(losses)


@pytest.mark.parametrize("losses", [[], [0.1], [0.1, math.inf], [0.1, math.nan, 0.1, 0.2]])
def test_nothing_can_be_said_of(losses):
    assert upper_bound(losses) == math.inf


def test_losses_of_nothing_and_of_next_to_nothing():
    """What is far below what is allowed counts as a part of it: the bound never says more than so few can say."""
    assert upper_bound([0.0] * 4) == 0.0 and spread([0.0] * 4, 0.0) == spread([], 1.0) == spread([1.0], 1.0) == 0.0
    tiny = [upper_bound([scale] * 4, 0.95, 1.0) for scale in (0.0, 1e-9, NEGLIGIBLE / 2)]
    assert len(set(tiny)) == 1 and NEGLIGIBLE < tiny[0] < 4 * NEGLIGIBLE
    assert upper_bound([1e-12, 1.0], 0.95, 1.0) > 1 and spread([1.0, math.e], 1.0) == pytest.approx(0.5**0.5)
    assert upper_bound([0.1, 0.2, 50.0], 0.95, 0.1) >= 50.3 / 3


def test_a_share_that_holds_whatever_losses_are_like():
    assert sure_share(59) == pytest.approx(0.95, abs=1e-3) and sure_share(4) == pytest.approx(0.473, abs=1e-3)
    assert sure_share(0) == 0 and sure_share(4, 0.99) < sure_share(4)


def test_one_error_above_the_mean():
    assert likely([0.1, 0.2]) == pytest.approx(0.2) and likely([0.1]) == 0.1 and likely([math.nan]) == math.inf
