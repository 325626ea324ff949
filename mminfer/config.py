"""The settings of a run: one optional technique per stage, presets, and JSON both ways."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import warnings
from collections.abc import ItemsView, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from mminfer import cache, operators, positions, tokens, tower
from mminfer.errors import ConfigError, UntrainedWarning, shown
from mminfer.models.fingerprint import Fingerprint
from mminfer.operators.skip import OperatorSkip
from mminfer.settings_file import field_from_data, parsed, read_settings
from mminfer.technique import (
    CacheTechnique,
    LayerRange,
    MergeTechnique,
    PositionTechnique,
    PruneTechnique,
    SkipTechnique,
    Stage,
    Technique,
    TechniqueRegistry,
    TowerTechnique,
    check_columns,
    check_declared,
    is_bundled,
)
from mminfer.tokens.merge import AIMMerge
from mminfer.tokens.prune import AIMPrune

if TYPE_CHECKING:
    from mminfer.models.adapter import ModelAdapter
    from mminfer.models.spec import ModelSpec

# A technique registers itself when its module is loaded; whatever lies in a room is found.
for _room in (tower, positions, tokens, operators, cache):
    for _module in pkgutil.iter_modules(_room.__path__, f"{_room.__name__}."):
        importlib.import_module(_module.name)

TECHNIQUES = TechniqueRegistry()


@dataclass(frozen=True)
class InferenceConfig:
    """What is done to a request, stage by stage; None leaves a stage as the host model has it.

    Args:
        positions: rotary positions of visual tokens (`V2PE`), or scaled frequencies (`LinearScaling`, `DynamicNTK`).
        merge: merging of visual tokens before the language model (`AIMMerge`, `RegionMerge`).
        prune: pruning of visual tokens inside it (`AIMPrune`).
        skip: operators that visual tokens skip (`OperatorSkip`).
        cache: compression of the key/value cache (`Replay`, `LookM`, `Digest`).
        tower: what leaves pictures before the vision tower (`PatchDedup`, `FrameDedup`).
        calibrated_on: the only model that takes these settings, where a calibration chose them; None: any.

    Raises:
        ConfigError: a technique stands in another stage's place, or a setting is out of range.
    """

    positions: PositionTechnique | None = None
    merge: MergeTechnique | None = None
    prune: PruneTechnique | None = None
    skip: SkipTechnique | None = None
    cache: CacheTechnique | None = None
    tower: TowerTechnique | None = None
    calibrated_on: Fingerprint | None = field(default=None, compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        for stage in Stage:
            technique = getattr(self, stage.value)
            if technique is not None and (not isinstance(technique, Technique) or technique.stage is not stage):
                raise ConfigError(
                    f"{stage.value}={shown(technique)} is no {stage.value} technique: "
                    f"use {', '.join(n for n, c in TECHNIQUES.items() if c.stage is stage)} or None"
                )
            if technique is not None:
                check_declared(technique)
            if isinstance(technique, CacheTechnique):
                check_columns(technique)

    @property
    def techniques(self) -> tuple[Technique, ...]:
        """The techniques that are on."""
        return tuple(t for stage in Stage if (t := getattr(self, stage.value)) is not None)

    @property
    def removes_rows(self) -> bool:
        """Whether tokens of the prompt may be gone after the last layer."""
        return any(technique is not None for technique in (self.tower, self.merge, self.prune))

    def check(self, spec: ModelSpec) -> None:
        """Raises `ConfigError` if any setting does not fit the model, or was calibrated on another one."""
        if self.calibrated_on is not None:
            self.calibrated_on.check_geometry(spec)
        for technique in self.techniques:
            technique.check(spec)

    def check_calibration(self, adapter: ModelAdapter) -> None:
        """Raises `ConfigError` if these settings were calibrated on another model; for the doors, once each."""
        if self.calibrated_on is not None:
            self.calibrated_on.check(adapter.spec, adapter.model)

    def warn_of_doubts(self, spec: ModelSpec) -> None:
        """Warns of what runs on this model but is likely to ruin its answers; for the doors, once each."""
        for technique in self.techniques:
            doubt = technique.doubt(spec)
            if doubt is not None:
                warnings.warn(doubt, UntrainedWarning, stacklevel=3)

    @classmethod
    def of(cls, *techniques: Technique) -> InferenceConfig:
        """These techniques, each in its own stage.

        Raises:
            ConfigError: two of them work in one stage.

        Example:
            >>> InferenceConfig.of(V2PE(1 / 16), LookM(budget=8192))
        """
        stages: dict[str, Any] = {}
        for technique in techniques:
            if not isinstance(technique, Technique):
                raise ConfigError(
                    f"{shown(technique)} is no technique: pass one such as LookM(), or use from_preset for a "
                    "preset's name"
                )
            name = technique.stage.value
            if name in stages:
                raise ConfigError(
                    f"{shown(stages[name])} and {shown(technique)} both work in {name}: wanted one a stage"
                )
            stages[name] = technique
        return cls(**stages)

    @classmethod
    def from_preset(cls, name: str) -> InferenceConfig:
        """A named setting; layers scale with the model's depth. `PRESETS` lists the names.

        Not all of them hold on a model of yours: `balanced`, `fast` and `digest-*` were chosen on the bundled one,
        others are what papers set. `mminfer.measured.sentence(config)` says how many of its right answers a real model
        kept, as `mminfer generate`, `mminfer doctor` and the table in docs/using.md do: next to none under several.

        Raises:
            ConfigError: there is no preset of this name.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"unknown preset {shown(name)}; presets: {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_file(cls, path: str | PathLike[str], any_model: bool = False) -> InferenceConfig:
        """The settings that `mminfer calibrate` or `to_json` wrote to a file.

        Those of a calibration are for its model alone: an engine, or `patch`, refuses them on any other.

        Args:
            path: of the file.
            any_model: take them on any model that they fit; what they lose there nobody has measured.

        Raises:
            InputError: the file cannot be read.
            ConfigError: it holds no settings.
        """
        check_flag("any_model", any_model)
        found = read_settings(path)
        try:
            config = cls.from_dict(found.config)
        except ConfigError as error:
            raise ConfigError(f"{shown(str(path))}: {error}") from error
        return config if any_model else dataclasses.replace(config, calibrated_on=found.model)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: every stage's technique by class name and fields."""
        return {s.value: _to_data(getattr(self, s.value)) for s in Stage}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> InferenceConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown stage, technique or field.
        """
        stages = {s.value for s in Stage}
        if not isinstance(data, dict) or set(data) - stages:
            raise ConfigError(f"config {shown(data)}: wanted an object with the keys {', '.join(sorted(stages))}")
        techniques: dict[str, Any] = {stage: _from_data(stage, value) for stage, value in data.items()}
        return cls(**techniques)

    @classmethod
    def from_json(cls, text: str) -> InferenceConfig:
        """The inverse of `to_json`.

        Raises:
            ConfigError: it is no JSON of a config, or names a field twice.
        """
        if not isinstance(text, (str, bytes, bytearray)):
            raise ConfigError(
                f"config of type {type(text).__name__}: wanted the string that InferenceConfig.to_json() made"
            )
        return cls.from_dict(parsed(text))


def _to_data(technique: Technique | None) -> dict[str, Any] | None:
    if technique is None:
        return None
    fields = dataclasses.asdict(technique)  # type: ignore[call-overload]
    return {"technique": type(technique).__name__, **fields}


def _from_data(stage: str, data: Any) -> Technique | None:
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ConfigError(f'{stage}={shown(data)}: wanted null, or an object with "technique" and its settings')
    name = data.get("technique")
    if not isinstance(name, str) or name not in TECHNIQUES:
        raise ConfigError(
            f"{stage}: unknown technique {shown(name)}; techniques: {', '.join(TECHNIQUES)}; import the module "
            "of one of your own first, on the command line by --technique-file"
        )
    fields = {
        key: field_from_data(f"{stage}: {key!s:.200}", value) for key, value in data.items() if key != "technique"
    }
    try:
        return TECHNIQUES[name](**fields)
    except TypeError as error:
        raise ConfigError(f"{stage}: {error!s:.400}") from error


class Presets(Mapping[str, InferenceConfig]):
    """Named settings: those that every technique brings, and combinations of several.

    What is there to be beaten comes last. A technique that is defined later brings its presets with it.
    """

    def _all(self) -> dict[str, InferenceConfig]:
        rules, baselines = (_presets_of(_bundled(baseline)) for baseline in (False, True))
        named = {"off": InferenceConfig(), **rules, **_combinations(), **baselines}
        for technique in TECHNIQUES.values():
            if not is_bundled(technique):
                for name, config in _presets_of([technique]).items():
                    if name in named:
                        raise ConfigError(
                            f"{technique.__name__}.presets() names {name!r}, which is a preset already: give it "
                            "another name"
                        )
                    named[name] = config
        return named

    def __getitem__(self, name: str) -> InferenceConfig:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def items(self) -> ItemsView[str, InferenceConfig]:
        """All at once: each look-up of one makes all of them anew."""
        return self._all().items()


PRESETS = Presets()


def _bundled(baseline: bool) -> list[type[Technique]]:
    """The library's techniques of this kind."""
    return [found for found in TECHNIQUES.values() if is_bundled(found) and found.baseline is baseline]


def _presets_of(techniques: Iterable[type[Technique]]) -> dict[str, InferenceConfig]:
    """What techniques bring."""
    named: dict[str, InferenceConfig] = {}
    for technique in techniques:
        if "presets" in vars(technique):
            try:
                named |= {name: InferenceConfig.of(own) for name, own in technique.presets().items()}
            except Exception as error:  # a user's code raises anything
                raise ConfigError(f"{technique.__name__}.presets() failed: {error}") from error
    return named


def _combinations() -> dict[str, InferenceConfig]:
    """Settings of several techniques."""
    aim_prune = AIMPrune.presets()["aim-prune"]
    return {
        "aim": InferenceConfig(merge=AIMMerge.presets()["aim-merge"], prune=aim_prune),
        # Our own, chosen by needle accuracy on the bundled model: the best that a third and a sixth of the FLOPs gave.
        "balanced": InferenceConfig(
            merge=AIMMerge(ratio=1 / 3), prune=aim_prune, skip=OperatorSkip(ffn=LayerRange(start=0.5))
        ),
        "fast": InferenceConfig(
            merge=AIMMerge(ratio=0.25),
            prune=AIMPrune(start=0.5, end=2 / 3),
            skip=OperatorSkip(ffn=LayerRange(start=0.25)),
        ),
    }


def check_flag(name: str, value: Any) -> None:
    """Raises `ConfigError` unless an argument of this name is True or False: words and None mean neither."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={shown(value)}: wanted True or False")


def checked_config(given: Any) -> InferenceConfig:
    """What was given, if it is a config.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(given, InferenceConfig):
        return given
    wanted = "pass InferenceConfig(...), InferenceConfig.of(...) or InferenceConfig.from_preset(...)"
    if isinstance(given, Technique):
        wanted = "pass InferenceConfig.of(...) with it"
    elif isinstance(given, str) and given in PRESETS:
        wanted = f"pass InferenceConfig.from_preset({given!r})"
    raise ConfigError(f"the config is {shown(given)}, no InferenceConfig: {wanted}")
