"""The stages of a request, and the interface of the techniques that work in each."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor, nn

from mminfer.layout import TokenLayout
from mminfer.technique import registry
from mminfer.technique.entries import CacheEntries
from mminfer.technique.replayed import ReplayedStretch, ReplayPlan
from mminfer.technique.settings import MOST_COUNT, UNQUOTED, check_full_attention, check_values
from mminfer.technique.views import LayerView, LayerWork

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


class Stage(Enum):
    """Where in the way of a request a technique works; the value is its field in `InferenceConfig`."""

    TOWER = "tower"
    POSITIONS = "positions"
    MERGE = "merge"
    PRUNE = "prune"
    SKIP = "skip"
    CACHE = "cache"


class Technique(ABC):
    """A frozen dataclass whose fields are its settings. It keeps no state, on itself or on the model's modules.

    Defining a class is enough: it is known by its name in configurations, at both doors, in `bench` and `inspect`.
    A subclass that is no technique of its own (a wrapper, say) is defined with `register=False`.
    """

    stage: ClassVar[Stage]
    # Whether it is there to be beaten: such techniques are left out of support tables and drawn as baselines.
    baseline: ClassVar[bool] = False
    # Of stages that look at entries: whether it takes those of heads that differ in length, as caches may leave them.
    by_head: ClassVar[bool] = False

    def __init_subclass__(cls, register: bool = True, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if register:
            registry.register(cls)

    def __new__(cls, *args: object, **settings: object) -> Self:
        """Refuses what no setting of anybody's may be, before the class looks at it.

        Raises:
            ConfigError: a number that is not finite, or too large to be a setting.
        """
        names: list[str] = [x.name for x in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        largest = UNQUOTED if registry.is_bundled(cls) else MOST_COUNT  # the library's own say more of what they want
        check_values(cls.__name__, dict(zip(names, args, strict=False)) | settings, largest)
        return super().__new__(cls)

    @abstractmethod
    def check(self, spec: ModelSpec) -> None:
        """Raises `ConfigError` if these settings do not fit the model."""

    def doubt(self, spec: ModelSpec) -> str | None:
        """What is likely to go wrong with these settings on this model, though they run; None: nothing known."""
        return None

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

    def describe(self) -> str:
        """What the technique does, in one sentence: the first line of its docstring unless it says more."""
        return (inspect.getdoc(type(self)) or type(self).__name__).partition("\n")[0]

    @classmethod
    def presets(cls) -> dict[str, Self]:
        """Settings that have a name of their own, for `InferenceConfig.from_preset`. Subclasses do not inherit them."""
        return {}

    @classmethod
    def variants(cls) -> dict[str, Self]:
        """Settings that a model may take or refuse one by one: the columns of a support table.

        By default these are the class's defaults; a class that has none is left out.
        """
        try:
            return {cls.__name__: cls()}
        except TypeError:  # a setting without a default
            return {}

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        """For each rule the settings at several budgets, by the budget's name: what plots of `bench` are drawn of.

        Subclasses do not inherit them.
        """
        return {}


class PositionTechnique(Technique):
    """Places tokens on the rotary axes, or changes how fast positions turn queries and keys."""

    stage = Stage.POSITIONS
    # What a warning advises when a prompt is longer than `covered_positions`; "": the stage's usual advice.
    long_prompt_advice: ClassVar[str] = ""

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

    def frequency_factors(self, length: float, window: int, head_dim: int) -> Tensor | None:
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

    def covered_positions(self, length: float, window: int) -> float:
        """How many positions the model then holds; arguments as for `frequency_factors`."""
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
    def apply(self, view: LayerView) -> Tensor:
        """Which of the view's R rows stay: [K] int64, ascending."""

    def importance(self, view: LayerView) -> Tensor | None:
        """[N] float32, how important the technique takes each key to be; None: it does not judge.

        Those of the rows of this pass come last, and may be all there are. `mminfer inspect` shades pictures by it.
        """
        return None


class SkipTechnique(Technique):
    """Leaves operators out for some rows."""

    stage = Stage.SKIP

    @abstractmethod
    def apply(self, layout: TokenLayout, layer_idx: int, num_layers: int) -> tuple[Tensor | None, Tensor | None]:
        """Packed rows ([K] int64) that issue a query, and that go through the FFN; None: all of them."""

    @abstractmethod
    def restrict(
        self, layer: nn.Module, ffn_modules: tuple[str, str] | None, queries: Tensor | None, ffn: Tensor | None
    ) -> AbstractContextManager[None]:
        """Within it, the layer computes those rows only.

        Args:
            layer: of the host.
            ffn_modules: names of the first and the last module of its FFN branch; None: nobody has looked for them.
            queries: [K] int64, packed rows that issue a query; None: all.
            ffn: [K] int64, packed rows that go through the FFN; None: all.
        """


class CacheTechnique(Technique):
    """Compresses a layer's keys and values; `cost` takes query-key pairs a sequence.

    Behind each layer by `apply`; or, where it works `across_layers`, on all of them behind the last one, by
    `compress_layers`. Where it works `by_head`, heads may keep different numbers of entries
    (`CacheEntries.select_heads`), and entries may have log-masses; what it is given is then packed from the second pass
    on.
    """

    stage = Stage.CACHE
    across_layers: ClassVar[bool] = False
    # Which columns its entries carry beside keys and values; see `CacheEntries`.
    columns: ClassVar[tuple[str, ...]] = ("is_visual", "score", "size")

    def check(self, spec: ModelSpec) -> None:
        """Refuses models with sliding windows, in which an evicted entry would let the window see farther."""
        check_full_attention(type(self).__name__, spec)

    @abstractmethod
    def apply(self, view: LayerView) -> CacheEntries:
        """What one sequence keeps in one layer: `view.entries.select(places)`, or `.merged(...)` of them."""

    @property
    def together(self) -> bool:
        """Whether a GPU may be given several layers at once, by `apply_layers`: fewer launches, the same entries.

        A class of anybody's that changes what is done in one layer need not know of it: it is asked layer by layer.
        """
        return False

    def held(self, view: LayerView) -> LayerView:
        """What of a view must be held until `apply_layers`; the rest of it is given back."""
        return view

    def apply_layers(self, views: Sequence[LayerView]) -> list[CacheEntries]:
        """`apply` of several layers, or of several sequences, at once; only where it works `together`.

        Args:
            views: as `held` left them, of layers anywhere. Where the technique works across layers, all of one
                sequence's.
        """
        return [self.apply(view) for view in views]

    def needs_attention_mass(self, tokens_seen: int, layer_idx: int) -> bool:
        """Whether `apply` asks for `LayerView.attention_mass`, which the attention gives at little cost.

        Args:
            tokens_seen: tokens the layer has taken in over all passes, this one included.
            layer_idx: which layer.
        """
        return False

    def score(self, view: LayerView) -> Tensor | None:
        """[1, G, N] float32, by which the technique chooses among the entries of this pass; None: by none.

        `mminfer inspect` shades pictures by it.
        """
        return None

    def layer_demand(self, view: LayerView) -> float | Tensor:
        """How much of a shared budget the layer asks for; on a GPU a tensor of that, so that nobody waits for it.

        Only of those that work across layers.
        """
        return 1.0

    def compress_layers(
        self, layers: Sequence[CacheEntries], demands: Sequence[float], tokens_seen: Sequence[int]
    ) -> list[CacheEntries]:
        """What one sequence keeps in all layers. Only of those that work across layers.

        Args:
            layers: all entries of each layer, those of this pass last.
            demands: `layer_demand` of each layer.
            tokens_seen: tokens that each layer has taken in over all passes.
        """
        return list(layers)

    @property
    def replay(self) -> ReplayPlan | None:
        """How rows are looked at once more before `compress_replayed`; None: they are not, and it is never called.

        Only of those that work across layers.
        """
        return None

    def compress_replayed(
        self,
        layers: Sequence[CacheEntries],
        replayed: Sequence[Sequence[ReplayedStretch]],
        tokens_seen: Sequence[int],
    ) -> list[CacheEntries]:
        """What one sequence keeps in all layers, in place of `compress_layers` where there is a `replay`.

        Args:
            layers: all entries of each layer, those of this pass last, in each head.
            replayed: of each layer what the stretches of this pass's entries were asked for.
            tokens_seen: tokens that each layer has taken in over all passes.
        """
        return list(layers)

    def check_prompt(self, layout: TokenLayout, spec: ModelSpec, tokens_seen: Sequence[int]) -> None:
        """Raises `InputError` where a prompt that is to go through the layers does not fit these settings.

        Args:
            layout: of the rows that are to go through, merged ones as one.
            spec: of the model.
            tokens_seen: of each sequence, tokens taken in before.
        """

    def describe_evicted(self) -> str:
        """What becomes of entries that do not stay, as the end of a sentence."""
        return "the rest was dropped"
