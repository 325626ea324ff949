"""Techniques that write down what they did: each hands its work to the real one and notes what it saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mminfer.config import InferenceConfig
from mminfer.layout import TokenLayout
from mminfer.technique import (
    CacheEntries,
    CacheTechnique,
    CellGrid,
    LayerView,
    LayerWork,
    MergeTechnique,
    PositionTechnique,
    PruneTechnique,
    SkipTechnique,
    Technique,
    TowerTechnique,
    checked_entries,
    compressed_layers,
    kept_rows,
)

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


@dataclass
class PassRecord:
    """What happened to the rows of one prompt pass: one chat, all at once. Rows are named by `TokenLayout.source`.

    Attributes:
        host: the layout as the model's adapter made it.
        placed: the same tokens behind the position technique.
        merged_into: [T] int64, the row of the token that each became part of; its own where it stays.
        unencoded: [T] bool, tokens whose patches never went through the vision tower; None: there are none.
        rows: for each layer the rows that entered it, [K] int64.
        skipped: for each layer whether visual rows issue no query, and whether they leave the FFN out.
        left: by layer, the rows that left behind it, [K] int64.
        held: by layer, the rows whose entries each head kept, [G, S] int64; empty without a cache technique.
        importance: [T] float32 of the first layer that prunes; nan where the token was not there.
        scores: one [T] float32 a layer that a cache technique scored: attention received, nan likewise.
    """

    host: TokenLayout | None = None
    placed: TokenLayout | None = None
    merged_into: Tensor | None = None
    unencoded: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)
    skipped: list[tuple[bool, bool]] = field(default_factory=list)
    left: dict[int, Tensor] = field(default_factory=dict)
    held: dict[int, Tensor] = field(default_factory=dict)
    importance: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)

    def see(self, layout: TokenLayout) -> None:
        """Notes the layout if it is the first one."""
        if self.host is None:
            self.host = self.placed = layout

    def join(self, owner: Tensor, source: Tensor) -> None:
        """Notes which rows became part of which.

        Args:
            owner: [K] int64, counted in the layout that is merged: the row that each becomes part of.
            source: [K] int64, the rows of that layout as they came in.
        """
        if self.merged_into is None:
            count = len(self.host) if self.host is not None else len(source)
            self.merged_into = torch.arange(count, device=source.device)
        into = torch.arange(len(self.merged_into), device=source.device)
        into[source] = source[owner.to(source.device)]
        self.merged_into = into[self.merged_into.to(source.device)]

    def scatter(self, values: Tensor, rows: Tensor) -> Tensor:
        """[T] float32: values ([K]) at their rows ([K] int64), nan elsewhere."""
        count = len(self.host) if self.host is not None else int(rows.max()) + 1
        return values.new_full((count,), torch.nan, dtype=torch.float32).index_copy(0, rows, values.float())


def recording(config: InferenceConfig) -> tuple[InferenceConfig, PassRecord]:
    """The same techniques, and the record that they will write in the next prompt pass. For one pass only."""
    record = PassRecord()
    wrappers: dict[str, type[_Recorded]] = {
        "tower": RecordedTower,
        "positions": RecordedPositions,
        "merge": RecordedMerge,
        "prune": RecordedPrune,
        "cache": RecordedCache,
    }
    on = {stage: getattr(config, stage) for stage in wrappers if getattr(config, stage) is not None}
    wrapped: dict[str, Any] = {stage: wrappers[stage](technique, record) for stage, technique in on.items()}
    return InferenceConfig(**wrapped, skip=RecordedSkip(config.skip, record)), record


@dataclass(frozen=True, eq=False)
class _Recorded(Technique, register=False):
    """Hands everything on.

    Args:
        technique: does the work.
        record: what is written.
    """

    technique: Any
    record: PassRecord

    def __repr__(self) -> str:
        return repr(self.technique)  # whoever found the technique fit for a model found this so

    def check(self, spec: ModelSpec) -> None:
        self.technique.check(spec)

    @property
    def needs_whole_prompt(self) -> str | None:
        return f"the inspection of {type(self.technique).__name__}"

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        cost: int = self.technique.cost(spec, lengths)
        return cost

    def layer_cost(self, spec: ModelSpec, work: LayerWork) -> int:
        cost: int = self.technique.layer_cost(spec, work)
        return cost


class RecordedTower(_Recorded, TowerTechnique, register=False):
    """Notes which tokens others stand for."""

    def apply(self, cells: Tensor, grid: CellGrid) -> Tensor:
        owner: Tensor = self.technique.apply(cells, grid)
        return owner

    def leave(self, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        self.record.see(layout)
        if layout.stand_in is not None:
            self.record.join(layout.stand_in, layout.on_host.source)
            self.record.unencoded = layout.stand_in != torch.arange(len(layout))
        kept, left = self.technique.leave(layout)
        return kept, left


class RecordedPositions(_Recorded, PositionTechnique, register=False):
    """Notes the layout before and after."""

    @property
    def fractional(self) -> bool:
        return bool(self.technique.fractional)

    @property
    def long_prompt_advice(self) -> str:  # type: ignore[override]
        return str(self.technique.long_prompt_advice)

    def apply(self, layout: TokenLayout, max_positions: int) -> TokenLayout:
        self.record.see(layout)
        placed: TokenLayout = self.technique.apply(layout, max_positions)
        self.record.placed = placed
        return placed

    def frequency_factors(self, length: float, window: int, head_dim: int) -> Tensor | None:
        factors: Tensor | None = self.technique.frequency_factors(length, window, head_dim)
        return factors

    def covered_positions(self, length: float, window: int) -> float:
        return float(self.technique.covered_positions(length, window))


class RecordedMerge(_Recorded, MergeTechnique, register=False):
    """Notes which token each became part of."""

    def unit_lengths(self, layout: TokenLayout) -> tuple[int, ...]:
        lengths: tuple[int, ...] = self.technique.unit_lengths(layout)
        return lengths

    def apply(self, inputs_embeds: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        self.record.see(layout)
        watched = _WatchedLayout(**_columns(layout), record=self.record)
        out, merged = self.technique.apply(inputs_embeds, watched)
        return out, TokenLayout(**_columns(merged))


class RecordedPrune(_Recorded, PruneTechnique, register=False):
    """Notes who leaves, and what the first layer that prunes thought of everybody."""

    @property
    def by_head(self) -> bool:  # type: ignore[override]
        return bool(self.technique.by_head)

    def prunes(self, layer_idx: int, num_layers: int) -> bool:
        return bool(self.technique.prunes(layer_idx, num_layers))

    def apply(self, view: LayerView) -> Tensor:
        kept = kept_rows(self.technique, view)
        rows = self.record.rows[view.layer_idx]
        leaves = torch.ones_like(rows, dtype=torch.bool)
        leaves[kept] = False
        self.record.left[view.layer_idx] = rows[leaves]
        if self.record.importance is None:
            importance = self.technique.importance(view)
            if importance is not None:
                self.record.importance = self.record.scatter(importance[-len(rows) :], rows)
        return kept


class RecordedSkip(_Recorded, SkipTechnique, register=False):
    """Notes which rows enter each layer; it stands in the configuration even where nothing is skipped."""

    technique: SkipTechnique | None

    def check(self, spec: ModelSpec) -> None:
        if self.technique is not None:
            self.technique.check(spec)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        return 0 if self.technique is None else self.technique.cost(spec, lengths)

    def layer_cost(self, spec: ModelSpec, work: LayerWork) -> int:
        return 0 if self.technique is None else self.technique.layer_cost(spec, work)

    def apply(self, layout: TokenLayout, layer_idx: int, num_layers: int) -> tuple[Tensor | None, Tensor | None]:
        self.record.see(layout)
        self.record.rows.append(layout.source)
        queries, ffn = (None, None) if self.technique is None else self.technique.apply(layout, layer_idx, num_layers)
        self.record.skipped.append((queries is not None, ffn is not None))
        return queries, ffn

    @contextmanager
    def restrict(
        self, layer: nn.Module, ffn_modules: tuple[str, str] | None, queries: Tensor | None, ffn: Tensor | None
    ) -> Iterator[None]:
        if self.technique is None:
            yield
            return
        with self.technique.restrict(layer, ffn_modules, queries, ffn):
            yield


class RecordedCache(_Recorded, CacheTechnique, register=False):
    """Notes which entries each head keeps, and by what the technique chose among them."""

    @property
    def across_layers(self) -> bool:  # type: ignore[override]
        return bool(self.technique.across_layers)

    @property
    def by_head(self) -> bool:  # type: ignore[override]
        return bool(self.technique.by_head)

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """The technique's, and the rows that entries came from."""
        return tuple(dict.fromkeys([*self.technique.columns, "source"]))

    def needs_attention_mass(self, tokens_seen: int, layer_idx: int) -> bool:
        return bool(self.technique.needs_attention_mass(tokens_seen, layer_idx))

    def layer_demand(self, view: LayerView) -> float:
        self._note_score(view)
        return float(self.technique.layer_demand(view))

    def compress_layers(
        self, layers: Sequence[CacheEntries], demands: Sequence[float], tokens_seen: Sequence[int]
    ) -> list[CacheEntries]:
        out = compressed_layers(self.technique, layers, demands, tokens_seen)
        for layer_idx, entries in enumerate(out):
            self._note_held(layer_idx, entries)
        return out

    def apply(self, view: LayerView) -> CacheEntries:
        out = checked_entries(self.technique, self.technique.apply(view), view.entries)
        self._note_held(view.layer_idx, out)
        self._note_score(view)
        return out

    def _note_held(self, layer_idx: int, entries: CacheEntries) -> None:
        if entries.source is None:
            raise ValueError("entries without their source")
        self.record.held[layer_idx] = entries.source[0]

    def _note_score(self, view: LayerView) -> None:
        score = self.technique.score(view)
        if score is not None and view.entries.source is not None:
            self.record.scores.append(self.record.scatter(score[0].sum(0), view.entries.source[0, 0]))


@dataclass(frozen=True, eq=False)
class _WatchedLayout(TokenLayout):
    """A layout that writes down what is merged in it."""

    record: PassRecord | None = None

    def merge(self, index: Tensor, size: Tensor, owner: Tensor) -> TokenLayout:
        if self.record is not None:
            self.record.join(owner, self.source)
        return super().merge(index, size, owner)


def _columns(layout: TokenLayout) -> dict[str, Any]:
    """The fields of a layout, without what was added for watching."""
    return {f.name: getattr(layout, f.name) for f in fields(TokenLayout)}
