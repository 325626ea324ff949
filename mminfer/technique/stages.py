"""The one interface of every technique: settings in, checks before any forward pass, pure work on tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from mminfer.layout import TokenLayout
from mminfer.technique.views import CacheEntries, LayerWork

if TYPE_CHECKING:
    from mminfer.models.base import ModelSpec


class Stage(Enum):
    """Where in the way of a request a technique works; the value is its field in `InferenceConfig`."""

    POSITIONS = "positions"
    MERGE = "merge"
    PRUNE = "prune"
    SKIP = "skip"
    CACHE = "cache"


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
