"""Sweeps: rules at several budgets each, and the baselines they must beat: what Pareto plots are drawn of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mminfer.config import TECHNIQUES, InferenceConfig
from mminfer.technique import Stage
from mminfer.tokens.downsample import Downsample
from mminfer.tokens.random_prune import RandomPrune


@dataclass(frozen=True)
class Sweep:
    """One rule at several budgets.

    Args:
        rule: its name.
        steps: settings by the budget's name.
        baseline: whether it is there to be beaten.
    """

    rule: str
    steps: dict[str, InferenceConfig]
    baseline: bool

    @property
    def settings(self) -> dict[str, InferenceConfig]:
        """The settings by rule and budget."""
        return {f"{self.rule} {step}".strip(): config for step, config in self.steps.items()}


def token_sweeps() -> tuple[Sweep, ...]:
    """Merging before the model, pruning inside it, and both."""
    aim = InferenceConfig.from_preset("aim")
    at_random = replace(aim, prune=RandomPrune())
    both = (
        Sweep("AIM", {"": aim}, False),
        Sweep("AIM merge, random prune", {"": at_random}, True),
        Sweep("down-sampling, random prune", {"": replace(at_random, merge=Downsample(0.25))}, True),
    )
    return _baselines_last(*_sweeps(Stage.MERGE), *_sweeps(Stage.PRUNE), *both)


def cache_sweeps() -> tuple[Sweep, ...]:
    """Eviction from the cache at equal budgets."""
    return _baselines_last(*_sweeps(Stage.CACHE))


def _sweeps(stage: Stage) -> Iterator[Sweep]:
    """What the techniques of a stage bring themselves."""
    for technique in TECHNIQUES.values():
        if technique.stage is stage and "sweeps" in vars(technique):
            for rule, steps in technique.sweeps().items():
                configs = {step: InferenceConfig.of(own) for step, own in steps.items()}
                yield Sweep(rule, configs, technique.baseline)


def _baselines_last(*sweeps: Sweep) -> tuple[Sweep, ...]:
    return tuple(sorted(sweeps, key=lambda sweep: sweep.baseline))
