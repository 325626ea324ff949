"""The settings that the tables compare, in groups: each technique's sweep of budgets beside its baselines."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from benchmarks.quality.lot import DropByLot
from mminfer import V2PE, AIMMerge, InferenceConfig, LookM, RegionMerge
from mminfer.bench.sweeps import Sweep, cache_sweeps, token_sweeps
from mminfer.cache.digest import Digest
from mminfer.cache.replay import Replay
from mminfer.tokens.downsample import Downsample

Settings = dict[str, InferenceConfig]
OFF = {"off": InferenceConfig()}
PATCHES = 64  # of one of nano's pictures


def _presets(*names: str) -> Settings:
    return {name: InferenceConfig.from_preset(name) for name in names}


def _steps(sweeps: Sequence[Sweep]) -> Settings:
    return {name: config for sweep in sweeps for name, config in sweep.settings.items()}


def _cache() -> Settings:
    """Eviction at equal budgets; images brought down to the same entries before the model, where text leaves room."""
    settings = _steps(cache_sweeps()) | {"LOOK-M weighted 20 %": InferenceConfig(cache=LookM(merge="weighted"))}
    for share, patches in ((50, 27), (20, 5)):
        for name, merge in (("AIM merge", AIMMerge), ("down-sampling", Downsample)):
            settings[f"{name} to {share} %"] = InferenceConfig(merge=merge(patches / PATCHES))
    return settings


ALONE: dict[str, dict[str, Any]] = {
    "V2PE": {"positions": V2PE(1 / 16)},
    "AIM": {"merge": InferenceConfig.from_preset("aim").merge, "prune": InferenceConfig.from_preset("aim").prune},
    "LOOK-M": {"cache": LookM(0.1, 0.1, merge="average")},
    "skip": {"skip": InferenceConfig.from_preset("skip-ffn").skip},
}
DIGEST = {"cache": Digest(0.2)}


def _composition() -> Settings:
    """Each technique alone, every pair, all four; and Digest in the place of LOOK-M."""
    chosen = [c for n in (1, 2, 4) for c in combinations(ALONE, n)]
    named = {" + ".join(c): [ALONE[name] for name in c] for c in chosen}
    digests = {
        name.replace("LOOK-M", "Digest"): [DIGEST if part is ALONE["LOOK-M"] else part for part in parts]
        for name, parts in named.items()
        if "LOOK-M" in name
    }
    every = digests | named
    return {name: InferenceConfig(**{k: v for part in parts for k, v in part.items()}) for name, parts in every.items()}


def _digest() -> Settings:
    """What each part of Digest adds."""
    settings = {}
    for share in (20, 10):
        parts: dict[str, Digest] = {
            "Digest": Digest(share / 100),
            "Digest, layers alike": Digest(share / 100, contrast=0.0),
            "Digest, spread evenly": Digest(share / 100, spread="even"),
            "Digest, others dropped": Digest(share / 100, join=False),
            "Digest, spread evenly, others dropped": Digest(share / 100, spread="even", join=False),
            "Digest, text first": Digest(share / 100, text_share=1.0),
        }
        settings |= {f"{name} {share} %": InferenceConfig(cache=cache) for name, cache in parts.items()}
    return settings


def _replay() -> Settings:
    """What each part of Replay adds, and its budgets beside the other rules'."""
    settings = {
        name: config
        for sweep in cache_sweeps()
        for name, config in sweep.settings.items()
        if sweep.rule.startswith("Replay") or name in BESIDE_REPLAY
    }
    settings |= {
        f"{name} 30 %": InferenceConfig(cache=Replay(fast=bool(name[6:]))) for name in ("Replay", "Replay, fast")
    }
    for share in (20, 10):
        parts: dict[str, Replay] = {
            "Replay": Replay(share / 100),
            "Replay, fast": Replay(share / 100, fast=True),
            "Replay, shares alone": Replay(share / 100, by_output=False),
            "Replay, nothing fitted": Replay(share / 100, fit=0),
            "Replay, every head alike": Replay(share / 100, sure=1.0),
            "Replay, heads sure of nothing": Replay(share / 100, sure=0.0),
            "Replay, text not again": Replay(share / 100, text=False),
            "Replay, like neighbours once": Replay(share / 100, alike=0.99),
        }
        settings |= {f"{name} {share} %": InferenceConfig(cache=cache) for name, cache in parts.items()}
    return settings


def _regions() -> Settings:
    """Regions as they are by themselves, and at shares of a picture's tokens beside what else leaves as many."""
    settings = _presets("regions")
    for share, patches in REGION_SHARES.items():
        ratio = patches / PATCHES
        merges = {
            "regions": RegionMerge(threshold=None, largest=None, ratio=ratio),
            "AIM merge": AIMMerge(ratio),
            "down-sampling": Downsample(ratio),
            "lot": DropByLot(ratio),
        }
        settings |= {f"{name}, {share} %": InferenceConfig(merge=merge) for name, merge in merges.items()}
    return settings


REGION_SHARES = {50: 32, 30: 19, 15: 10, 6: 4}  # percent -> tokens of a picture
BESIDE_REPLAY = ("Digest 20 %", "LOOK-M pivot 20 %", "SnapKV 20 %", "H2O 20 %", "random 20 %")
GROUPS: dict[str, Settings] = {
    "positions": _presets("v2pe-4", "v2pe-16", "v2pe-64", "v2pe-256"),
    "tokens": _steps(token_sweeps()),
    "cache": _cache(),
    "composition": _composition(),
    "digest": _digest(),
    "regions": _regions(),
    "replay": _replay(),
    "presets": _presets("balanced", "fast"),
}
