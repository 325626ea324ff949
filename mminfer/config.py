"""The settings of a run: one optional technique per stage, presets, and JSON both ways."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mminfer.cache.digest import Digest
from mminfer.cache.h2o import H2O
from mminfer.cache.lookm import LookM
from mminfer.cache.random_evict import RandomEvict
from mminfer.cache.snapkv import SnapKV
from mminfer.errors import ConfigError
from mminfer.operators.skip import OperatorSkip
from mminfer.positions.scaling import DynamicNTK, LinearScaling
from mminfer.positions.v2pe import V2PE
from mminfer.technique import (
    CacheTechnique,
    LayerRange,
    MergeTechnique,
    PositionTechnique,
    PruneTechnique,
    SkipTechnique,
    Stage,
    Technique,
)
from mminfer.tokens.downsample import Downsample
from mminfer.tokens.fastv import FastV
from mminfer.tokens.merge import AIMMerge
from mminfer.tokens.prune import AIMPrune
from mminfer.tokens.random_prune import RandomPrune

if TYPE_CHECKING:
    from mminfer.models.base import ModelSpec

TECHNIQUES: dict[str, type[Technique]] = {
    cls.__name__: cls
    for cls in (
        V2PE, LinearScaling, DynamicNTK, AIMMerge, Downsample, AIMPrune, FastV, RandomPrune, OperatorSkip, LookM,
        Digest, H2O, SnapKV, RandomEvict,
    )
}  # fmt: skip


@dataclass(frozen=True)
class InferenceConfig:
    """What is done to a request, stage by stage; None leaves a stage as the host model has it.

    Args:
        positions: rotary positions of visual tokens (`V2PE`), or scaled frequencies (`LinearScaling`, `DynamicNTK`).
        merge: merging of visual tokens before the language model (`AIMMerge`).
        prune: pruning of visual tokens inside it (`AIMPrune`).
        skip: operators that visual tokens skip (`OperatorSkip`).
        cache: compression of the key/value cache (`LookM`, `Digest`).

    Raises:
        ConfigError: a technique stands in another stage's place, or a setting is out of range.
    """

    positions: PositionTechnique | None = None
    merge: MergeTechnique | None = None
    prune: PruneTechnique | None = None
    skip: SkipTechnique | None = None
    cache: CacheTechnique | None = None

    def __post_init__(self) -> None:
        for stage in Stage:
            technique = getattr(self, stage.value)
            if technique is not None and (not isinstance(technique, Technique) or technique.stage is not stage):
                raise ConfigError(
                    f"{stage.value}={technique!r} is no {stage.value} technique: "
                    f"use {', '.join(n for n, c in TECHNIQUES.items() if c.stage is stage)} or None"
                )

    @property
    def techniques(self) -> tuple[Technique, ...]:
        """The techniques that are on."""
        return tuple(t for stage in Stage if (t := getattr(self, stage.value)) is not None)

    @property
    def removes_rows(self) -> bool:
        """Whether tokens of the prompt may be gone after the last layer."""
        return self.merge is not None or self.prune is not None

    def check(self, spec: ModelSpec) -> None:
        """Raises `ConfigError` if any setting does not fit the model."""
        for technique in self.techniques:
            technique.check(spec)

    @classmethod
    def from_preset(cls, name: str) -> InferenceConfig:
        """A named setting; layers scale with the model's depth. `PRESETS` lists the names.

        Raises:
            ConfigError: there is no preset of this name.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
        return PRESETS[name]

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
            raise ConfigError(f"config {data!r}: wanted an object with the keys {', '.join(sorted(stages))}")
        techniques: dict[str, Any] = {stage: _from_data(stage, value) for stage, value in data.items()}
        return cls(**techniques)

    @classmethod
    def from_json(cls, text: str) -> InferenceConfig:
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"config is not JSON ({error}); write it with InferenceConfig.to_json()") from error


def _to_data(technique: Technique | None) -> dict[str, Any] | None:
    if technique is None:
        return None
    fields = dataclasses.asdict(technique)  # type: ignore[call-overload]
    return {"technique": type(technique).__name__, **fields}


def _from_data(stage: str, data: Any) -> Technique | None:
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ConfigError(f'{stage}={data!r}: wanted null, or an object with "technique" and its settings')
    name = data.get("technique")
    if not isinstance(name, str) or name not in TECHNIQUES:
        raise ConfigError(f"{stage}: unknown technique {name!r}; techniques: {', '.join(TECHNIQUES)}")
    try:
        fields = {key: _field_from_data(value) for key, value in data.items() if key != "technique"}
        return TECHNIQUES[name](**fields)
    except TypeError as error:
        raise ConfigError(f"{stage}: {error}") from error


def _field_from_data(value: Any) -> Any:
    if isinstance(value, dict):
        return LayerRange(**value)
    return tuple(value) if isinstance(value, list) else value


# The paper's 28 layers: pruning from layer 14 to 22 (AIM, section 4.1).
_AIM_PRUNE = AIMPrune(start=14 / 28, end=22 / 28)

PRESETS: dict[str, InferenceConfig] = {
    "off": InferenceConfig(),
    **{f"v2pe-{n}": InferenceConfig(positions=V2PE(delta=1 / n)) for n in (4, 16, 64, 256)},
    "v2pe-auto": InferenceConfig(positions=V2PE(delta="auto")),
    "linear-auto": InferenceConfig(positions=LinearScaling("auto")),
    "ntk-auto": InferenceConfig(positions=DynamicNTK()),
    "aim": InferenceConfig(merge=AIMMerge(ratio=0.25), prune=_AIM_PRUNE),
    "aim-merge": InferenceConfig(merge=AIMMerge(ratio=0.25)),
    "aim-prune": InferenceConfig(prune=_AIM_PRUNE),
    "lookm-20": InferenceConfig(cache=LookM(important_ratio=0.1, recent_ratio=0.1)),
    "lookm-5": InferenceConfig(cache=LookM(important_ratio=0.025, recent_ratio=0.025)),
    # A cache of fixed size, for prompts that are read in chunks; averaged, since every chunk comes before its question.
    "lookm-8k": InferenceConfig(cache=LookM(budget=8192, merge="average")),
    # For chats, streams and cached documents, whose questions come later.
    "digest-50": InferenceConfig(cache=Digest(ratio=0.5)),
    "digest-20": InferenceConfig(cache=Digest(ratio=0.2)),
    "digest-8k": InferenceConfig(cache=Digest(budget=8192)),
    # Every other layer from an eighth of the depth on, the form that arXiv 2410.09454 tries.
    "skip-ffn": InferenceConfig(skip=OperatorSkip(ffn=LayerRange(start=0.125, interval=2))),
    # Our own, chosen by needle accuracy on the bundled model: the best that a third and a sixth of the FLOPs gave.
    "balanced": InferenceConfig(
        merge=AIMMerge(ratio=1 / 3), prune=_AIM_PRUNE, skip=OperatorSkip(ffn=LayerRange(start=0.5))
    ),
    "fast": InferenceConfig(
        merge=AIMMerge(ratio=0.25),
        prune=AIMPrune(start=0.5, end=2 / 3),
        skip=OperatorSkip(ffn=LayerRange(start=0.25)),
    ),
    # What all of the above must beat.
    "downsample": InferenceConfig(merge=Downsample(ratio=0.25)),
    "fastv": InferenceConfig(prune=FastV(layer=2, ratio=0.5)),
    "random-prune": InferenceConfig(prune=RandomPrune()),
    "h2o-20": InferenceConfig(cache=H2O(important_ratio=0.1, recent_ratio=0.1)),
    "snapkv-20": InferenceConfig(cache=SnapKV(important_ratio=0.1, recent_ratio=0.1)),
    "random-20": InferenceConfig(cache=RandomEvict(important_ratio=0.1, recent_ratio=0.1)),
}
