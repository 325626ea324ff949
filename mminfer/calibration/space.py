"""What may be done to a model: families of settings from mild to strong, and operators of single layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from mminfer.cache.digest import Digest
from mminfer.cache.lookm import LookM
from mminfer.cache.replay import Replay
from mminfer.calibration.costs import ATTENTION, FFN, CostModel, Target
from mminfer.config import InferenceConfig
from mminfer.errors import ConfigError
from mminfer.forward.host_check import check_host
from mminfer.models.adapter import ModelAdapter
from mminfer.models.spec import ModelSpec
from mminfer.operators.skip import OperatorSkip
from mminfer.positions.v2pe import V2PE
from mminfer.technique import PositionTechnique, Stage, Technique
from mminfer.tokens.merge import AIMMerge
from mminfer.tokens.prune import AIMPrune
from mminfer.tokens.regions import RegionMerge

MERGED = (0.75, 0.5, 1 / 3, 0.25, 0.15, 0.1)  # of the visual tokens, what stays
ALIKE = (0.99, 0.97, 0.95, 0.9)
HELD = (0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)  # of the entries
DEPTHS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of the model, where pruning may begin or be through
STEPS = (1 / 4, 1 / 16, 1 / 64)  # of visual tokens
STAGES = {
    Target.FLOPS: (Stage.MERGE, Stage.PRUNE, Stage.SKIP),
    Target.LATENCY: (Stage.MERGE, Stage.PRUNE, Stage.SKIP),
    Target.CACHE: (Stage.MERGE, Stage.PRUNE, Stage.CACHE),
}


@dataclass(frozen=True)
class Family:
    """One rule from mild to strong: where a step loses far too much, so do those behind it.

    Args:
        steps: settings of one stage.
    """

    steps: tuple[Technique, ...]


@dataclass(frozen=True)
class Option:
    """Settings of one stage that were tried alone.

    Args:
        technique: the settings.
        losses: mean loss by each protocol.
        shares: of the visual rows, those that enter each layer.
        held: entries held of every row that enters.
        spent: what the technique itself costs, as a fraction of the uncompressed model's cost.
    """

    technique: Technique
    losses: tuple[float, ...]
    shares: tuple[float, ...]
    held: float = 1.0
    spent: float = 0.0


@dataclass(frozen=True)
class Spared:
    """An operator of one layer that was left out alone.

    Args:
        operator: "ffn" or "attention".
        layer: of which layer.
        losses: mean loss by each protocol.
    """

    operator: str
    layer: int
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    """Some of what was tried, together.

    Args:
        options: one of a stage at most.
        spared: operators that visual tokens skip.
        positions: where tokens stand; None: as they do for the uncompressed model.
    """

    options: Mapping[Stage, Option] = field(default_factory=dict)
    spared: frozenset[Spared] = frozenset()
    positions: PositionTechnique | None = None

    @property
    def changes(self) -> bool:
        """Whether anything is taken."""
        return bool(self.options or self.spared)

    def config(self, off: InferenceConfig) -> InferenceConfig:
        """As settings; off: those that lose nothing."""
        found = {stage.value: option.technique for stage, option in self.options.items()}
        layers = {name: tuple(sorted(s.layer for s in self.spared if s.operator == name)) for name in (FFN, ATTENTION)}
        skip = OperatorSkip(ffn=layers[FFN], attention=layers[ATTENTION]) if self.spared else None
        return replace(off, positions=self.positions or off.positions, skip=skip, **found)  # type: ignore[arg-type]

    def loss(self, protocols: int) -> float:
        """What is lost if losses add up, by the protocol by which it is most."""
        parts = [*(option.losses for option in self.options.values()), *(own.losses for own in self.spared)]
        return max(sum(losses[n] for losses in parts) for n in range(protocols))

    def cost(self, model: CostModel) -> float:
        """As a fraction of the uncompressed model's."""
        shares, kept = [1.0] * model.depth, 1.0
        for option in self.options.values():
            shares = [a * b for a, b in zip(shares, option.shares, strict=True)]
            kept *= option.held
        left_out: list[list[str]] = [[] for _ in range(model.depth)]
        for own in self.spared:
            left_out[own.layer].append(own.operator)
        return model.of(shares, left_out) * kept + sum(option.spent for option in self.options.values())

    def with_option(self, option: Option) -> Choice:
        return replace(self, options={**self.options, option.technique.stage: option})

    def with_spared(self, spared: Spared) -> Choice:
        return replace(self, spared=self.spared | {spared})


def families(spec: ModelSpec, target: Target) -> dict[Stage, list[Family]]:
    """What is tried of every stage that the target has something from; settings that the model refuses are left out."""
    made: dict[Stage, list[Sequence[Technique]]] = {
        Stage.MERGE: [
            [RegionMerge(threshold=alike) for alike in ALIKE],
            [RegionMerge(threshold=None, largest=None, ratio=ratio) for ratio in MERGED],
            [AIMMerge(ratio=ratio) for ratio in MERGED],
        ],
        Stage.PRUNE: list(_pruning(spec.num_layers)),
        Stage.CACHE: [
            [Replay(ratio=ratio) for ratio in HELD],
            [Replay(ratio=ratio, fast=True) for ratio in HELD],
            [LookM(ratio / 2, ratio / 2, merge="average") for ratio in HELD],
            [Digest(ratio=ratio) for ratio in HELD],
        ],
    }
    return {
        stage: [Family(fit) for steps in made[stage] if (fit := tuple(_fitting(steps, spec)))]
        for stage in STAGES[target]
        if stage in made
    }


def visual_steps(spec: ModelSpec, off: InferenceConfig) -> tuple[V2PE, ...]:
    """Steps of visual tokens that a model says it was trained with, but for the one that the user's engine has."""
    if not spec.variable_positions or not isinstance(off.positions, V2PE | None):
        return ()
    return tuple(step for delta in STEPS if (step := V2PE(delta)) != off.positions)


def operators(adapter: ModelAdapter, target: Target) -> list[tuple[str, int]]:
    """Operators of layers that may be left out, from the last layer to the first."""
    if Stage.SKIP not in STAGES[target]:
        return []
    layers, found = tuple(range(adapter.spec.num_layers)), []
    for name in (FFN, ATTENTION):
        try:
            skip = OperatorSkip(**{name: layers})
            skip.check(adapter.spec)
            check_host(adapter, InferenceConfig(skip=skip), verify=False)
        except ConfigError:  # images attend in both directions, or the layers have no such branch
            continue
        found += [(name, layer) for layer in reversed(layers)]
    return found


def _pruning(depth: int) -> Iterator[list[AIMPrune]]:
    """By where tokens begin to leave, with ever earlier ends; and all at once behind one layer, ever earlier."""
    marks = sorted({min(max(round(part * depth), 1), depth) for part in (*DEPTHS, 1.0)})
    for start in marks[:-1]:
        yield [AIMPrune(start=start, end=end) for end in reversed(marks) if end > start + 1]
    at_once = sorted({max(0, mark - 1) for mark in marks} | {max(0, a + (b - a) // 2) for a, b in pairwise(marks)})
    yield [AIMPrune(start=start, end=start + 1) for start in reversed(at_once)]


def _fitting(steps: Sequence[Technique], spec: ModelSpec) -> Iterator[Technique]:
    for technique in steps:
        try:
            technique.check(spec)
        except ConfigError:
            continue
        yield technique
