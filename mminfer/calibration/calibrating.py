"""Calibration: from a loss that is allowed to the cheapest settings that keep it on a user's samples."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import mminfer
from mminfer.bench.plan import origin
from mminfer.bench.protocols import Protocol
from mminfer.calibration.beside import compared
from mminfer.calibration.bounds import spread, upper_bound
from mminfer.calibration.costs import Target, checked_target, cost_of
from mminfer.calibration.progress import Progress
from mminfer.calibration.prompts import PROTOCOLS
from mminfer.calibration.result import Calibration, CurvePoint, Look, Promise
from mminfer.calibration.samples import Split, checked_samples, split
from mminfer.calibration.search import SEARCHING, Search, strip
from mminfer.calibration.sensitivity import Sensing, Sensitivities
from mminfer.calibration.store import Store
from mminfer.calibration.trials import FEWEST, Bench, Trial
from mminfer.chat_files.digests import media_digest, template_digest, tokenizer_digest
from mminfer.config import InferenceConfig, check_flag
from mminfer.engine import Engine
from mminfer.errors import ConfigError, shown
from mminfer.forward.native_build import prepare_kernels
from mminfer.models.fingerprint import Fingerprint, fingerprint_of
from mminfer.technique import is_number, is_whole

READING, CHECKING = "reading", "checking"
WORTH = {Target.FLOPS: 0.99, Target.CACHE: 0.99, Target.LATENCY: 0.97}  # of the cost; beyond nothing is saved
THOROUGH = 4.0  # times longer than single parts, the settings that were found are timed
MOST_TOKENS = 4096


@dataclass(frozen=True)
class Plan:
    """How a calibration is done.

    Args:
        protocols: "in-prompt", "next-turn" or both; the promise is by each of them.
        tokens: of the uncompressed model's answer that is forced, at most; it ends with its turn.
        held_out: fraction of the samples' contents that the choice never sees.
        confidence: of the promise, if losses are no wilder than log-normal.
        seed: of the split.
        state: file that keeps what was measured, so that an interrupted calibration goes on; None: none.
        keep: whether that file stays at the end, for another loss or target of the same samples.

    Raises:
        ConfigError: a field is out of range.
    """

    protocols: tuple[str, ...] = (str(Protocol.IN_PROMPT),)
    tokens: int = 16
    held_out: float = 0.5
    confidence: float = 0.95
    seed: int = 0
    state: str | Path | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        known = [str(protocol) for protocol in PROTOCOLS]
        if isinstance(self.protocols, list):
            object.__setattr__(self, "protocols", tuple(self.protocols))
        if not isinstance(self.protocols, tuple) or not self.protocols or not {*self.protocols} <= {*known}:
            raise ConfigError(f"protocols={shown(self.protocols)}: wanted some of {', '.join(known)}")
        if not is_whole(self.tokens, least=1, most=MOST_TOKENS):
            raise ConfigError(f"tokens={shown(self.tokens)}: wanted a number of tokens, 1 to {MOST_TOKENS}")
        for name, least in (("held_out", 0.0), ("confidence", 0.5)):
            value = getattr(self, name)
            if not is_number(value, above=least) or value >= 1:
                raise ConfigError(f"{name}={shown(value)}: wanted a number above {least:g} and below 1")
        if not is_whole(self.seed, least=0):
            raise ConfigError(f"seed={shown(self.seed)}: wanted a whole number, 0 or more")
        check_flag("keep", self.keep)


def calibrate(
    engine: Engine,
    samples: Sequence[Any],
    kl: float = 0.05,
    target: str = "latency",
    progress: bool = True,
    plan: Plan | None = None,
) -> Calibration:
    """Finds the cheapest settings whose mean KL to the uncompressed model stays below a bound on samples of a user's.

    No labels are needed: the uncompressed model's own answers are forced upon all settings. Some samples are held out:
    the promise is by them, with its confidence. The engine's own settings do not matter, but for its positions, which
    stay. Neither the model nor the engine is changed.

    Args:
        engine: of the model.
        samples: chats, each as for `engine.generate`; four contents or more, eight are better.
        kl: the mean loss that is allowed, in nats.
        target: "latency" (of the prompt, on this machine), "flops" or "cache".
        progress: show a bar with the time left.
        plan: how it is done; None: as `Plan` has it by default.

    Returns:
        The settings and what is promised of them. Where nothing can be saved, they change nothing, and say so.

    Raises:
        InputError: there are too few samples, one is wrong, or the model answers nan.
        ConfigError: `kl` is no positive number, the target or the plan is none.

    Example:
        >>> found = mminfer.calibrate(engine, chats, kl=0.05, target="latency")
        >>> found.save("settings.json")
        >>> fast = mminfer.Engine(engine.model, engine.processor, found.config)
    """
    plan = Plan() if plan is None else plan
    wanted, start = checked_request(kl, target), time.perf_counter()
    _check(engine, progress, plan)
    parts = split(checked_samples(engine, samples), plan.held_out, plan.seed)
    prepare_kernels(engine.device)
    model = fingerprint_of(engine.adapter.spec, engine.model)
    store = Store(plan.state, _identity(engine, parts, plan, model))
    bar = Progress(progress, {READING: len(parts.tuning) + len(parts.held_out)})
    try:
        off = InferenceConfig(positions=engine.config.positions)
        protocols = [Protocol(name) for name in dict.fromkeys(plan.protocols)]
        bench = Bench(engine, off, protocols, plan.tokens, store, bar)
        found = _Calibrating(bench, parts, wanted, float(kl), plan).run()
    finally:
        bar.close()
        store.write()
    if not plan.keep:
        store.remove()
    facts = _facts(engine, parts) | {"seconds": round(time.perf_counter() - start, 1)}
    return replace(found, config=replace(found.config, calibrated_on=model), facts=facts)


class _Calibrating:
    """One calibration.

    Args:
        bench: whom to ask.
        parts: the samples.
        target: what is to become less.
        kl: the mean loss that is allowed.
        plan: how it is done.
    """

    def __init__(self, bench: Bench, parts: Split, target: Target, kl: float, plan: Plan) -> None:
        self._bench, self._split, self._target, self._kl, self._plan = bench, parts, target, kl, plan

    def run(self) -> Calibration:
        bench, bar = self._bench, self._bench.progress
        sensing = Sensing(bench, self._split.tuning, self._target, self._kl)
        everything = [*self._split.tuning, *self._split.held_out]
        prompts = len(bench.protocols)
        for phase, passes in sensing.expected().items():
            bar.begin(phase, passes)
        bar.begin(SEARCHING, 40 * len(self._split.tuning) * prompts)
        bar.begin(CHECKING, 6 * len(self._split.held_out) * prompts)
        bar.begin(READING, len(everything) * prompts)
        bench.refer(everything)
        sensed = sensing.run()
        search = Search(bench, self._split.tuning, sensed, self._kl)
        self._search(search)
        bar.end(SEARCHING)
        trial, looks = self._checked(search, sensing)
        cost = self._cost(trial.config, trial, sensing, THOROUGH)
        promise = promise_of(trial, self._kl, self._plan, bench)
        curve = self._curve(search, sensed) + compared(bench, self._split.tuning, self._target, self._kl)
        curve.sort(key=lambda point: point.cost)
        bar.end(CHECKING)
        return Calibration(
            config=trial.config,
            target=str(self._target),
            cost=100 * cost,
            promise=promise,
            curve=tuple(curve),
            operators=strip(sensed.spared),
            looks=tuple(looks),
            reference=bench.off,
        )

    def _search(self, search: Search) -> None:
        """For settings that just keep the loss, and for those of which so few samples may promise it."""
        contents = len({sample.content for sample in self._split.held_out})
        search.best(self._kl / upper_bound([1.0] * contents, self._plan.confidence, 1.0))
        search.best(self._kl)

    def _checked(self, search: Search, sensing: Sensing) -> tuple[Trial, list[Look]]:
        """Held-out samples under the cheapest settings that they do not speak against, and what they said of others."""
        held_out, confidence = self._split.held_out, self._plan.confidence
        beyond = self._kl * len(held_out) / FEWEST  # of some of them: the mean of all is then beyond what is allowed
        looks, worth = list[Look](), list[tuple[float, Trial]]()
        for found in search.ladder(self._kl):
            trial = self._bench.trial(found.trial.config, held_out, beyond, CHECKING)
            bound = trial.bound(confidence, self._kl)
            if math.isfinite(bound):
                looks.append(Look(100 * found.cost, trial.kl, bound))
            if len(trial.samples) < len(held_out) or bound > self._kl:
                break
            cost = self._cost(trial.config, trial, sensing)
            if cost < WORTH[self._target]:
                worth.append((cost, trial))
        if worth:
            return min(worth, key=lambda pair: pair[0])[1], looks
        return self._bench.trial(self._bench.off, held_out, None, CHECKING), looks

    def _cost(self, config: InferenceConfig, trial: Trial, sensing: Sensing, share: float = 1.0) -> float:
        """Measured, as a fraction of the uncompressed model's; share: as of `judging.timed_ratio`."""
        if config == self._bench.off:
            return 1.0
        if self._target is Target.LATENCY:
            return sensing.time_of(config, share)
        return cost_of(trial, self._bench.trial(self._bench.off, trial.samples, None, CHECKING), self._target)

    def _curve(self, search: Search, sensed: Sensitivities) -> list[CurvePoint]:
        points = [
            CurvePoint(named(found.trial.config), found.trial.kl, 100 * found.cost, "path") for found in search.tried
        ]
        costs = {option.technique: search.alone_cost(option) for option in sensed.options}
        for trial in sensed.trials:
            (technique,) = [t for t in trial.config.techniques if t not in self._bench.off.techniques]
            if technique in costs:
                points.append(CurvePoint(named(trial.config), trial.kl, 100 * costs[technique], "part"))
        return [point for point in points if math.isfinite(point.kl)]


def promise_of(trial: Trial, kl: float, plan: Plan, bench: Bench) -> Promise:
    """What held-out samples let one promise of settings; those that change nothing lose nothing."""
    losses = max(trial.by_content, key=mean)
    changes = trial.config != bench.off
    return Promise(
        kl=kl,
        confidence=plan.confidence,
        bound=trial.bound(plan.confidence, kl) if changes else 0.0,
        held_out_kl=trial.kl,
        held_out=len(trial.samples),
        protocols=tuple(map(str, bench.protocols)),
        tokens=plan.tokens,
        contents=len(losses),
        largest=max(map(max, trial.by_content)),
        spread=max(spread(own, kl) for own in trial.by_content) if changes else 0.0,
    )


def named(config: InferenceConfig) -> str:
    """Settings in words that fit on a line."""
    return " + ".join(type(technique).__name__ for technique in config.techniques) or "off"


def checked_request(kl: Any, target: Any) -> Target:
    """What is asked for, before a model is loaded.

    Raises:
        ConfigError: `kl` is no positive number, or there is no such target.
    """
    if not is_number(kl, above=0) or not math.isfinite(kl):
        raise ConfigError(f"kl={shown(kl)}: wanted a positive number of nats, such as 0.05")
    return checked_target(target)


def _check(engine: Any, progress: Any, plan: Any) -> None:
    if not isinstance(engine, Engine):
        raise ConfigError(f"engine of type {type(engine).__name__}: wanted an mminfer.Engine")
    check_flag("progress", progress)
    if not isinstance(plan, Plan):
        raise ConfigError(f"plan={shown(plan)}: wanted a mminfer.calibration.Plan, or None")


def _identity(engine: Engine, parts: Split, plan: Plan, model: Fingerprint) -> dict[str, Any]:
    """What measured numbers depend on."""
    positions = InferenceConfig(positions=engine.config.positions).to_dict()["positions"]
    return {
        "model": model.to_dict(),
        "samples": parts.digest,
        "tokens": plan.tokens,
        "positions": positions,
        "processor": [digest(engine.processor) for digest in (template_digest, media_digest)],
        "tokenizer": tokenizer_digest(engine.processor.tokenizer),
        "machine": [str(engine.device), str(engine.model.dtype), torch.get_num_threads()],
        "mminfer": mminfer.__version__,
    }


def _facts(engine: Engine, parts: Split) -> dict[str, Any]:
    return {
        "samples": parts.digest,
        "tuning": len(parts.tuning),
        "held_out": len(parts.held_out),
    } | origin(engine)


def recheck(engine: Engine, calibration: Calibration, samples: Sequence[Any]) -> Promise:
    """What other samples say of a promise.

    Args:
        engine: of the model; its own settings do not matter.
        calibration: whose promise it is.
        samples: chats, as for `calibrate`.

    Returns:
        The promise, with the bound and the mean of these samples.

    Raises:
        InputError: there are too few samples, one is wrong, or the model answers nan.
        ConfigError: the calibration is of another model, or its promise is none.
    """
    calibration.config.check(engine.adapter.spec)
    calibration.config.check_calibration(engine.adapter)
    promise = calibration.promise
    plan = Plan(promise.protocols, promise.tokens, confidence=promise.confidence)
    prepare_kernels(engine.device)
    checked = checked_samples(engine, samples)
    bar = Progress(False, {})
    protocols = [Protocol(name) for name in promise.protocols]
    bench = Bench(engine, calibration.off, protocols, promise.tokens, Store(None, {}), bar)
    bench.refer(checked)
    trial = bench.trial(calibration.config, checked)
    return promise_of(trial, promise.kl, plan, bench)
