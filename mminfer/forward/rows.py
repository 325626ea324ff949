"""Packed rows on their way through the host's layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.errors import UnsupportedModelError
from mminfer.forward.branches import ffn_branch
from mminfer.forward.rotary import Tables
from mminfer.layout import RowCounts, TokenLayout
from mminfer.models.adapter import ModelAdapter
from mminfer.technique import CacheEntries


@dataclass(frozen=True)
class Rows:
    """Rows on their way through the layers.

    Args:
        hidden: [T, C].
        layout: of the T rows.
        tables: rotary tables of the T rows.
        rotate: makes such tables: of hidden states [1, T, C] at positions [A, 1, T].
    """

    hidden: Tensor
    layout: TokenLayout
    tables: Tables
    rotate: Callable[[Tensor, Tensor], Tables]

    def select(self, index: Tensor, counts: RowCounts | None = None) -> Rows:
        """The rows in `index` ([K] int64, ascending, best on the CPU); counts: what the host knows of them."""
        return Rows(*keep_rows(index, self.hidden, self.layout, self.tables, counts), self.rotate)


class RowsAttention(Protocol):
    """What a layer's attention must know of the rows that go through it; see `Attend`."""

    adapter: ModelAdapter
    config: InferenceConfig
    layout: TokenLayout
    layer_idx: int
    queries: Tensor | None
    entries: list[CacheEntries]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor: ...


def keep_rows(
    kept: Tensor, hidden: Tensor, layout: TokenLayout, tables: Tables, counts: RowCounts | None = None
) -> tuple[Tensor, TokenLayout, Tables]:
    """Hidden states [T, C], layout and rotary tables of the rows in `kept` ([K] int64, ascending)."""
    there = kept.to(hidden.device, non_blocking=True)
    turned: dict[int, tuple[Tensor, Tensor]] = {}  # kinds of layers may share their tables
    for table in tables.values():
        if id(table[0]) not in turned:
            turned[id(table[0])] = _rows_of_table(table, there)
    narrowed = {kind: turned[id(cos)] for kind, (cos, _) in tables.items()}
    return hidden.index_select(0, there), layout.select(kept, counts), narrowed


class _Stacked(tuple[Tensor, Tensor]):
    """Cos and sin as parts of one tensor, so that one gather takes both."""

    both: Tensor


def _rows_of_table(table: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = table
    if cos.device.type == "cpu":
        return cos.index_select(-2, index), sin.index_select(-2, index)
    both = (table.both if isinstance(table, _Stacked) else torch.stack([cos, sin])).index_select(-2, index)
    stacked = _Stacked(both.unbind())
    stacked.both = both
    return stacked


def through_layer(
    attend: RowsAttention, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], ffn: Tensor | None
) -> Tensor:
    """[1, T, C] behind the host's layer.

    Args:
        attend: the layer's attention.
        hidden: [1, T, C].
        position_embeddings: cos and sin of the T rows.
        ffn: [K] int64, packed rows that go through the layer's FFN; None: all.

    Raises:
        UnsupportedModelError: the layer's attention did not come through `attend`.
    """
    adapter, skip, companions = attend.adapter, attend.config.skip, attend.layout.companions
    layer = adapter.layers[attend.layer_idx]
    restricted = nullcontext() if skip is None else skip.restrict(layer, ffn_branch(layer), attend.queries, ffn)
    with restricted:
        hidden = layer(
            hidden,
            position_embeddings=position_embeddings,
            attention_mask=None,
            use_cache=False,
            attend=attend,
            **adapter.layer_arguments(attend.layout.position[0][None], hidden.device),
        )
    if not attend.entries:
        raise UnsupportedModelError(
            f"{type(layer).__name__} does not hand on the keyword arguments that it is given, by which the pass "
            "reaches its attention"
        )
    if companions is None or attend.layer_idx >= companions.shape[1]:
        return hidden
    return hidden.index_add(1, attend.layout.visual_rows, companions[None, :, attend.layer_idx])
