"""One layer's attention in the prompt pass, and what has to happen while its queries and keys are at hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from mminfer_kernels import prompt_attention_mass
from mminfer_kernels.prompt_attention import shares_logits
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.forward.attention import causal_attention
from mminfer.forward.kv_layer import CompressedLayer
from mminfer.layout import TokenLayout
from mminfer.metrics.flops import causal_pairs
from mminfer.metrics.records import LayerRecord
from mminfer.models.base import ModelAdapter
from mminfer.technique import CacheEntries, LayerWork


class LayerAttention:
    """One layer's attention in the prompt pass, and what has to happen while its queries and keys are at hand.

    Args:
        adapter: the model.
        config: the techniques.
        layout: the rows that enter the layer.
        layer_idx: which layer.
        origin: per sequence, tokens and visual tokens that entered the language model in this pass.
        queries: [K] int64, packed rows that issue a query; None: all.
        past: the layer's cache of what came before.
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
        self.needs: list[float] = []  # of each sequence, where the cache settles behind the last layer
        self.kept: list[Tensor] = []
        self.work: list[LayerWork] = []
        self.mass_flops: list[int] = []
        prunes = config.prune is not None and config.prune.prunes(layer_idx, adapter.spec.num_layers)
        self.prune = config.prune if prunes else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast the host rotates in float32 and projects in less
        # Rows before heads in memory, as the host reads it next.
        out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        for sequence, (start, stop) in enumerate(self.layout.spans):
            if start == stop:
                self._absent(sequence, k, v)
                continue
            rows = self._query_rows(start, stop)
            q_rows = q[:, :, start:stop] if rows is None else q[:, :, rows]
            part = self._sequence(sequence, q_rows, k[:, :, start:stop], v[:, :, start:stop], rows, scale, window)
            if rows is not None:
                out[:, :, start:stop] = 0
                out[:, :, rows] = part
            elif part.shape == out.shape:
                out = part
            else:
                out[:, :, start:stop] = part
        return out

    def _absent(self, sequence: int, k: Tensor, v: Tensor) -> None:
        """A sequence that has no rows in this chunk: a shorter one of the batch, which comes in later."""
        none = self._new_entries(k[:, :, :0], v[:, :, :0], 0, 0)
        held = none if self.past is None else self.past.row(sequence)
        self.entries.append(held)
        self.needs.append(0.0)
        self.work.append(LayerWork(self.layer_idx, self.seen[sequence], 0, 0, len(held), 0, len(held)))
        self.mass_flops.append(0)

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
        entries = self._new_entries(k, v, start, stop)
        num_past = 0
        if self.past is not None:
            earlier = self.past.row(sequence)
            num_past, entries = len(earlier), earlier.extend(entries)
        places = None if rows is None else rows - start + num_past
        reach = self._reach(start, stop, num_past, rows)
        pairs = _pairs(len(entries), q.shape[2], places, window, reach)
        mass, mass_flops = None, 0
        if reach is None and window is None and self._wants_mass(sequence):
            out, mass = prompt_attention_mass(q, entries.keys, entries.values, None, scale, places)
            shared = shares_logits(q, entries.keys, entries.values)
            mass_flops = 2 * q.shape[1] * (1 if shared else q.shape[3] + 1) * pairs
        else:
            out = causal_attention(q, entries.keys, entries.values, scale, places, window, reach)
        if self.prune is not None:
            depth = self.adapter.spec.num_layers
            kept = self.prune.apply(
                q, entries.keys, is_visual, self.origin[sequence], self.layer_idx, depth, places, scale
            )
            self.kept.append(kept + start)
        keys = len(entries)
        if window is not None:
            entries = entries.last(window - 1)  # a later query sees no more, itself included
        self.entries.append(self._compress(sequence, q, entries, places, scale, mass))
        did = (self.layout.visual_lengths[sequence], q.shape[2], keys, pairs, len(self.entries[-1]), mass is not None)
        self.work.append(LayerWork(self.layer_idx, self.seen[sequence], *did))
        self.mass_flops.append(mass_flops)
        return out

    def _new_entries(self, k: Tensor, v: Tensor, start: int, stop: int) -> CacheEntries:
        if self.config.cache is None:
            return CacheEntries(k, v)
        heads, layout = k.shape[:3], self.layout
        source = layout.source[start:stop].expand(heads) if self.config.cache.traces else None
        is_visual, score = layout.is_visual[start:stop].expand(heads), k.new_zeros(heads, dtype=torch.float32)
        return CacheEntries(k, v, is_visual, score, source)

    def _reach(self, start: int, stop: int, num_past: int, rows: Tensor | None) -> Tensor | None:
        """[S] int64: the last key that each query of the sequence sees; None: its own."""
        if self.layout.reach is None:
            return None
        return self.layout.reach[slice(start, stop) if rows is None else rows] - start + num_past

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
        if self.config.cache.settles:
            self.needs.append(self.config.cache.need(q, entries, places, scale))
            return entries
        return self.config.cache.apply(q, entries, self.seen[sequence], self.layer_idx, places, scale, mass)

    @property
    def seen(self) -> list[int]:
        """Tokens of each sequence that this layer has taken in, this pass included."""
        past = (0,) * self.layout.num_sequences if self.past is None else self.past.tokens_seen
        return [a + b for a, b in zip(past, self.layout.lengths, strict=True)]

    def take(self, sequence: int, entries: CacheEntries) -> None:
        """What a cache that settles has left of a sequence's entries."""
        self.entries[sequence] = entries
        self.work[sequence] = replace(self.work[sequence], kept=len(entries))

    def record(self, ffn: Tensor | None) -> LayerRecord:
        """What the layer did; ffn: [K] packed rows that went through its FFN, None: all."""
        lengths, spec = self.layout.lengths, self.adapter.spec
        cache, prune, windowed = self.config.cache, self.prune, self.layer_idx in spec.sliding_layers
        return LayerRecord(
            rows=lengths,
            queries=tuple(w.queries for w in self.work),
            keys=tuple(w.seen if windowed else w.keys for w in self.work),
            ffn=lengths if ffn is None else tuple(self.layout.sequence[ffn].bincount(minlength=len(lengths)).tolist()),
            pairs=tuple(w.pairs for w in self.work),
            entries=tuple(len(e) for e in self.entries),
            cache_flops=tuple(
                mass + (0 if cache is None else cache.layer_cost(spec, w))
                for w, mass in zip(self.work, self.mass_flops, strict=True)
            ),
            prune_flops=tuple(0 if prune is None else prune.layer_cost(spec, w) for w in self.work),
        )


def _pairs(keys: int, queries: int, places: Tensor | None, window: int | None, reach: Tensor | None) -> int:
    """Query-key pairs that the attention looks at; see `causal_attention`."""
    if places is None:
        pairs = causal_pairs(queries, keys - queries, window)
    else:
        pairs = int((places + 1 if window is None else (places + 1).clamp_max(window)).sum())
    if reach is None:
        return pairs
    own = torch.arange(keys - queries, keys, device=reach.device) if places is None else places
    return pairs + int((reach - own).sum())
