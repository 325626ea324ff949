"""Rows looked at once more behind the entries that they made: which of these does anything ask for?

A context says by itself what of it is worth keeping: what its own rows look at when they come by a second time is what
a later question can look at (KVzip, arXiv 2505.23416). Their second keys and values are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from mminfer_kernels import prompt_attention_peak, replay_attention
from mminfer_kernels.prompt_attention import shares_logits
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from mminfer.config import InferenceConfig
from mminfer.forward.branches import ffn_branch
from mminfer.forward.layer_attention import LayerAttention
from mminfer.forward.replayed_rows import ReplayedRows, Stretch, Together
from mminfer.forward.rotary import Tables
from mminfer.forward.rows import Rows, through_layer
from mminfer.forward.written import OutputWeights, Segments, output_weights, sampled, written_together
from mminfer.layout import TokenLayout
from mminfer.metrics.flops import causal_pairs, layer_flops
from mminfer.technique import NOTHING, CacheEntries, EarlierEntries, ReplayedStretch, only_rows


class ReplayAttention:
    """One layer's attention of rows that go by again: behind the layer's entries, and what each of these is given.

    It takes the place of `LayerAttention` in `through_layer`.

    Args:
        replay: the rows.
        attended: the layer's attention of the first time, which holds the entries.
        queries: [K] int64, the rows that the layer lets issue a query; the others look as well, and read nothing.
            None: all.

    Attributes:
        found: of each sequence what its stretches were asked for.
        flops: of each sequence, what looking took.
    """

    def __init__(self, replay: ReplayedRows, attended: LayerAttention, queries: Tensor | None) -> None:
        self._replay, self._attended = replay, attended
        self.adapter, self.config, self.layer_idx = attended.adapter, attended.config, attended.layer_idx
        self.layout, self._asking = replay.layout, queries
        self.queries: Tensor | None = None  # all rows look
        self.entries = attended.entries
        known = attended.layout.host
        self._source = (attended.layout if known is None else known).source.cpu()
        self.found: list[list[ReplayedStretch]] = [[] for _ in attended.entries]
        self.flops = [0] * len(attended.entries)
        self._read: list[list[tuple[Tensor, Tensor]]] = [[] for _ in attended.entries]
        self._together: dict[int, tuple[Together, Tensor, Tensor]] = {}  # by sequence, what was read there
        self._segments: list[tuple[int, int, Segments]] = []  # by sequence and stretch
        self._new: tuple[int, CacheEntries] | None = None  # of which sequence, while stretches of it look

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        k, v = k.to(q.dtype), v.to(q.dtype)
        read = [part for b in range(len(self.found)) for part in self._sequence(b, q, k, v, scale)]
        rows = [part.transpose(1, 2) for part in read]
        out = (rows[0] if len(rows) == 1 else torch.cat(rows, 1)).transpose(1, 2)  # as the host reads it next
        self._new = None
        if self._asking is None:
            return out
        silent = torch.ones(out.shape[2], dtype=torch.bool, device=out.device)
        silent[self._asking] = False
        return out.masked_fill_(silent[None, None, :, None], 0)

    def _sequence(self, b: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[Tensor]:
        """What the rows of one sequence read, [1, H, n, D] of each part of them.

        On a GPU all of them look in one call, where nothing came before this pass.
        """
        entries, (start, stop) = self._attended.entries[b], self._attended.layout.spans[b]
        if q.device.type != "cpu" and not entries.is_packed and len(entries) == stop - start:
            together = self._replay.together(self._attended.layout)[b]
            return [] if together is None else [self._look_together(b, together, q, k, v, scale)]
        own = [stretch for stretch in self._replay.stretches if stretch.sequence == b]
        return [part for stretch in own for part in self._look(stretch, q, k, v, scale)]

    def _look_together(self, b: int, own: Together, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """What the rows of all stretches of a sequence read, [1, H, n, D]."""
        entries = self._attended.entries[b]
        q, k, v = (x[:, :, own.rows] for x in (q, k, v))
        out, peaks = replay_attention(q, k, v, entries.keys, entries.values, own.groups, own.seen, own.longest, scale)
        references = _of_references(q[0], own.references)
        sink = EarlierEntries(entries.keys[0, :, :1], entries.values[0, :, :1], None)
        stretches = [x for x in self._replay.stretches if x.sequence == b]
        queries = references.split([x.references.shape[1] for x in stretches], 1)
        for (first, last), stretch, asked in zip(own.edges, stretches, queries, strict=True):
            counted = last - first + (first > 0)
            self.flops[b] += sum(_flops_of(q, len(x), counted, counted) for x in stretch.groups)
            earlier = sink if first else None
            self.found[b].append(ReplayedStretch(first, peaks[0, :, first:last], asked, earlier, scale))
        if self._replay.outputs:
            self._together[b] = own, entries.values[0], out.transpose(1, 2)[0].flatten(1).index_select(0, own.sample)
        return out

    def _look(self, stretch: Stretch, q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[Tensor]:
        """What one stretch's rows read, [1, H, n, D] of each of its groups."""
        first, held, earlier = self._entries(stretch)
        ahead = 0 if earlier is None else earlier.keys.shape[1]
        counted, longest = ahead + len(held), max(map(len, stretch.groups))
        shape = (2, *held.keys.shape[:2], counted + longest, held.keys.shape[3])
        keys_values = self._replay.scratch(shape, held.keys)
        keys_values[0, :, :, ahead:counted], keys_values[1, :, :, ahead:counted] = held.keys, held.values
        if earlier is not None:
            keys_values[0, 0, :, :ahead], keys_values[1, 0, :, :ahead] = earlier.keys, earlier.values
        log_mass = None
        if earlier is not None and earlier.log_mass is not None:
            log_mass = pad(earlier.log_mass, (0, counted + longest - ahead))[None]
        out, peaks = [], None
        for group in stretch.groups:
            stop = counted + len(group)
            for place, own in zip(keys_values, (k, v), strict=True):
                place[:, :, counted:stop] = own[:, :, group.place]
            keys, values, asked = keys_values[0, :, :, :stop], keys_values[1, :, :, :stop], q[:, :, group.place]
            mass = None if log_mass is None else log_mass[:, :, :stop]
            read, peak = prompt_attention_peak(asked, keys, values, scale, None, counted, mass)
            out.append(read)
            peaks = peak[0].float() if peaks is None else peaks.maximum(peak[0].float())
            again = 0 if shares_logits(asked, keys, values) else counted
            self.flops[stretch.sequence] += _flops_of(q, len(group), counted, again)
        if self._replay.outputs:
            self._read[stretch.sequence].append((held.values[0], sampled(out)))
        if peaks is None:
            raise ValueError("a stretch without rows that look at it")
        self.found[stretch.sequence].append(
            ReplayedStretch(first, peaks[:, ahead:], _of_references(q[0], stretch.references), earlier, scale)
        )
        return out

    def weigh(self) -> None:
        """Adds to what was found what the entries write, once the layer is through: until then it may skip rows."""
        adapter = self.adapter
        values_of = [own[0][0] for own in self._read if own] + [x[1] for x in self._together.values()]
        if not values_of:
            return
        heads = adapter.spec.num_attention_heads
        weights = output_weights(adapter.layers[self.layer_idx].self_attn, heads, values_of[0])
        if weights is None:
            self._read, self._together = [], {}
            return
        for sequence, looked in self._together.items():
            self._weigh_together(sequence, weights, *looked)
        for sequence, own in enumerate(self._read):
            found = self.found[sequence]
            for n, (values, read) in enumerate(own):
                found[n] = replace(found[n], written=weights.written(values, read))
            rows = (sum(x.shape[1] for x in columns) for columns in zip(*own, strict=True))
            self.flops[sequence] += weights.flops(*rows) if own else 0
        self._read, self._together = [], {}

    def _weigh_together(
        self, sequence: int, weights: OutputWeights, own: Together, values: Tensor, read: Tensor
    ) -> None:
        """Notes of each stretch what `settle_weights` needs."""
        squares, lengths = weights.squares(values), weights.lengths(read).split(own.samples)
        for n, ((first, last), of_stretch) in enumerate(zip(own.edges, lengths, strict=True)):
            self._segments.append((sequence, n, Segments(squares[:, first:last], of_stretch)))
        self.flops[sequence] += weights.flops(values.shape[1], len(read))

    def _entries(self, stretch: Stretch) -> tuple[int, CacheEntries, EarlierEntries | None]:
        """What rows of a stretch look at.

        Returns:
            The first of its entries among those of this pass; all of them; and which others beside them.
        """
        attended, b = self._attended, stretch.sequence
        start, stop = attended.layout.spans[b]
        entries = attended.entries[b]
        if self._new is None or self._new[0] != b:  # packed ones are copied: once, not for each stretch
            self._new = b, entries.last(stop - start).unpacked()
        fresh = self._new[1]
        source = self._source[start:stop]
        first, last = torch.searchsorted(source, torch.tensor(stretch.sources)).tolist()
        held = CacheEntries(fresh.keys[:, :, first:last], fresh.values[:, :, first:last])
        if entries.total > fresh.total:
            return first, held, _earlier(entries, len(fresh), max(self._replay.stretch - (last - first), 1))
        sink = None if first == 0 else EarlierEntries(fresh.keys[0, :, :1], fresh.values[0, :, :1], None)
        return first, held, sink


def settle_weights(looked: Sequence[ReplayAttention]) -> None:
    """Adds to what layers found what their entries write, where that waited for all of them: see `Together`."""
    by_device: dict[torch.device, list[tuple[ReplayAttention, int, int, Segments]]] = {}
    for look in looked:
        for sequence, n, own in look._segments:
            if own.squares.shape[1]:
                by_device.setdefault(own.squares.device, []).append((look, sequence, n, own))
            else:
                look.found[sequence][n] = replace(look.found[sequence][n], written=own.squares)
        look._segments = []
    for noted in by_device.values():
        for (look, sequence, n, _), written in zip(noted, written_together([x[3] for x in noted]), strict=True):
            look.found[sequence][n] = replace(look.found[sequence][n], written=written)


def _flops_of(q: Tensor, rows: int, counted: int, again: int) -> int:
    """Of so many rows of q [1, H, S, D] that look at so many entries and at each other, `again` counted once more."""
    return 2 * q.shape[1] * q.shape[3] * (2 * causal_pairs(rows, counted) + rows * again)


def _earlier(entries: CacheEntries, fresh: int, most: int) -> EarlierEntries:
    """Of the entries that were there before the last `fresh` ones, at most so many of each head.

    The first, and those that were asked for most, or the last where nobody says.
    """
    chosen: list[tuple[Tensor, ...]] = []
    for head in entries.weighed().heads():
        count = len(head) - fresh
        worth = torch.arange(count, device=head.keys.device) if head.score is None else head.score[0, 0, :count].clone()
        worth[:1] = torch.finfo(torch.float32).max if worth.is_floating_point() else count
        places = worth.topk(min(most, count)).indices.sort().values
        columns = (head.keys, head.values, head.log_mass)
        chosen.append(tuple(column[0, 0, places] for column in columns if column is not None))
    keys, values, mass = (
        pad_sequence([columns[n] for columns in chosen], batch_first=True, padding_value=NOTHING if n == 2 else 0.0)
        for n in range(3)
    )
    alike = len({len(columns[0]) for columns in chosen}) == 1
    return EarlierEntries(keys, values, None if alike and entries.log_mass is None else mass)


class LayersAgain:
    """Has the rows of a pass look once more, if the cache technique asks for it.

    Args:
        config: the techniques.
        between_layers: called behind each layer that all rows go through again.

    Attributes:
        looked: of each layer, what was found; empty where nobody asked.
    """

    def __init__(self, config: InferenceConfig, between_layers: Callable[[], object] | None = None) -> None:
        self._between_layers = between_layers
        self._skip = config.skip
        self._plan = None if config.cache is None else config.cache.replay
        self.looked: list[ReplayAttention] = []
        self._replay: tuple[TokenLayout, ReplayedRows, Tables] | None = None

    def behind_layer(self, attend: LayerAttention, rows: Rows) -> None:
        """In the fast form, lets the rows as they entered a layer look at what it holds now."""
        if self._plan is None or not self._plan.fast:
            return
        if self._replay is None or self._replay[0] is not rows.layout:  # the first layer, or rows have left
            replay = ReplayedRows(rows.hidden, rows.layout, self._plan, _sharing(attend))
            self._replay = rows.layout, replay, replay.tables(rows)
        _, replay, tables = self._replay
        look = ReplayAttention(replay, attend, None)
        _look_only(look, rows.hidden[replay.rows], tables[attend.adapter.layer_kinds[attend.layer_idx]])
        self._note(look, attend, ffn=False)

    def behind_all(self, attended: Sequence[LayerAttention], rows: Rows) -> None:
        """Runs rows, as they entered the first layer, through all layers again; skipping is done as it was."""
        if self._plan is None or self._plan.fast:
            return
        replay, depth = ReplayedRows(rows.hidden, rows.layout, self._plan, _sharing(attended[0])), len(attended)
        hidden = rows.hidden[replay.rows]
        tables = replay.tables(rows)
        for i, attend in enumerate(attended):
            queries, ffn = (None, None) if self._skip is None else self._skip.apply(replay.layout, i, depth)
            look, table = ReplayAttention(replay, attend, queries), tables[attend.adapter.layer_kinds[i]]
            if i < depth - 1:
                hidden = through_layer(look, hidden[None], table, ffn)[0]
            else:  # nobody asks what comes out of the last one
                _look_only(look, hidden, table)
            self._note(look, attend, ffn=i < depth - 1)
            if self._between_layers is not None:
                self._between_layers()

    def settled(self) -> list[ReplayAttention]:
        """`looked`, once all layers are through."""
        settle_weights(self.looked)
        return self.looked

    def _note(self, look: ReplayAttention, attend: LayerAttention, ffn: bool) -> None:
        look.weigh()
        self.looked.append(look)
        for sequence, (start, stop) in enumerate(look.layout.spans):
            rows = stop - start
            own = layer_flops(attend.adapter.spec, rows, rows, rows if ffn else 0, 0)
            attend.note_replay(sequence, own + look.flops[sequence])


def _sharing(attend: LayerAttention) -> int:
    """Query heads of a key/value head."""
    spec = attend.adapter.spec
    return spec.num_attention_heads // spec.num_key_value_heads


def _look_only(look: ReplayAttention, hidden: Tensor, table: tuple[Tensor, Tensor]) -> None:
    """Runs a layer for what its queries look at alone.

    Its output projection is spared, and its FFN wherever that is known to stand by itself.
    """
    layer: Any = look.adapter.layers[look.layer_idx]
    idle = [(layer.self_attn.o_proj,) * 2] if hasattr(layer.self_attn, "o_proj") else []
    names = ffn_branch(layer)
    if names is not None:
        idle.append((getattr(layer, names[0]), getattr(layer, names[1])))
    with ExitStack() as spared:
        for first, last in idle:
            spared.enter_context(only_rows(first, last, look.layout.sequence[:0]))
        through_layer(look, hidden[None], table, None)


def _of_references(q: Tensor, references: Tensor) -> Tensor:
    """[H, R, D]: of queries [H, K, D], those of the references."""
    heads, width = len(references), q.shape[2]
    by_group = q.unflatten(0, (-1, heads))  # [G, H / G, K, D]
    own = references[None, :, :, None].expand(len(by_group), *references.shape, width)
    return by_group.gather(2, own).flatten(0, 1)
