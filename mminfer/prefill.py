"""The prompt pass: one loop over the host's own decoder layers, on packed rows that may leave on the way."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace

import torch
from mminfer_kernels import backend_for, prompt_attention_mass
from torch import Tensor

from mminfer.attention import causal_attention, routed_attention
from mminfer.cache.kv_cache import CacheEntries, CompressedCache, CompressedLayer
from mminfer.config import InferenceConfig
from mminfer.layout import TokenLayout
from mminfer.metrics.flops import causal_pairs
from mminfer.metrics.records import LayerRecord, PromptRecord
from mminfer.models.base import ModelAdapter, ModelSpec


class LayerAttention:
    """One layer's attention in the prompt pass, and what has to happen while its queries and keys are at hand.

    Args:
        adapter: the model.
        config: the techniques.
        layout: the rows that enter the layer.
        layer_idx: which layer.
        origin: per sequence, tokens and visual tokens that entered the language model.
        queries: [K] int64, packed rows that issue a query; None: all.
        past: the layer's cache of earlier turns.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        config: InferenceConfig,
        layout: TokenLayout,
        layer_idx: int,
        origin: tuple[tuple[int, int], ...],
        queries: Tensor | None,
        past: CompressedLayer | None,
    ) -> None:
        self.adapter, self.config, self.layout, self.layer_idx = adapter, config, layout, layer_idx
        self.origin, self.queries, self.past = origin, queries, past
        self.entries: list[CacheEntries] = []
        self.kept: list[Tensor] = []
        self.num_queries: list[int] = []
        self.pairs: list[int] = []
        self.shares_logits = False  # between the attention and the scores of the cache
        prunes = config.prune is not None and config.prune.prunes(layer_idx, adapter.spec.num_layers)
        self.prune = config.prune if prunes else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast the host rotates in float32 and projects in less
        # Rows before heads in memory, as the host reads it next.
        out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        for sequence, (start, stop) in enumerate(self.layout.spans):
            rows = self._query_rows(start, stop)
            q_rows = q[:, :, start:stop] if rows is None else q[:, :, rows]
            part = self._sequence(sequence, q_rows, k[:, :, start:stop], v[:, :, start:stop], rows, scale, window)
            if rows is not None:
                out[:, :, start:stop] = 0
                out[:, :, rows] = part
            elif part.shape == out.shape:
                return part
            else:
                out[:, :, start:stop] = part
        return out

    def _query_rows(self, start: int, stop: int) -> Tensor | None:
        if self.queries is None:
            return None
        return self.queries[(self.queries >= start) & (self.queries < stop)]

    def _sequence(
        self,
        sequence: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Tensor | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        start, stop = self.layout.spans[sequence]
        is_visual = self.layout.is_visual[start:stop]
        entries = self._new_entries(k, v, is_visual)
        num_past = 0
        if self.past is not None:
            earlier = self.past.row(sequence)
            num_past, entries = len(earlier), earlier.extend(entries)
        places = None if rows is None else rows - start + num_past
        reach = self._reach(start, stop, num_past, rows)
        mass = None
        if reach is None and window is None and self._wants_mass(sequence):
            out, mass = prompt_attention_mass(q, entries.keys, entries.values, None, scale, places)
            self.shares_logits = backend_for("prompt_attention_mass", q, entries.keys) == "native"
        else:
            out = causal_attention(q, entries.keys, entries.values, scale, places, window, reach)
        self._count(len(entries), q.shape[2], places, window, reach)
        if self.prune is not None:
            depth = self.adapter.spec.num_layers
            kept = self.prune.apply(
                q, entries.keys, is_visual, self.origin[sequence], self.layer_idx, depth, places, scale
            )
            self.kept.append(kept + start)
        if window is not None:
            entries = entries.last(window - 1)  # a later query sees no more, itself included
        self.entries.append(self._compress(sequence, q, entries, places, scale, mass))
        return out

    def _new_entries(self, k: Tensor, v: Tensor, is_visual: Tensor) -> CacheEntries:
        if self.config.cache is None:
            return CacheEntries(k, v)
        heads = k.shape[:3]
        return CacheEntries(k, v, is_visual.expand(heads), k.new_zeros(heads, dtype=torch.float32))

    def _reach(self, start: int, stop: int, num_past: int, rows: Tensor | None) -> Tensor | None:
        """[S] int64: the last key that each query of the sequence sees; None: its own."""
        if self.layout.reach is None:
            return None
        return self.layout.reach[slice(start, stop) if rows is None else rows] - start + num_past

    def _count(
        self, num_keys: int, num_queries: int, places: Tensor | None, window: int | None, reach: Tensor | None
    ) -> None:
        self.num_queries.append(num_queries)
        if places is None:
            pairs = causal_pairs(num_queries, num_keys - num_queries, window)
        else:
            pairs = int((places + 1 if window is None else (places + 1).clamp_max(window)).sum())
        if reach is not None:
            own = torch.arange(num_keys - num_queries, num_keys, device=reach.device) if places is None else places
            pairs += int((reach - own).sum())
        self.pairs.append(pairs)

    def _wants_mass(self, sequence: int) -> bool:
        return self.config.cache is not None and self.config.cache.wants_mass(self.seen[sequence], self.layer_idx)

    def _compress(
        self,
        sequence: int,
        q: Tensor,
        entries: CacheEntries,
        places: Tensor | None,
        scale: float,
        mass: Tensor | None,
    ) -> CacheEntries:
        if self.config.cache is None:
            return entries
        return self.config.cache.apply(q, entries, self.seen[sequence], self.layer_idx, places, scale, mass)

    @property
    def seen(self) -> list[int]:
        """Tokens of each sequence that this layer has taken in, this pass included."""
        past = (0,) * self.layout.num_sequences if self.past is None else self.past.seen
        return [a + b for a, b in zip(past, self.layout.lengths, strict=True)]

    def record(self, ffn: Tensor | None) -> LayerRecord:
        """What the layer did; ffn: [K] packed rows that went through its FFN, None: all."""
        lengths, spec = self.layout.lengths, self.adapter.spec
        ffn_rows = (
            lengths
            if ffn is None
            else tuple(torch.bincount(self.layout.sequence[ffn], minlength=len(lengths)).tolist())
        )
        overhead = sum(t.cost(spec, self.pairs) for t in (self.config.cache, self.prune) if t is not None)
        if self.shares_logits:
            overhead -= 2 * spec.num_attention_heads * spec.head_dim * sum(self.pairs)
        entries = tuple(len(e) for e in self.entries)
        return LayerRecord(lengths, tuple(self.num_queries), ffn_rows, tuple(self.pairs), entries, overhead)


@torch.no_grad()
def prompt_pass(
    adapter: ModelAdapter,
    config: InferenceConfig,
    inputs_embeds: Tensor,
    layout: TokenLayout,
    cache: CompressedCache,
    columns: int,
) -> tuple[Tensor, TokenLayout, PromptRecord]:
    """Runs a prompt, or the next turn of one, through the language model and fills the cache.

    If anything raises, the cache is as it was.

    Args:
        adapter: the host model.
        config: the techniques.
        inputs_embeds: [T, C], packed.
        layout: of these T rows, at the host's positions.
        cache: empty, or what earlier turns left.
        columns: by how much the host will believe the cache to have grown.

    Returns:
        Hidden states [T', C] of the rows that are left, before the final norm; their layout; the record.
    """
    past = cache.layers if cache.logical_length else None
    if past is not None:
        layout = _after(layout, cache.next_position)
    if config.positions is not None:
        layout = config.positions.apply(layout, adapter.spec.max_position_embeddings)
    next_position = layout.next_position
    earlier = cache.tokens or (0,) * layout.num_sequences
    record = PromptRecord(earlier, layout.lengths, layout.visual_lengths, ahead=_ahead(layout))
    length = cache.rotary_length or float(next_position.max())
    _warn_beyond(adapter.spec, config, next_position, length)
    if config.merge is not None:
        record.merge_flops = config.merge.cost(adapter.spec, config.merge.unit_lengths(layout))
        inputs_embeds, layout = config.merge.apply(inputs_embeds, layout)
    record.merged = layout.lengths
    origin = tuple(zip(layout.lengths, layout.visual_lengths, strict=True))
    hidden = inputs_embeds[None]
    factors = frequency_factors(config, adapter.spec, length)
    tables = adapter.rotary(hidden, layout.position[:, None], fractional(config), factors)
    layers = []
    with routed_attention(adapter.text_config):
        for i in range(adapter.spec.num_layers):
            queries, ffn = (
                (None, None) if config.skip is None else config.skip.apply(layout, i, adapter.spec.num_layers)
            )
            attend = LayerAttention(adapter, config, layout, i, origin, queries, past[i] if past else None)
            hidden = _through_layer(attend, hidden, tables[adapter.layer_kinds[i]], ffn)
            layers.append(CompressedLayer(attend.entries, attend.seen, cache))
            record.layers.append(attend.record(ffn))
            if attend.kept:
                hidden, layout, tables = keep_rows(torch.cat(attend.kept), hidden, layout, tables)
    taken_in = [a + b for a, b in zip(earlier, record.prompt, strict=True)]
    cache.commit(layers, columns, taken_in, next_position, length)
    return hidden[0], layout, record


def keep_rows(
    kept: Tensor, hidden: Tensor, layout: TokenLayout, tables: dict[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, TokenLayout, dict[str, tuple[Tensor, Tensor]]]:
    """Hidden states [1, T, C], layout and rotary tables of the rows in `kept` ([K] int64, ascending)."""
    narrowed = {kind: (cos.index_select(-2, kept), sin.index_select(-2, kept)) for kind, (cos, sin) in tables.items()}
    return hidden.index_select(1, kept), layout.select(kept), narrowed


def _through_layer(
    attend: LayerAttention, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], ffn: Tensor | None
) -> Tensor:
    """[1, T, C] behind the host's layer; ffn: [K] packed rows that go through its FFN, None: all."""
    adapter, skip, companions = attend.adapter, attend.config.skip, attend.layout.companions
    layer = adapter.layers[attend.layer_idx]
    narrow = nullcontext() if skip is None else skip.narrow(layer, adapter.ffn_modules, attend.queries, ffn)
    with narrow:
        hidden = layer(
            hidden, position_embeddings=position_embeddings, attention_mask=None, use_cache=False, attend=attend
        )
    if companions is None or attend.layer_idx >= companions.shape[1]:
        return hidden
    return hidden.index_add(1, attend.layout.visual_rows, companions[None, :, attend.layer_idx])


def _ahead(layout: TokenLayout) -> tuple[int, ...]:
    if layout.reach is None:
        return ()
    ahead = layout.reach - torch.arange(len(layout), device=layout.reach.device)
    return tuple(ahead.new_zeros(layout.num_sequences).index_add(0, layout.sequence, ahead).tolist())


def fractional(config: InferenceConfig) -> bool:
    """Whether rotary positions are no longer the host's integers, so that angles must be formed in float64."""
    return config.positions is not None and bool(config.positions.fractional)


def frequency_factors(config: InferenceConfig, spec: ModelSpec, length: float) -> Tensor | None:
    """[D / 2], of the rotary frequencies of a cache with this `rotary_length`; None: the host's own."""
    if config.positions is None:
        return None
    return config.positions.rescale(length, spec.max_position_embeddings, spec.head_dim)


def _after(layout: TokenLayout, next_position: Tensor) -> TokenLayout:
    """The layout moved so that each sequence's first token stands at its next position."""
    first = layout.position[:, [start for start, _ in layout.spans]].amin(0)
    shift = next_position.to(first.device) - first
    return replace(
        layout, position=layout.position + shift[layout.sequence], next_position=layout.next_position + shift
    )


def _warn_beyond(spec: ModelSpec, config: InferenceConfig, next_position: Tensor, length: float) -> None:
    reached, window = float(next_position.max()), spec.max_position_embeddings
    covered = window if config.positions is None else config.positions.covers(length, window)
    if reached > covered:
        way = "a smaller delta" if fractional(config) else "V2PE, for example positions=V2PE(delta=1/16),"
        wider = config.positions is not None and config.positions.wider
        scaled = "" if covered == window else f" and its frequencies are scaled for {covered:.0f}"
        warnings.warn(
            f"the prompt reaches rotary position {reached:.0f}, but the model was made for {window}{scaled}: answers "
            f"may break down; {wider or f'{way} brings visual tokens closer together'}",
            stacklevel=2,
        )
