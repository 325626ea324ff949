"""What stands beside a calibration: presets that nobody calibrated, and baselines, on the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mminfer.calibration.costs import Target, cost_of
from mminfer.calibration.judging import timed_ratio
from mminfer.calibration.result import CurvePoint
from mminfer.calibration.samples import Sample
from mminfer.calibration.sensitivity import FAR
from mminfer.calibration.space import STAGES
from mminfer.calibration.trials import Bench
from mminfer.config import PRESETS, InferenceConfig
from mminfer.errors import ConfigError
from mminfer.models.spec import ModelSpec

COMPARING = "looking at presets"


def compared(bench: Bench, samples: Sequence[Sample], target: Target, kl: float) -> list[CurvePoint]:
    """Every preset that could have saved some of the target, the uncompressed model's positions left as they are."""
    found, presets = [], rival_presets(bench.engine.adapter.spec, target)
    bench.progress.begin(COMPARING, len(presets) * 2 * len(bench.protocols))
    for name, preset in presets.items():
        config = replace(preset, positions=bench.off.positions)
        trial = bench.trial(config, samples, FAR * kl, COMPARING)
        if math.isfinite(trial.kl):
            kind = "baseline" if any(technique.baseline for technique in config.techniques) else "preset"
            found.append(CurvePoint(name, trial.kl, 100 * _cost(bench, config, samples, target), kind))
    bench.progress.end(COMPARING)
    return found


def rival_presets(spec: ModelSpec, target: Target) -> dict[str, InferenceConfig]:
    """Presets of the stages that a target gains by, and of no others, which this model takes."""
    stages, found = {stage.value for stage in STAGES[target]}, {}
    for name, config in PRESETS.items():
        on = {technique.stage.value for technique in config.techniques}
        if not on or not on <= stages or any(getattr(t, "budget", None) for t in config.techniques):
            continue
        try:
            config.check(spec)
        except ConfigError:
            continue
        found[name] = config
    return found


def _cost(bench: Bench, config: InferenceConfig, samples: Sequence[Sample], target: Target) -> float:
    if target is not Target.LATENCY:
        trial = bench.trial(config, samples[:1], None, COMPARING)
        return cost_of(trial, bench.trial(bench.off, samples[:1], None, COMPARING), target)
    prompt = bench.known(samples[0])[0]

    def time_it() -> list[float]:
        return [timed_ratio(bench.engine, config, bench.off, prompt, 1.0)]

    return bench.store.numbers(f"preset {config.to_json()}", time_it)[0]
