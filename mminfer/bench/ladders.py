"""Rules at several budgets each, and the baselines they must beat: what Pareto plots are drawn of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mminfer.cache.digest import Digest
from mminfer.cache.h2o import H2O
from mminfer.cache.lookm import LookM
from mminfer.cache.random_evict import RandomEvict
from mminfer.cache.snapkv import SnapKV
from mminfer.config import InferenceConfig
from mminfer.tokens.downsample import Downsample
from mminfer.tokens.fastv import FastV
from mminfer.tokens.merge import AIMMerge
from mminfer.tokens.random_prune import RandomPrune

CACHE_SHARES = (50, 20, 10, 5)  # percent of all entries
MERGE_SHARES = (50, 25, 12.5)  # percent of an image's tokens
FASTV_SHARES = (50, 25, 10)  # percent of the visual tokens


@dataclass(frozen=True)
class Ladder:
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


def token_ladders() -> tuple[Ladder, ...]:
    """Merging before the model, pruning inside it."""
    aim = InferenceConfig.from_preset("aim")
    at_random = replace(aim, prune=RandomPrune())
    return (
        _merging("AIM merge", AIMMerge, False),
        Ladder("AIM prune", {"": InferenceConfig.from_preset("aim-prune")}, False),
        Ladder("AIM", {"": aim}, False),
        _merging("down-sampling", Downsample, True),
        Ladder("random prune", {"": InferenceConfig.from_preset("random-prune")}, True),
        Ladder("FastV", {f"{s} %": InferenceConfig(prune=FastV(2, s / 100)) for s in FASTV_SHARES}, True),
        Ladder("AIM merge, random prune", {"": at_random}, True),
        Ladder("down-sampling, random prune", {"": replace(at_random, merge=Downsample(0.25))}, True),
    )


def cache_ladders() -> tuple[Ladder, ...]:
    """Eviction from the cache at equal budgets."""
    rules: dict[str, tuple[type[LookM], dict[str, Any], bool]] = {
        "LOOK-M pivot": (LookM, {}, False),
        "LOOK-M average": (LookM, {"merge": "average"}, False),
        "LOOK-M average, no text first": (LookM, {"merge": "average", "text_prior": False}, False),
        "random, text first": (RandomEvict, {}, True),
        "random": (RandomEvict, {"text_prior": False}, True),
        "H2O": (H2O, {}, True),
        "SnapKV": (SnapKV, {}, True),
    }
    digest = {f"{share} %": InferenceConfig(cache=Digest(share / 100)) for share in CACHE_SHARES}
    return (Ladder("Digest", digest, False), *(_evicting(name, *rule) for name, rule in rules.items()))


def _merging(rule: str, technique: Any, baseline: bool) -> Ladder:
    steps = {f"{share} %": InferenceConfig(merge=technique(share / 100)) for share in MERGE_SHARES}
    return Ladder(rule, steps, baseline)


def _evicting(rule: str, technique: type[LookM], settings: dict[str, Any], baseline: bool) -> Ladder:
    steps = {
        f"{share} %": InferenceConfig(cache=technique(share / 200, share / 200, **settings)) for share in CACHE_SHARES
    }
    return Ladder(rule, steps, baseline)
