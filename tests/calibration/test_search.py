"""The search on a model of losses that add up worse than they seem, against all there is."""

from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace

import pytest

from mminfer import V2PE, AIMMerge, AIMPrune, InferenceConfig
from mminfer.calibration.costs import CostModel, LayerCost, Target, checked_target
from mminfer.calibration.judging import Outcome
from mminfer.calibration.search import RUNGS, STEP, Search
from mminfer.calibration.sensitivity import Sensitivities
from mminfer.calibration.space import STEPS, Choice, Option, Spared, visual_steps
from mminfer.calibration.trials import Trial
from mminfer.errors import ConfigError
from mminfer.positions import LinearScaling

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
        samples = tuple(SimpleNamespace(content=name) for name in "abcdefgh")
        return Trial(config, samples, ((Outcome(self.losses[config], 1, 1, 1.0, ()),) * 8,))


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


def test_a_ladder_for_held_out_samples():
    """From mild to cheap, each expected to lose more and to cost less than the one before, of what was tried alone."""
    bench = Pretended()
    search = Search(bench, (), Sensitivities(MODEL, tuple(OPTIONS), tuple(SPARED), ()), 0.1)
    wild = search.best(0.1)
    mild = search.best(0.01)
    assert mild.trial.kl <= 0.01 < wild.trial.kl <= 0.1 and mild.cost > wild.cost
    asked, rungs = bench.asked, search.ladder(0.1)
    assert bench.asked <= asked + 2 and 3 <= len(rungs) <= RUNGS
    for lower, upper in pairwise(rungs):
        assert upper.cost <= STEP * lower.cost and upper.trial.kl > lower.trial.kl
    assert rungs[0].cost < 1 and rungs[-1].cost == min(f.cost for f in search.tried if f.trial.kl <= 0.1)
    assert search.nothing().cost == 1 and search.best(0.0).trial.config == InferenceConfig()
    assert search.ladder(0.0) == []


def test_steps_of_visual_tokens_are_taken_where_they_lose_less():
    """Of a model that was trained with them; they save nothing, so that with nothing else there is none."""
    steps = (V2PE(1 / 4), V2PE(1 / 16))

    class Stepped(Pretended):
        def trial(self, config, samples, limit, phase):
            delta = 1 if config.positions is None else config.positions.delta
            found = super().trial(replace(config, positions=None), samples, limit, phase)
            kl = found.kl * {1: 1, 1 / 4: 0.5, 1 / 16: 0.9}[delta]
            return Trial(config, found.samples, ((Outcome(kl, 1, 1, 1.0, ()),) * 8,))

    parts = Sensitivities(MODEL, tuple(OPTIONS), tuple(SPARED), (), steps)
    with_steps = Search(Stepped(), (), parts, 0.05).best(0.05)
    without = Search(Stepped(), (), replace(parts, positions=()), 0.05).best(0.05)
    assert with_steps.trial.config.positions == V2PE(1 / 4) and with_steps.cost < without.cost
    assert Search(Stepped(), (), parts, 0.05).best(0.0).trial.config == InferenceConfig()


def test_which_steps_a_model_was_trained_with(nano_engine, tiny_engine):
    spec = nano_engine.adapter.spec
    assert [own.delta for own in visual_steps(spec, InferenceConfig())] == list(STEPS)
    assert [own.delta for own in visual_steps(spec, InferenceConfig(positions=V2PE(1 / 16)))] == [1 / 4, 1 / 64]
    assert visual_steps(spec, InferenceConfig(positions=LinearScaling(2.0))) == ()
    assert visual_steps(tiny_engine.adapter.spec, InferenceConfig()) == ()


def test_costs_between_what_was_looked_at():
    assert MODEL.layer.at(0.75, ()) == pytest.approx(4.0) and MODEL.layer.at(
        1.0, ("ffn", "attention")
    ) == pytest.approx(1.8)
    assert MODEL.of([1.0] * DEPTH, [()] * DEPTH) == 1
    assert MODEL.of([0.0] * DEPTH, [()] * DEPTH) == pytest.approx(5 / 21)
    assert checked_target("cache") is Target.CACHE
    with pytest.raises(ConfigError, match="wanted one of flops, latency, cache"):
        checked_target(None)
