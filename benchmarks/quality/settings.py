"""The settings that the tables compare, in groups: each technique's ladder of budgets beside its baselines."""

from dataclasses import replace
from itertools import combinations
from typing import Any

from mminfer import V2PE, AIMMerge, InferenceConfig, LookM
from mminfer.baselines import H2O, Downsample, FastV, RandomEvict, RandomPrune, SnapKV

Settings = dict[str, InferenceConfig]
OFF = {"off": InferenceConfig()}


def _presets(*names: str) -> Settings:
    return {name: InferenceConfig.from_preset(name) for name in names}


def _tokens() -> Settings:
    """Merging before the model, pruning inside it."""
    merges = {f"{name} {share} %": technique(share / 100) for share in (50, 25, 12.5) for name, technique in _MERGES}
    fastv = {f"FastV {share} %": InferenceConfig(prune=FastV(2, share / 100)) for share in (50, 25, 10)}
    random = InferenceConfig(merge=AIMMerge(0.25), prune=RandomPrune())
    return {
        **{name: InferenceConfig(merge=merge) for name, merge in merges.items()},
        "AIM prune": InferenceConfig.from_preset("aim-prune"),
        "random prune": InferenceConfig.from_preset("random-prune"),
        **fastv,
        "AIM": InferenceConfig.from_preset("aim"),
        "AIM merge, random prune": random,
        "down-sampling, random prune": replace(random, merge=Downsample(0.25)),
    }


_MERGES = (("AIM merge", AIMMerge), ("down-sampling", Downsample))


def _cache() -> Settings:
    """Eviction at equal budgets; images brought down to the same entries before the model, where text leaves room."""
    settings = {}
    for share in (50, 20, 10, 5):
        half = share / 200
        rules: dict[str, Any] = {
            "LOOK-M pivot": LookM(half, half),
            "LOOK-M average": LookM(half, half, merge="average"),
            "random, text first": RandomEvict(half, half),
            "LOOK-M average, no text first": LookM(half, half, merge="average", text_prior=False),
            "H2O": H2O(half, half),
            "SnapKV": SnapKV(half, half),
            "random": RandomEvict(half, half, text_prior=False),
        }
        settings |= {f"{name} {share} %": InferenceConfig(cache=rule) for name, rule in rules.items()}
    settings["LOOK-M weighted 20 %"] = InferenceConfig(cache=LookM(0.1, 0.1, merge="weighted"))
    for share, tokens in ((50, 27), (20, 5)):  # of a picture's 64
        settings |= {f"{name} to {share} %": InferenceConfig(merge=merge(tokens / 64)) for name, merge in _MERGES}
    return settings


ALONE: dict[str, dict[str, Any]] = {
    "V2PE": {"positions": V2PE(1 / 16)},
    "AIM": {"merge": InferenceConfig.from_preset("aim").merge, "prune": InferenceConfig.from_preset("aim").prune},
    "LOOK-M": {"cache": LookM(0.1, 0.1, merge="average")},
    "skip": {"skip": InferenceConfig.from_preset("skip-ffn").skip},
}


def _composition() -> Settings:
    """Each technique alone, every pair, all four."""
    chosen = [c for n in (1, 2, 4) for c in combinations(ALONE, n)]
    return {" + ".join(c): InferenceConfig(**{k: v for name in c for k, v in ALONE[name].items()}) for c in chosen}


GROUPS: dict[str, Settings] = {
    "positions": _presets("v2pe-4", "v2pe-16", "v2pe-64", "v2pe-256"),
    "tokens": _tokens(),
    "cache": _cache(),
    "composition": _composition(),
    "presets": _presets("balanced", "fast"),
}
