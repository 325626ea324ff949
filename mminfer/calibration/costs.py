"""What settings cost before they are run: layers by the rows that enter them, counted, held, or timed here."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import torch

from mminfer.calibration.judging import wait_for
from mminfer.calibration.prompts import Prompt, turn_of
from mminfer.calibration.trials import Trial
from mminfer.engine import Engine
from mminfer.errors import ConfigError
from mminfer.forward.resumed import KeptPass
from mminfer.forward.rows import Rows
from mminfer.metrics.flops import causal_pairs, head_flops, layer_counts
from mminfer.models.spec import ModelSpec
from mminfer.operators.skip import OperatorSkip
from mminfer.technique import SkipTechnique

SHARES = (0.0, 0.25, 0.5, 1.0)  # of a prompt's visual rows, at which a layer is looked at
REPEATS = 9  # timings of each, in turn
FFN, ATTENTION = OPERATORS = ("ffn", "attention")


class Target(StrEnum):
    """What is to become less: work on the prompt, its time on this machine, or what it leaves in the cache."""

    FLOPS = "flops"
    LATENCY = "latency"
    CACHE = "cache"


@dataclass(frozen=True)
class LayerCost:
    """One layer at `SHARES` of the visual rows.

    Args:
        whole: with all its operators.
        spared: by operator, what leaving it out for visual rows saves.
    """

    whole: tuple[float, ...]
    spared: dict[str, tuple[float, ...]]

    def at(self, share: float, left_out: Collection[str]) -> float:
        """Cost where this share of the visual rows enters, and some operators are left out for them."""
        saved = sum(_between(self.spared[name], share) for name in left_out)
        return max(_between(self.whole, share) - saved, 0.0)


@dataclass(frozen=True)
class CostModel:
    """What a prompt costs, as a fraction of what the uncompressed model's does.

    Args:
        layer: any of them.
        depth: how many there are.
        fixed: beside the layers.
    """

    layer: LayerCost
    depth: int
    fixed: float

    def of(self, shares: Sequence[float], left_out: Sequence[Collection[str]]) -> float:
        """Of settings; shares: of visual rows that enter each layer; left_out: operators of each layer."""
        own = sum(self.layer.at(share, names) for share, names in zip(shares, left_out, strict=True))
        return (own + self.fixed) / (self.depth * self.layer.whole[-1] + self.fixed)


def checked_target(name: object) -> Target:
    """Raises `ConfigError` unless it names a target."""
    if not isinstance(name, str) or name not in list(Target):
        raise ConfigError(f"target={name!r}: wanted one of {', '.join(Target)}")
    return Target(name)


def counted(spec: ModelSpec, prompt: Prompt) -> CostModel:
    """By FLOPs; prompt: a usual one."""
    whole: list[float] = []
    spared: dict[str, list[float]] = {name: [] for name in OPERATORS}
    for share in SHARES:
        rows = prompt.text + round(prompt.visual * share)
        pairs = causal_pairs(rows, 0)
        full = layer_counts(spec, rows, rows, rows, pairs).total
        whole.append(full)
        text = prompt.text
        seen = pairs * text // max(rows, 1)
        spared[FFN].append(full - layer_counts(spec, rows, rows, text, pairs).total)
        spared[ATTENTION].append(full - layer_counts(spec, rows, text, rows, seen).total)
    layer = LayerCost(tuple(whole), {name: tuple(own) for name, own in spared.items()})
    return CostModel(layer, spec.num_layers, head_flops(spec, 1))


def held(spec: ModelSpec, prompt: Prompt) -> CostModel:
    """By entries of the cache, which operators that are left out do not change."""
    whole = tuple(prompt.text + prompt.visual * share for share in SHARES)
    return CostModel(LayerCost(whole, dict.fromkeys(OPERATORS, (0.0,) * len(SHARES))), spec.num_layers, 0.0)


def timed_layers(engine: Engine, kept: KeptPass, prompt: Prompt) -> list[float]:
    """Milliseconds of a middle layer: at each share as it is, then without each operator, as a flat list."""
    layer = engine.adapter.spec.num_layers // 2
    jobs: list[tuple[Rows, SkipTechnique | None]] = []
    for share in SHARES:
        rows = _share_of(kept.entering[layer], share)
        jobs += [(rows, None), *((rows, skip) for skip in _skips(layer))]
    taken: list[list[float]] = [[] for _ in jobs]
    with turn_of(engine):
        for repeat in range(REPEATS + 1):
            for own, (rows, skip) in zip(taken, jobs, strict=True):
                wait_for(engine.device)
                start = time.perf_counter()
                kept.through(layer, rows, skip)
                wait_for(engine.device)
                if repeat:
                    own.append(1e3 * (time.perf_counter() - start))
    return [min(own) for own in taken]


def timed(ms: Sequence[float], spec: ModelSpec, prompt_ms: float) -> CostModel:
    """By time; ms: of `timed_layers`; prompt_ms: of the uncompressed model's whole pass."""
    step = 1 + len(OPERATORS)
    whole = _rising(ms[::step])
    spared = {
        name: tuple(max(w - own, 0.0) for w, own in zip(whole, ms[n::step], strict=True))
        for n, name in enumerate(OPERATORS, 1)
    }
    fixed = max(prompt_ms - spec.num_layers * whole[-1], 0.0)
    return CostModel(LayerCost(whole, spared), spec.num_layers, fixed)


def cost_of(trial: Trial, off: Trial, target: Target) -> float:
    """What a trial cost, as a fraction of the uncompressed model's; time is measured by `judging.timed_ratio`."""
    pairs = zip(trial.outcomes[0], off.outcomes[0], strict=False)
    name = "cache_bytes" if target is Target.CACHE else "flops"
    found = [(getattr(own, name), getattr(full, name)) for own, full in pairs]
    return sum(own for own, _ in found) / max(sum(full for _, full in found), 1)


def _share_of(rows: Rows, share: float) -> Rows:
    """All text and a share of the visual rows, evenly spread."""
    visual, text = rows.layout.on_host.visual_rows, rows.layout.on_host.text_rows
    count = round(len(visual) * share)
    chosen = visual[torch.linspace(0, max(len(visual) - 1, 0), count).round().long()]
    return rows.select(torch.cat([text, chosen]).sort().values)


def _skips(layer: int) -> list[OperatorSkip]:
    return [OperatorSkip(ffn=(layer,)), OperatorSkip(attention=(layer,))]


def _rising(values: Sequence[float]) -> tuple[float, ...]:
    """Times of ever more rows, of which noise makes none shorter than the one before."""
    found: list[float] = []
    for value in values:
        found.append(max(value, found[-1] if found else 0.0))
    return tuple(found)


def _between(values: Sequence[float], share: float) -> float:
    """The value at a share, straight between those at `SHARES`."""
    for (x0, y0), (x1, y1) in pairwise(zip(SHARES, values, strict=True)):
        if share <= x1:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return values[-1]
