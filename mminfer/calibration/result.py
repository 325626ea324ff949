"""What a calibration found: settings, what is promised of them, and how they came about; as a file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from mminfer.calibration.bounds import WILD, sure_share
from mminfer.chat_files.writing import checked_path, write_whole
from mminfer.config import InferenceConfig
from mminfer.errors import ConfigError, InputError, shown
from mminfer.settings_file import FORMAT, read_settings
from mminfer.technique import is_number


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
        contents: how many different ones the samples have: losses of one content are no independent ones.
        largest: loss of a content.
        spread: of the losses' logarithms; beyond `WILD` the bound holds less often than it says.
    """

    kl: float
    confidence: float
    bound: float
    held_out_kl: float
    held_out: int
    protocols: tuple[str, ...]
    tokens: int
    contents: int = 0
    largest: float = 0.0
    spread: float = 0.0

    def told(self) -> str:
        """In one sentence."""
        held_out = f"{self.held_out_kl:.3g} on {self.held_out} samples that were held out, bound {self.bound:.3g}"
        sure = f"below {self.kl:g} nats with {100 * self.confidence:g} % confidence ({held_out})"
        told = [f"mean KL to the uncompressed model {'' if self.bound <= self.kl else 'not shown to be '}{sure}"]
        if self.contents and self.bound:
            share = f"{100 * sure_share(self.contents, self.confidence):.0f} % of such contents"
            told.append(f"whatever losses are like, {share} lose no more than {self.largest:.3g}")
        if self.spread > WILD:
            told.append(
                f"they spread by a factor of {math.exp(self.spread):.0f}, of which {self.contents} contents say too "
                "little: hold out more to be surer"
            )
        return "; ".join(told)


@dataclass(frozen=True)
class Look:
    """What held-out samples said of settings, from the mildest on, up to the first that they spoke against.

    Args:
        cost: percent of the uncompressed model's, by the model of costs.
        held_out_kl: mean loss.
        bound: what it is below.
    """

    cost: float
    held_out_kl: float
    bound: float


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
        looks: what held-out samples said.
        reference: settings of the uncompressed model: its positions; None: those of the settings.
    """

    config: InferenceConfig
    target: str
    cost: float
    promise: Promise
    curve: tuple[CurvePoint, ...] = ()
    operators: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    looks: tuple[Look, ...] = ()
    reference: InferenceConfig | None = None

    @property
    def off(self) -> InferenceConfig:
        """Settings that lose nothing, which losses are told from."""
        return InferenceConfig(positions=self.config.positions) if self.reference is None else self.reference

    @property
    def saves(self) -> bool:
        """Whether anything could be saved; else the settings change nothing."""
        return any(getattr(self.config, stage) is not None for stage in ("merge", "prune", "skip", "cache"))

    def told(self) -> str:
        """What was found, in a few lines."""
        if not self.saves:
            return f"Nothing can be saved on these samples at KL {self.promise.kl:g}: {self._why_not()}. All is off."
        lines = [f"{self.target}: {self.cost:.1f} % of the uncompressed model's; {self.promise.told()}"]
        return "\n".join([*lines, *(f"- {technique.describe()}" for technique in self.config.techniques)])

    def _why_not(self) -> str:
        near = next((look for look in self.looks if look.held_out_kl <= self.promise.kl < look.bound), None)
        if near is None:
            return f"every setting that was tried loses more, or costs no less {self.target}"
        return (
            f"settings at {near.cost:.0f} % of {self.target} lost {near.held_out_kl:.3g} on held-out samples, of which "
            f"{self.promise.contents} contents are too few to promise less than {near.bound:.3g}: hold out more"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the file has it."""
        model = self.config.calibrated_on
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "model": None if model is None else model.to_dict(),
            "calibration": {
                "target": self.target,
                "settings": _digest(self.config),
                "cost": self.cost,
                "promise": asdict(self.promise),
                "curve": [asdict(point) for point in self.curve],
                "operators": {name: {str(n): x for n, x in own.items()} for name, own in self.operators.items()},
                "facts": dict(self.facts),
                "looks": [asdict(look) for look in self.looks],
                "reference": None if self.reference is None else self.reference.to_dict(),
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
            ConfigError: it holds no calibration, or its settings were changed, of which its promise says nothing.
        """
        found = read_settings(path)
        if found.model is None:
            raise ConfigError(f"{shown(str(path))}: bare settings, no calibration: run mminfer calibrate")
        config, noted = InferenceConfig.from_file(path), found.calibration
        if noted.get("settings", _digest(config)) != _digest(config):
            raise ConfigError(
                f"{shown(str(path))}: its settings were changed since, so that its promise is of others: "
                "calibrate anew, or take the bare settings by InferenceConfig.from_file"
            )
        try:
            promise = Promise(**{**noted["promise"], "protocols": tuple(noted["promise"]["protocols"])})
            operators = {
                name: {int(layer): float(x) for layer, x in own.items()} for name, own in noted["operators"].items()
            }
            curve = tuple(CurvePoint(**point) for point in noted["curve"])
            _check_numbers([noted["cost"], *(own for own in asdict(promise).values() if not isinstance(own, tuple))])
            looks = tuple(Look(**look) for look in noted.get("looks", ()))
            _check_numbers([value for look in looks for value in asdict(look).values()])
            reference = noted.get("reference") and InferenceConfig.from_dict(noted["reference"])
            return cls(
                config, noted["target"], noted["cost"], promise, curve, operators, noted["facts"], looks, reference
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{shown(str(path))}: a damaged calibration ({error!r:.200}): calibrate anew") from error


def _digest(config: InferenceConfig) -> str:
    return hashlib.sha256(config.to_json().encode()).hexdigest()[:16]


def _check_numbers(values: Sequence[Any]) -> None:
    """Raises `ValueError` where one is none, or below 0."""
    for value in values:
        if not is_number(value, above=-1e-9):
            raise ValueError(f"{shown(value)} in place of a number")
