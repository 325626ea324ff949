"""The search on a model of losses that add up worse than they seem, against all there is."""

from itertools import product
from types import SimpleNamespace

import pytest

from mminfer import AIMMerge, AIMPrune, InferenceConfig
from mminfer.calibration.costs import CostModel, LayerCost, Target, checked_target
from mminfer.calibration.judging import Outcome
from mminfer.calibration.search import Search
from mminfer.calibration.sensitivity import Sensitivities
from mminfer.calibration.space import Choice, Option, Spared
from mminfer.calibration.trials import Trial
from mminfer.errors import ConfigError

DEPTH = 4
MODEL = CostModel(
    LayerCost((1.0, 2.0, 3.0, 5.0), {"ffn": (0.0, 0.6, 1.2, 2.4), "attention": (0.0, 0.2, 0.4, 0.8)}), DEPTH, 1.0
)
OPTIONS = [
    Option(AIMMerge(0.5), (0.004,), (0.5,) * DEPTH, spent=0.02),
    Option(AIMMerge(0.2), (0.03,), (0.2,) * DEPTH, spent=0.02),
    Option(AIMPrune(2, 3), (0.008,), (1.0, 1.0, 1.0, 0.0)),
]
SPARED = [
    Spared(name, layer, (0.001 * (5 - layer) * times,))
    for layer in range(DEPTH)
    for name, times in (("ffn", 4), ("attention", 1))
]


def lost(choice):
    parts = len(choice.options) + len(choice.spared)
    return choice.loss(1) * (1 + 0.1 * max(parts - 1, 0))


class Pretended:
    """A bench whose samples lose what the choice says."""

    off, protocols = InferenceConfig(), ("in-prompt",)

    def __init__(self):
        self.asked = 0
        self.losses = {choice.config(self.off): lost(choice) for choice in all_choices()}

    def trial(self, config, samples, limit, phase):
        self.asked += 1
        sample = SimpleNamespace(content="a")
        return Trial(config, (sample,), ((Outcome(self.losses[config], 1, 1, 1.0, ()),),))


def all_choices():
    merges, prunes = (None, *OPTIONS[:2]), (None, OPTIONS[2])
    for merge, prune, *bits in product(merges, prunes, *[(False, True)] * len(SPARED)):
        options = {own.technique.stage: own for own in (merge, prune) if own is not None}
        yield Choice(options, frozenset(own for own, bit in zip(SPARED, bits, strict=True) if bit))


def test_it_comes_near_the_best_of_all_and_a_larger_limit_never_costs_more():
    everything = [(lost(choice), choice.cost(MODEL)) for choice in all_choices()]
    costs = []
    for limit in (0.001, 0.005, 0.02, 0.05, 0.2):
        bench = Pretended()
        search = Search(bench, (), Sensitivities(MODEL, tuple(OPTIONS), tuple(SPARED), ()), limit)
        found = search.best(limit)
        assert found.trial.kl <= limit and bench.asked < 60
        assert found.cost <= 1.06 * min(cost for loss, cost in everything if loss <= limit)
        costs.append(found.cost)
    assert costs == sorted(costs, reverse=True) and costs[-1] < 0.5 < costs[0]


def test_milder_settings_are_found_among_what_was_tried():
    bench = Pretended()
    search = Search(bench, (), Sensitivities(MODEL, tuple(OPTIONS), tuple(SPARED), ()), 0.1)
    wild = found = search.best(0.1)
    asked, costs = bench.asked, [wild.cost]
    while found.cost < 1:
        found = search.milder(found, 0.1)
        assert found.cost >= 1.03 * costs[-1]
        costs.append(found.cost)
    assert bench.asked <= asked + len(costs) and len(costs) > 4 and found.trial.config == InferenceConfig()
    mild = search.best(0.01)
    assert mild.trial.kl <= 0.01 < wild.trial.kl <= 0.1 and mild.cost > wild.cost
    assert search.nothing().cost == 1 and search.best(0.0).trial.config == InferenceConfig()


def test_costs_between_what_was_looked_at():
    assert MODEL.layer.at(0.75, ()) == pytest.approx(4.0) and MODEL.layer.at(
        1.0, ("ffn", "attention")
    ) == pytest.approx(1.8)
    assert MODEL.of([1.0] * DEPTH, [()] * DEPTH) == 1
    assert MODEL.of([0.0] * DEPTH, [()] * DEPTH) == pytest.approx(5 / 21)
    assert checked_target("cache") is Target.CACHE
    with pytest.raises(ConfigError, match="wanted one of flops, latency, cache"):
        checked_target(None)
