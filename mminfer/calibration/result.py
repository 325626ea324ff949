"""What a calibration found: settings, what is promised of them, and how they came about; as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from mminfer.chat_files.writing import checked_path, write_whole
from mminfer.config import InferenceConfig
from mminfer.errors import ConfigError, InputError, shown
from mminfer.settings_file import FORMAT, read_settings


@dataclass(frozen=True)
class CurvePoint:
    """Settings that were tried.

    Args:
        name: what they are.
        kl: mean loss on the samples they were chosen by, by the protocol by which it is most.
        cost: percent of the uncompressed model's, of the target.
        kind: "path" for what was put together, "part" for single parts, "preset" or "baseline" for what stands beside.
    """

    name: str
    kl: float
    cost: float
    kind: str


@dataclass(frozen=True)
class Promise:
    """What was promised, and what held-out samples say.

    Args:
        kl: the mean loss that is allowed.
        confidence: with which the bound holds.
        bound: what the mean loss is below, by held-out samples.
        held_out_kl: their mean loss.
        held_out: how many of them.
        protocols: by which context and question met.
        tokens: of an answer at most.
    """

    kl: float
    confidence: float
    bound: float
    held_out_kl: float
    held_out: int
    protocols: tuple[str, ...]
    tokens: int

    def told(self) -> str:
        """In one sentence."""
        sure = f"below {self.bound:.3g} nats with {100 * self.confidence:g} % confidence"
        held_out = f"{self.held_out_kl:.3g} on {self.held_out} samples that were held out"
        return f"mean KL to the uncompressed model {sure} ({held_out}; {self.kl:g} was allowed)"


@dataclass(frozen=True)
class Calibration:
    """Settings for one model, one kind of content and one target.

    Args:
        config: the settings; they know their model.
        target: what became less.
        cost: of the held-out prompts, percent of the uncompressed model's, measured.
        promise: what is promised of them.
        curve: what was tried, the cheapest first.
        operators: of each operator, by layer, what leaving it out alone loses.
        facts: versions, machine, digest of the samples, seconds.
    """

    config: InferenceConfig
    target: str
    cost: float
    promise: Promise
    curve: tuple[CurvePoint, ...] = ()
    operators: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def saves(self) -> bool:
        """Whether anything could be saved; else the settings change nothing."""
        return any(getattr(self.config, stage) is not None for stage in ("merge", "prune", "skip", "cache"))

    def told(self) -> str:
        """What was found, in a few lines."""
        if not self.saves:
            return (
                f"Nothing can be saved on these samples at KL {self.promise.kl:g}: every setting that was tried loses "
                f"more, or costs no less {self.target}. All is off."
            )
        lines = [f"{self.target}: {self.cost:.1f} % of the uncompressed model's; {self.promise.told()}"]
        return "\n".join([*lines, *(f"- {technique.describe()}" for technique in self.config.techniques)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the file has it."""
        model = self.config.calibrated_on
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "model": None if model is None else model.to_dict(),
            "calibration": {
                "target": self.target,
                "cost": self.cost,
                "promise": asdict(self.promise),
                "curve": [asdict(point) for point in self.curve],
                "operators": {name: {str(n): x for n, x in own.items()} for name, own in self.operators.items()},
                "facts": dict(self.facts),
            },
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the file that `InferenceConfig.from_file` and `Calibration.load` read, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        try:
            write_whole(checked_path(path), json.dumps(self.to_dict(), indent=1).encode())
        except OSError as error:
            raise InputError(f"{shown(str(path))}: {error}: wanted a file that can be written") from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """The inverse of `save`.

        Raises:
            InputError: the file cannot be read, or is damaged.
            ConfigError: it holds no calibration.
        """
        found = read_settings(path)
        if found.model is None:
            raise ConfigError(f"{shown(str(path))}: bare settings, no calibration: run mminfer calibrate")
        config, noted = InferenceConfig.from_file(path), found.calibration
        try:
            promise = Promise(**{**noted["promise"], "protocols": tuple(noted["promise"]["protocols"])})
            operators = {
                name: {int(layer): float(x) for layer, x in own.items()} for name, own in noted["operators"].items()
            }
            curve = tuple(CurvePoint(**point) for point in noted["curve"])
            return cls(config, noted["target"], noted["cost"], promise, curve, operators, noted["facts"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{shown(str(path))}: a damaged calibration ({error!r:.200}): calibrate anew") from error
