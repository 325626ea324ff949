"""The bound is above the mean as often as it says, and infinite where nothing can be said."""

import math

import pytest
import torch

from mminfer.calibration.bounds import likely, upper_bound


@pytest.mark.parametrize(("spread", "least"), [(0.7, 0.88), (1.5, 0.78)])
def test_it_covers_the_mean_of_skewed_losses(spread, least):
    """Of eight losses as prompts have them, 90 % of the time; of wilder ones 80 %: less than it says, and told so."""
    generator = torch.Generator().manual_seed(1)
    held, draws = 0, 1000
    for seed in range(draws):
        losses = torch.randn(8, generator=generator).mul(spread).exp()
        held += upper_bound(losses.tolist(), 0.95, seed) >= math.exp(spread**2 / 2)
    assert held >= least * draws


def test_more_confidence_is_a_higher_bound():
    losses = [0.01, 0.02, 0.04, 0.01, 0.03]
    bounds = [upper_bound(losses, confidence) for confidence in (0.8, 0.9, 0.95)]
    assert sum(losses) / 5 < bounds[0] < bounds[1] < bounds[2]
    assert upper_bound(losses * 4) < bounds[2]
    assert upper_bound(losses) == upper_bound(losses)


@pytest.mark.parametrize("losses", [[], [0.1], [0.1, math.inf], [0.1, math.nan, 0.1, 0.2]])
def test_nothing_can_be_said_of(losses):
    assert upper_bound(losses) == math.inf


def test_two_losses_and_equal_ones():
    assert upper_bound([0.1, 0.2]) == pytest.approx(0.15 + 0.05 * 6.3137515, rel=1e-6)
    assert upper_bound([0.1, 0.2], 0.99) == pytest.approx(0.15 + 0.05 * 31.8205160, rel=1e-6)
    three = [0.1, 0.2, 0.3]
    error = 0.1 / math.sqrt(3)
    assert upper_bound(three) == pytest.approx(0.2 + error * 2.9199856, rel=1e-6)
    assert upper_bound(three, 0.99) == pytest.approx(0.2 + error * 6.9645567, rel=1e-6)
    assert upper_bound([0.1] * 4) == pytest.approx(0.1)
    assert likely([0.1, 0.2]) == pytest.approx(0.2) and likely([0.1]) == 0.1 and likely([math.nan]) == math.inf
