"""The one interface of every technique: settings in, checks before any forward pass, pure work on tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from mminfer.errors import ConfigError
from mminfer.layout import TokenLayout

if TYPE_CHECKING:
    from mminfer.cache.kv_cache import CacheEntries
    from mminfer.models.base import ModelSpec


class Stage(Enum):
    """Where in the way of a request a technique works; the value is its field in `InferenceConfig`."""

    POSITIONS = "positions"
    MERGE = "merge"
    PRUNE = "prune"
    SKIP = "skip"
    CACHE = "cache"


@dataclass(frozen=True)
class LayerWork:
    """What a technique worked on in one layer, one sequence: a cost follows from it.

    Args:
        layer_idx: which layer.
        seen: tokens the layer has taken in over all passes, this one included.
        visual: visual rows of this pass.
        queries: rows that issued a query.
        keys: entries they looked among, in the end with the last queries' own.
        pairs: query-key pairs that the attention looked at.
        kept: entries a head that stayed in the cache.
        mass_given: whether the attention handed over what each entry receives, and its cost is counted with it.
    """

    layer_idx: int
    seen: int
    visual: int
    queries: int
    keys: int
    pairs: int
    kept: int
    mass_given: bool = False


class Technique(ABC):
    """A frozen dataclass whose fields are its settings. It keeps no state, on itself or on the model's modules."""

    stage: ClassVar[Stage]

    @abstractmethod
    def check(self, spec: ModelSpec) -> None:
        """Raises `ConfigError` if these settings do not fit the model."""

    @property
    def needs_whole_prompt(self) -> str | None:
        """The setting that must see the whole prompt, and the way out, for prompts that come in piece by piece."""
        return None

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        """FLOPs that the technique itself spends, once or in one layer; lengths: what its stage works on."""
        return 0

    def layer_cost(self, spec: ModelSpec, work: LayerWork) -> int:
        """`cost` of one sequence in one layer, for stages that work inside layers."""
        return self.cost(spec, [work.pairs])


class PositionTechnique(Technique):
    """Places tokens on the rotary axes, or changes how fast positions turn queries and keys."""

    stage = Stage.POSITIONS
    # What a warning advises when a prompt reaches farther than `covers` says; "": the stage's usual advice.
    wider: ClassVar[str] = ""

    @property
    @abstractmethod
    def fractional(self) -> bool:
        """Whether positions leave the host's integers, so that angles must be formed in float64."""

    @abstractmethod
    def apply(self, layout: TokenLayout, max_positions: int) -> TokenLayout:
        """The layout, which stands at the host's positions, at this technique's.

        Args:
            layout: of the tokens that come in.
            max_positions: how many positions the model was made for.
        """

    def rescale(self, length: float, window: int, head_dim: int) -> Tensor | None:
        """Factors of the rotary frequencies; None: the host's own frequencies.

        Args:
            length: positions that the first pass into the cache reached, the longest sequence's. It is the same in
                every later pass and decoding step of that cache.
            window: how many positions the model was made for.
            head_dim: D.

        Returns:
            [D / 2] float64, or None.
        """
        return None

    def covers(self, length: float, window: int) -> float:
        """How many positions the model then holds; arguments as for `rescale`."""
        return window


class MergeTechnique(Technique):
    """Combines visual tokens before the language model; `cost` takes tokens a unit."""

    stage = Stage.MERGE

    def unit_lengths(self, layout: TokenLayout) -> tuple[int, ...]:
        """Tokens of each unit inside which tokens merge: what `cost` takes."""
        return layout.image_lengths

    @abstractmethod
    def apply(self, inputs_embeds: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        """[T, C] and its layout -> [T', C] and the layout of what is left."""


class PruneTechnique(Technique):
    """Drops visual tokens behind a layer; `cost` takes query-key pairs a sequence."""

    stage = Stage.PRUNE

    @abstractmethod
    def prunes(self, layer_idx: int, num_layers: int) -> bool:
        """Whether tokens may leave behind this layer."""

    @abstractmethod
    def apply(
        self,
        q: Tensor,
        k: Tensor,
        is_visual: Tensor,
        origin: tuple[int, int],
        layer_idx: int,
        num_layers: int,
        query_index: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Which of one sequence's rows stay.

        Args:
            q: [1, H, S, D] rotated queries.
            k: [1, G, N, D] rotated keys; the last of them are the sequence's rows, earlier ones are of earlier turns.
            is_visual: [rows] bool.
            origin: tokens and visual tokens with which the sequence entered the language model.
            layer_idx: the layer just computed.
            num_layers: depth of the model.
            query_index: [S] int64, place of each query among the keys; None: the last S places.
            scale: factor of the logits.

        Returns:
            [K] int64, ascending, among the rows.
        """


class SkipTechnique(Technique):
    """Leaves operators out for some rows."""

    stage = Stage.SKIP

    @abstractmethod
    def apply(self, layout: TokenLayout, layer_idx: int, num_layers: int) -> tuple[Tensor | None, Tensor | None]:
        """Packed rows ([K] int64) that issue a query, and that go through the FFN; None: all of them."""

    @abstractmethod
    def narrow(
        self, layer: nn.Module, ffn_modules: tuple[str, str], queries: Tensor | None, ffn: Tensor | None
    ) -> AbstractContextManager[None]:
        """Within it, the layer computes those rows only."""


class CacheTechnique(Technique):
    """Compresses a layer's keys and values; `cost` takes query-key pairs a sequence.

    Behind each layer by `apply`; or, where it `settles`, all layers together behind the last one.
    """

    stage = Stage.CACHE
    settles: ClassVar[bool] = False

    def need(self, q: Tensor, entries: CacheEntries, query_index: Tensor | None, scale: float) -> float:
        """What `settle` must know of one layer; arguments as for `apply`. Only of those that settle."""
        return 0.0

    def settle(self, layers: Sequence[CacheEntries], needs: Sequence[float], seen: Sequence[int]) -> list[CacheEntries]:
        """What one sequence keeps in all layers. Only of those that settle.

        Args:
            layers: all entries of each layer, those of this pass last.
            needs: of each layer.
            seen: tokens that each layer has taken in over all passes.
        """
        return list(layers)

    # Whether entries carry the rows of the prompt that they came from (`CacheEntries.source`).
    traces: ClassVar[bool] = False

    def wants_mass(self, seen: int, layer_idx: int) -> bool:
        """Whether `apply` asks how much attention each entry receives from all queries.

        It is then handed over, since the attention itself gives it at little cost.

        Args:
            seen: tokens the layer has taken in over all passes, this one included.
            layer_idx: which layer.
        """
        return False

    @abstractmethod
    def apply(
        self,
        q: Tensor,
        entries: CacheEntries,
        seen: int,
        layer_idx: int,
        query_index: Tensor | None,
        scale: float,
        mass: Tensor | None = None,
    ) -> CacheEntries:
        """What one sequence keeps in one layer; all columns of its entries stay side by side.

        Args:
            q: [1, H, S, D] rotated queries of this pass.
            entries: all entries, those of this pass last.
            seen: tokens the layer has taken in over all passes.
            layer_idx: which layer.
            query_index: [S] int64, place of each query among the entries; None: the last S places.
            scale: factor of the logits.
            mass: [1, H, N] float32, the attention each entry receives; None unless `wants_mass`, and there too where
                a layer's attention cannot give it.
        """


@dataclass(frozen=True)
class LayerRange:
    """Layers `start <= i < end` with `i % interval == 0`; a float start or end is a fraction of the depth."""

    start: int | float = 0
    end: int | float = 1.0
    interval: int = 1

    def __post_init__(self) -> None:
        if not is_number(self.start) or not is_number(self.end) or not is_whole(self.interval, least=1):
            raise ConfigError(f"{self}: wanted layers as numbers and a whole interval of 1 or more")

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers' indices."""
        start, end = (layer_index(x, num_layers) for x in (self.start, self.end))
        return tuple(i for i in range(start, end) if i % self.interval == 0)


def is_number(value: Any, *, above: float = -math.inf) -> bool:
    """Whether this is a finite number, no bool, above a bound."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > above


def is_whole(value: Any, *, least: int) -> bool:
    """Whether this is an int, no bool, of at least so much."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def layer_index(layer: int | float, num_layers: int) -> int:
    """A layer given by its index (int) or as a fraction of the depth (float), as an index."""
    return layer if isinstance(layer, int) else round(layer * num_layers)


def check_layer(name: str, layer: Any, num_layers: int, *, last: int | None = None) -> None:
    """Raises `ConfigError` unless the layer lies in 0..last (default: the last layer of the model)."""
    last = num_layers - 1 if last is None else last
    if not is_number(layer) or not 0 <= layer_index(layer, num_layers) <= last:
        raise ConfigError(
            f"{name}={layer!r} does not fit a model of {num_layers} layers: give an index from 0 to {last}, "
            f"or a float from 0.0 to 1.0 as a fraction of the depth"
        )


def check_fraction(name: str, value: Any, *, zero: bool = False) -> None:
    """Raises `ConfigError` unless value is a number in (0, 1], or in [0, 1] with `zero`."""
    if not is_number(value) or not 0 <= value <= 1 or (value == 0 and not zero):
        interval = "[0, 1]" if zero else "(0, 1]"
        raise ConfigError(f"{name}={value!r}: a kept fraction must be a number in {interval}; 1 keeps all")


def check_full_attention(name: str, spec: ModelSpec) -> None:
    """Raises `ConfigError` if some of the model's layers attend within a window."""
    if spec.sliding_layers:
        raise ConfigError(
            f"{name}: {len(spec.sliding_layers)} of {spec.num_layers} layers attend within a sliding window, which "
            "eviction would stretch; leave cache=None for this model"
        )
