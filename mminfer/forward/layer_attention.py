"""One layer's attention in the prompt pass, and what has to happen while its queries and keys are at hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from mminfer_kernels import prompt_attention_mass
from mminfer_kernels.prompt_attention import shares_logits
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.errors import InputError
from mminfer.forward.attention import Visibility, causal_attention
from mminfer.forward.kv_layer import CompressedLayer
from mminfer.forward.packed_attention import of_heads, packed_attention
from mminfer.layout import RowCounts, TokenLayout
from mminfer.metrics.flops import causal_pairs
from mminfer.metrics.records import LayerRecord
from mminfer.models.adapter import ModelAdapter
from mminfer.technique import (
    CacheEntries,
    KnownRows,
    LayerView,
    LayerWork,
    checked_entries,
    is_bundled,
    kept_rows,
    mean_length,
)


@dataclass(frozen=True)
class PassSettings:
    """What all layers of a pass share.

    Args:
        adapter: the model.
        config: the techniques.
        prompt_tokens: of each sequence, the tokens that entered the language model in this pass.
        together: whether entries are left as they are for now, to be compressed with those of other layers.
    """

    adapter: ModelAdapter
    config: InferenceConfig
    prompt_tokens: tuple[int, ...]
    together: bool = False
    _blanks: dict[tuple[torch.device, float], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def blank(self, k: Tensor, value: float) -> Tensor:
        """[1, G, N] float32: a column of new entries, whose keys are k.

        On a GPU it is a view of one number for all layers; not for anybody's own technique, which may write into it.
        """
        cache = self.config.cache
        recorded: Any = getattr(cache, "technique", cache)
        ours = cache is not None and is_bundled(type(cache)) and is_bundled(type(recorded))
        if k.device.type == "cpu" or not ours:
            return k.new_full(k.shape[:3], value, dtype=torch.float32)
        number = self._blanks.get((k.device, value))
        if number is None:
            number = self._blanks[k.device, value] = k.new_full((1, 1, 1), value, dtype=torch.float32)
        return number.expand(k.shape[:3])


@dataclass(frozen=True)
class _Attended:
    """What one sequence's attention gave.

    Args:
        out: [1, H, S, D].
        mass: [1, H, N] float32, the attention that each entry received; None where nobody asked.
        mass_flops: what that spent.
        pairs: query-key pairs that were looked at.
    """

    out: Tensor
    mass: Tensor | None
    mass_flops: int
    pairs: int


class LayerAttention:
    """One layer's attention in the prompt pass, and what has to happen while its queries and keys are at hand.

    Args:
        settings: what all layers of the pass share.
        layout: the rows that enter the layer.
        layer_idx: which layer.
        queries: [K] int64, packed rows that issue a query; None: all.
        past: the layer's cache of what came before.

    Attributes:
        entries: what the layer holds of each sequence.
        demands: of each sequence, `CacheTechnique.layer_demand`, where the cache works across layers.
        views: of each sequence, what `CacheTechnique.held` keeps of its view, where layers are compressed together;
            None for one that has no rows.
        kept: packed rows that stay, a tensor for each sequence that was pruned.
    """

    def __init__(
        self,
        settings: PassSettings,
        layout: TokenLayout,
        layer_idx: int,
        queries: Tensor | None,
        past: CompressedLayer | None,
    ) -> None:
        self.settings, self.layout, self.layer_idx = settings, layout, layer_idx
        self.adapter, self.config = settings.adapter, settings.config
        self.queries, self.past = queries, past
        self.entries: list[CacheEntries] = []
        self.demands: list[float | Tensor] = []
        self.views: list[LayerView | None] = []
        self.kept: list[Tensor] = []
        self._work: list[LayerWork] = []
        self._mass_flops: list[int] = []
        prune = self.config.prune
        self._prune = prune if prune is not None and prune.prunes(layer_idx, self.adapter.spec.num_layers) else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast the host rotates in float32 and projects in less
        # Rows before heads in memory, as the host reads it next.
        out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        for sequence, (start, stop) in enumerate(self.layout.spans):
            if start == stop:
                self._pass_over(sequence, k, v)
                continue
            rows = self._query_rows(sequence)
            own_q = q[:, :, start:stop] if rows is None else q[:, :, rows]
            entries = self._new_entries(k[:, :, start:stop], v[:, :, start:stop], start, stop)
            part = self._run_sequence(sequence, self._view(sequence, own_q, rows, entries, scale), window)
            if rows is not None:
                out[:, :, start:stop] = 0
                out[:, :, rows] = part
            elif part.shape == out.shape:
                out = part
            else:
                out[:, :, start:stop] = part
        return out

    def _pass_over(self, sequence: int, k: Tensor, v: Tensor) -> None:
        """A sequence that has no rows in this chunk: a shorter one of the batch, which comes in later."""
        none = self._new_entries(k[:, :, :0], v[:, :, :0], 0, 0)
        held = none if self.past is None else self.past.row(sequence)
        self.entries.append(held)
        self.demands.append(0.0)
        self.views.append(None)
        kept = held.per_head
        self._work.append(LayerWork(self.layer_idx, self.tokens_seen[sequence], 0, 0, kept, 0, kept))
        self._mass_flops.append(0)

    def _query_rows(self, sequence: int) -> Tensor | None:
        if self.queries is None:
            return None
        first, last = (sum(self._numbers_of(self.queries)[:n]) for n in (sequence, sequence + 1))
        return self.queries[first:last]

    def _numbers_of(self, rows: Tensor) -> tuple[int, ...]:
        """How many of these rows ([K] int64, ascending) belong to each sequence; of text rows that is known."""
        if self.layout.num_sequences == 1:
            return (len(rows),)
        if self.layout.known is not None and rows is self.layout.text_rows:
            return self.layout.text_lengths
        return tuple(self.layout.sequence[rows].bincount(minlength=self.layout.num_sequences).tolist())

    def _known(self, sequence: int) -> KnownRows | None:
        """What the host knows of a sequence's rows, where they are on a GPU."""
        known, (start, stop) = self.layout.known, self.layout.spans[sequence]
        if known is None:
            return None
        is_visual = None if known.is_visual is None else known.is_visual[start:stop]
        return KnownRows(known.visual_lengths[sequence], known.ends_visual[sequence], is_visual)

    def counts_left(self) -> RowCounts | None:
        """What the host knows of the rows that stay, where only visual ones may have left; None: nothing."""
        known, lengths = self.layout.known, tuple(map(len, self.kept))
        prune = [self._prune, getattr(self._prune, "technique", self._prune)]  # the other one is recorded by it
        ours = all(own is not None and is_bundled(type(own)) for own in prune)
        if known is None or not ours or len(lengths) < len(known.lengths):
            return None
        gone = [a - b for a, b in zip(known.lengths, lengths, strict=True)]
        visual = tuple(a - b for a, b in zip(known.visual_lengths, gone, strict=True))
        return RowCounts(lengths, visual, known.ends_visual)

    def _view(self, sequence: int, q: Tensor, rows: Tensor | None, entries: CacheEntries, scale: float) -> LayerView:
        """What there is of one sequence before its attention.

        Args:
            sequence: which.
            q: [1, H, S, D], its own.
            rows: [S] int64, packed rows that issue them; None: all of the sequence.
            entries: of this pass.
            scale: factor of the logits.
        """
        start, stop = self.layout.spans[sequence]
        num_past = 0
        if self.past is not None:
            _check_kind(self.past, entries.keys)
            num_past, entries = max(self.past.head_lengths[sequence]), self.past.extended(sequence, entries)
        return LayerView(
            queries=q,
            entries=entries,
            is_visual=self.layout.is_visual[start:stop],
            query_index=None if rows is None else rows - start + num_past,
            scale=scale,
            layer_idx=self.layer_idx,
            num_layers=self.adapter.spec.num_layers,
            prompt_tokens=self.settings.prompt_tokens[sequence],
            tokens_seen=self.tokens_seen[sequence],
            known=self._known(sequence),
        )

    def _run_sequence(self, sequence: int, view: LayerView, window: int | None) -> Tensor:
        """[1, H, S, D]: the attention, and behind it what prunes and compresses."""
        attended = self._attend(sequence, view, window)
        view = replace(view, attention_mass=attended.mass)
        if self._prune is not None:
            kept, start = kept_rows(self._prune, view), self.layout.spans[sequence][0]
            self.kept.append(kept + start if start else kept)
        keys = view.entries.per_head
        if window is not None:  # a later query sees no more, itself included
            view = replace(view, entries=view.entries.last(window - 1))
        self.entries.append(self._compress(view))
        self._work.append(
            LayerWork(
                layer_idx=self.layer_idx,
                seen=view.tokens_seen,
                visual=self.layout.visual_lengths[sequence],
                queries=view.queries.shape[2],
                keys=keys,
                pairs=attended.pairs,
                kept=self.entries[-1].per_head,
                mass_given=attended.mass is not None,
            )
        )
        self._mass_flops.append(attended.mass_flops)
        return attended.out

    def _attend(self, sequence: int, view: LayerView, window: int | None) -> _Attended:
        q, keys, values, places = view.queries, view.keys, view.entries.values, view.query_index
        visible = Visibility(places, window, self._last_visible_key(sequence, view))
        if view.entries.is_packed:
            seen = [_pairs(length, q.shape[2], own) for length, own in of_heads(view.entries.lengths, visible)]
            return _Attended(packed_attention(q, view.entries, view.scale, visible), None, 0, mean_length(seen))
        pairs = _pairs(len(view.entries), q.shape[2], visible)
        if visible.last_key is not None or window is not None or not self._asks_for_mass(view):
            return _Attended(causal_attention(q, keys, values, view.scale, visible), None, 0, pairs)
        out, mass = prompt_attention_mass(q, keys, values, None, view.scale, places)
        shared = shares_logits(q, keys, values)
        return _Attended(out, mass, 2 * q.shape[1] * (1 if shared else q.shape[3] + 1) * pairs, pairs)

    def _new_entries(self, k: Tensor, v: Tensor, start: int, stop: int) -> CacheEntries:
        """The entries of these rows, with the columns that the cache technique asks for."""
        if self.config.cache is None:
            return CacheEntries(k, v)
        heads, layout = k.shape[:3], self.layout
        make = {
            "is_visual": lambda: layout.is_visual[start:stop].expand(heads),
            "score": lambda: self.settings.blank(k, 0.0),
            "size": lambda: self.settings.blank(k, 1.0),
            "source": lambda: layout.source[start:stop].expand(heads),
            "log_mass": lambda: self.settings.blank(k, 0.0),
        }
        return CacheEntries.of({"keys": k, "values": v} | {name: make[name]() for name in self.config.cache.columns})

    def _last_visible_key(self, sequence: int, view: LayerView) -> Tensor | None:
        """[S] int64: the last key that each query of the sequence sees; None: its own."""
        if self.layout.last_visible_row is None:
            return None
        start, stop = self.layout.spans[sequence]
        num_past = max(view.entries.lengths) - (stop - start)
        rows = slice(start, stop) if view.query_index is None else view.query_index - num_past + start
        return self.layout.last_visible_row[rows] - start + num_past

    def _asks_for_mass(self, view: LayerView) -> bool:
        cache = self.config.cache
        return cache is not None and cache.needs_attention_mass(view.tokens_seen, self.layer_idx)

    def _compress(self, view: LayerView) -> CacheEntries:
        cache = self.config.cache
        if cache is None:
            return view.entries
        if self.settings.together:
            self.views.append(cache.held(view))
            return view.entries
        if cache.across_layers:
            self.demands.append(cache.layer_demand(view))
            return view.entries
        return checked_entries(cache, cache.apply(view), view.entries)

    @property
    def tokens_seen(self) -> list[int]:
        """Tokens of each sequence that this layer has taken in, this pass included."""
        past = (0,) * self.layout.num_sequences if self.past is None else self.past.tokens_seen
        return [a + b for a, b in zip(past, self.layout.lengths, strict=True)]

    def note_replay(self, sequence: int, flops: int) -> None:
        """Counts what looking at a sequence's rows once more took in this layer."""
        self._mass_flops[sequence] += flops

    def replace_entries(self, sequence: int, entries: CacheEntries) -> None:
        """What a cache that compresses layers together has left of a sequence's entries."""
        self.entries[sequence] = entries
        self._work[sequence] = replace(self._work[sequence], kept=entries.per_head)

    def record(self, ffn: Tensor | None) -> LayerRecord:
        """What the layer did; ffn: [K] packed rows that went through its FFN, None: all."""
        lengths, spec = self.layout.lengths, self.adapter.spec
        cache, prune, windowed = self.config.cache, self._prune, self.layer_idx in spec.sliding_layers
        return LayerRecord(
            rows=lengths,
            queries=tuple(w.queries for w in self._work),
            keys=tuple(w.seen if windowed else w.keys for w in self._work),
            ffn=lengths if ffn is None else self._numbers_of(ffn),
            pairs=tuple(w.pairs for w in self._work),
            head_entries=tuple(e.lengths for e in self.entries),
            weighed=tuple(0 if e.log_mass is None else e.total for e in self.entries),
            cache_flops=tuple(
                mass + (0 if cache is None else cache.layer_cost(spec, w))
                for w, mass in zip(self._work, self._mass_flops, strict=True)
            ),
            prune_flops=tuple(0 if prune is None else prune.layer_cost(spec, w) for w in self._work),
        )


def _pairs(keys: int, queries: int, visible: Visibility) -> int:
    """Query-key pairs that the attention looks at; see `causal_attention`."""
    places, window, last_key = visible.query_index, visible.window, visible.last_key
    if places is None:
        pairs = causal_pairs(queries, keys - queries, window)
    else:
        pairs = int((places + 1 if window is None else (places + 1).clamp_max(window)).sum())
    if last_key is None:
        return pairs
    own = torch.arange(keys - queries, keys, device=last_key.device) if places is None else places
    return pairs + int((last_key - own).sum())


def _check_kind(held: CompressedLayer, new: Tensor) -> None:
    """Raises `InputError` where a cache holds keys of another dtype, or elsewhere, than the model makes them now."""
    if held.dtype != new.dtype or held.device != new.device:
        raise InputError(
            f"the cache holds keys of {held.dtype} on {held.device}, the model now makes them of {new.dtype} on "
            f"{new.device}: begin anew after to(), half() or autocast, or go on as before"
        )
