"""Rows looked at once more behind the entries that they made: which of these does anything ask for?

A context says by itself what of it is worth keeping: what its own rows look at when they come by a second time is what
a later question can look at (KVzip, arXiv 2505.23416). Their second keys and values are thrown away.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from mminfer_kernels import prompt_attention_peak
from mminfer_kernels.prompt_attention import shares_logits
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad
from torch.nn.utils.rnn import pad_sequence

from mminfer.config import InferenceConfig
from mminfer.forward.branches import ffn_branch
from mminfer.forward.layer_attention import LayerAttention
from mminfer.forward.rotary import Tables
from mminfer.forward.rows import Rows, through_layer
from mminfer.layout import TokenLayout
from mminfer.metrics.flops import causal_pairs, layer_flops
from mminfer.technique import NOTHING, CacheEntries, EarlierEntries, ReplayedStretch, ReplayPlan, only_rows

GROUP = 512  # rows that are replayed together: more would find each other


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows that go by together, a picture or a piece of text.

    Args:
        rows: [n] int64, among those replayed.
        is_visual: whether they are a picture's.
    """

    rows: Tensor
    is_visual: bool


@dataclass(frozen=True, eq=False)
class _Stretch:
    """Entries that are judged together, and the rows that look at them.

    Args:
        sequence: whose.
        sources: first and one past the last of the packed rows that made them.
        groups: of the rows replayed.
        references: [R] int64, among the rows replayed: whose queries are handed over.
    """

    sequence: int
    sources: tuple[int, int]
    groups: list[_Group]
    references: Tensor


class Replay:
    """The rows of one pass as they go by a second time.

    Args:
        hidden: [T, C], the rows as they enter.
        layout: of these, at the positions where they stand.
        plan: how they are looked at.

    Attributes:
        rows: [K] int64, those of them that go by again.
        layout: of these, at the positions that follow their stretch.
        stretch: entries that each looks at.
    """

    def __init__(self, hidden: Tensor, layout: TokenLayout, plan: ReplayPlan) -> None:
        self.stretch = plan.stretch
        wanted = _worth_replaying(hidden, layout, plan)
        parts = [
            (sequence, first, last)
            for sequence, (start, stop) in enumerate(layout.spans)
            for first, last in _stretches(layout, start, stop, plan.stretch)
        ]
        chosen = [_replayed_rows(layout, wanted, first, last, plan.text) for _, first, last in parts]
        self.rows = torch.cat(chosen)
        self.layout = layout.select(self.rows)
        position = self.layout.position.clone()
        self.stretches: list[_Stretch] = []
        start = 0
        for (sequence, first, last), rows in zip(parts, chosen, strict=True):
            groups = _groups(self.layout, start, start + len(rows))
            behind = layout.position[:, first:last].amax().floor() + 1
            for group in groups:
                position[:, group.rows] = _placed(position[:, group.rows], group.is_visual) + behind
            sources = (int(layout.source[first]), int(layout.source[last - 1]) + 1)
            asking = [g.rows for g in groups if g.is_visual] or [g.rows for g in groups]
            self.stretches.append(_Stretch(sequence, sources, groups, _some(torch.cat(asking), plan.references)))
            start += len(rows)
        self.layout = replace(self.layout, position=position, run_before=None)

    def tables(self, rows: Rows) -> Tables:
        """Rotary tables of those of the rows that go by again, made as those of all of them are."""
        return rows.rotate(rows.hidden[None], self.layout.position[:, None])


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

    def __init__(self, replay: Replay, attended: LayerAttention, queries: Tensor | None) -> None:
        self._replay, self._attended = replay, attended
        self.adapter, self.config, self.layer_idx = attended.adapter, attended.config, attended.layer_idx
        self.layout, self._asking = replay.layout, queries
        self.queries: Tensor | None = None  # all rows look
        self.entries = attended.entries
        self.found: list[list[ReplayedStretch]] = [[] for _ in attended.entries]
        self.flops = [0] * len(attended.entries)
        self._new: tuple[int, CacheEntries] | None = None  # of which sequence, while stretches of it look

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        k, v = k.to(q.dtype), v.to(q.dtype)
        out = q.new_zeros(1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        for stretch in self._replay.stretches:
            self._look(stretch, q, k, v, scale, out)
        self._new = None
        if self._asking is None:
            return out
        silent = torch.ones(out.shape[2], dtype=torch.bool, device=out.device)
        silent[self._asking] = False
        return out.masked_fill_(silent[None, None, :, None], 0)

    def _look(self, stretch: _Stretch, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
        """One stretch's rows; what they read goes to `out`."""
        first, held, earlier = self._entries(stretch)
        ahead = 0 if earlier is None else earlier.keys.shape[1]
        if earlier is not None:
            held = torch.cat([torch.stack([earlier.keys, earlier.values])[:, None], held], 3)
        counted, longest = held.shape[3], max(len(group.rows) for group in stretch.groups)
        keys_values = held.new_empty(*held.shape[:3], counted + longest, held.shape[4])
        keys_values[:, :, :, :counted] = held
        log_mass = None
        if earlier is not None and earlier.log_mass is not None:
            log_mass = pad(earlier.log_mass, (0, counted + longest - ahead))[None]
        peaks = held.new_zeros(held.shape[2], counted, dtype=torch.float32)
        pairs = 0
        for group in stretch.groups:
            stop = counted + len(group.rows)
            for place, own in zip(keys_values, (k, v), strict=True):
                place[:, :, counted:stop] = own[:, :, group.rows]
            keys, values, asked = keys_values[0, :, :, :stop], keys_values[1, :, :, :stop], q[:, :, group.rows]
            mass = None if log_mass is None else log_mass[:, :, :stop]
            out[:, :, group.rows], peak = prompt_attention_peak(asked, keys, values, scale, None, counted, mass)
            peaks = peaks.maximum(peak[0].float())
            again = 0 if shares_logits(asked, keys, values) else len(group.rows) * counted
            pairs += 2 * causal_pairs(len(group.rows), counted) + again
        self.flops[stretch.sequence] += 2 * q.shape[1] * q.shape[3] * pairs
        self.found[stretch.sequence].append(
            ReplayedStretch(first, peaks[:, ahead:], q[0, :, stretch.references], earlier, scale)
        )

    def _entries(self, stretch: _Stretch) -> tuple[int, Tensor, EarlierEntries | None]:
        """What rows of a stretch look at.

        Returns:
            The first of its entries among those of this pass; keys and values of them all, [2, 1, G, n, D]; and which
            others beside them.
        """
        attended, b = self._attended, stretch.sequence
        start, stop = attended.layout.spans[b]
        entries = attended.entries[b]
        if self._new is None or self._new[0] != b:  # packed ones are copied: once, not for each stretch
            self._new = b, entries.last(stop - start).unpacked()
        fresh = self._new[1]
        source = attended.layout.source[start:stop]
        first, last = torch.searchsorted(source, torch.tensor(stretch.sources, device=source.device)).tolist()
        held = torch.stack([fresh.keys[:, :, first:last], fresh.values[:, :, first:last]])
        if entries.total > fresh.total:
            return first, held, _earlier(entries, len(fresh), max(self._replay.stretch - (last - first), 1))
        sink = None if first == 0 else EarlierEntries(fresh.keys[0, :, :1], fresh.values[0, :, :1], None)
        return first, held, sink


def _earlier(entries: CacheEntries, fresh: int, most: int) -> EarlierEntries:
    """Of the entries that were there before the last `fresh` ones, at most so many of each head.

    The first, and those that were asked for most, or the last where nobody says.
    """
    chosen = []
    for head in entries.heads():
        count = len(head) - fresh
        worth = torch.arange(count, device=head.keys.device) if head.score is None else head.score[0, 0, :count].clone()
        worth[:1] = torch.finfo(torch.float32).max if worth.is_floating_point() else count
        places = worth.topk(min(most, count)).indices.sort().values
        chosen.append((head.keys[0, 0, places], head.values[0, 0, places]))
    lengths = [len(keys) for keys, _ in chosen]
    keys, values = (pad_sequence([pair[n] for pair in chosen], batch_first=True) for n in range(2))
    if min(lengths) == max(lengths):
        return EarlierEntries(keys, values, None)
    place = torch.arange(max(lengths), device=keys.device)
    missing = place >= torch.tensor(lengths, device=keys.device)[:, None]
    return EarlierEntries(keys, values, torch.zeros_like(missing, dtype=torch.float32).masked_fill_(missing, NOTHING))


class LayersAgain:
    """Has the rows of a pass look once more, if the cache technique asks for it.

    Args:
        config: the techniques.

    Attributes:
        looked: of each layer, what was found; empty where nobody asked.
    """

    def __init__(self, config: InferenceConfig) -> None:
        self._skip = config.skip
        self._plan = None if config.cache is None else config.cache.replay
        self.looked: list[ReplayAttention] = []
        self._replay: tuple[TokenLayout, Replay, Tables] | None = None

    def behind_layer(self, attend: LayerAttention, rows: Rows) -> None:
        """In the fast form, lets the rows as they entered a layer look at what it holds now."""
        if self._plan is None or not self._plan.fast:
            return
        if self._replay is None or self._replay[0] is not rows.layout:  # the first layer, or rows have left
            replay = Replay(rows.hidden, rows.layout, self._plan)
            self._replay = rows.layout, replay, replay.tables(rows)
        _, replay, tables = self._replay
        look = ReplayAttention(replay, attend, None)
        _look_only(look, rows.hidden[replay.rows], tables[attend.adapter.layer_kinds[attend.layer_idx]])
        self._note(look, attend, ffn=False)

    def behind_all(self, attended: Sequence[LayerAttention], rows: Rows) -> None:
        """Runs rows, as they entered the first layer, through all layers again; skipping is done as it was."""
        if self._plan is None or self._plan.fast:
            return
        replay, depth = Replay(rows.hidden, rows.layout, self._plan), len(attended)
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

    def _note(self, look: ReplayAttention, attend: LayerAttention, ffn: bool) -> None:
        self.looked.append(look)
        for sequence, (start, stop) in enumerate(look.layout.spans):
            rows = stop - start
            own = layer_flops(attend.adapter.spec, rows, rows, rows if ffn else 0, 0)
            attend.note_replay(sequence, own + look.flops[sequence])


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


def _stretches(layout: TokenLayout, start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """First and one past the last row of about equal stretches, at most `size` long unless a picture is longer."""
    if stop <= start:
        return []
    owner = layout.image_id[start:stop]
    longest = max(owner[owner >= 0].bincount().tolist(), default=0)
    even = -(-(stop - start) // -(-(stop - start) // size))
    cuts = layout.cuts(start, stop, max(even, longest))
    return list(itertools.pairwise(cuts))


def _worth_replaying(hidden: Tensor, layout: TokenLayout, plan: ReplayPlan) -> Tensor:
    """[T] bool: all but visual rows that are alike the one before them, of the same image."""
    wanted = torch.ones_like(layout.is_visual)
    if plan.alike < 1 and len(layout) > 1:
        alike = cosine_similarity(hidden[1:].float(), hidden[:-1].float(), dim=-1) >= plan.alike
        wanted[1:] = ~(alike & layout.is_visual[1:] & (layout.image_id[1:] == layout.image_id[:-1]))
    return wanted


def _replayed_rows(layout: TokenLayout, wanted: Tensor, first: int, last: int, text: bool) -> Tensor:
    """[n] int64, ascending: the rows of a stretch that go by again."""
    rows = torch.arange(first, last, device=layout.sequence.device)
    visual = layout.is_visual[first:last]
    return rows[wanted[first:last] if text or not bool(visual.any()) else wanted[first:last] & visual]


def _groups(layout: TokenLayout, start: int, stop: int) -> list[_Group]:
    """Rows start .. stop by pictures, and what is text, in pieces of `GROUP` at most."""
    rows, visual = torch.arange(start, stop, device=layout.sequence.device), layout.is_visual[start:stop]
    own = layout.image_id[start:stop]
    gap = (layout.source[start + 1 : stop] - layout.source[start : stop - 1] > 1) & (own[1:] != own[:-1])
    breaks = gap | (visual[1:] != visual[:-1])
    ends = torch.cat([breaks.nonzero()[:, 0] + 1, breaks.new_tensor([stop - start], dtype=torch.int64)])
    runs = rows.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    groups = [_Group(piece, True) for run in runs if bool(visual[run[0] - start]) for piece in run.split(GROUP)]
    text = rows[~visual]
    return groups + [_Group(piece, False) for piece in text.split(GROUP) if len(piece)]


def _placed(position: Tensor, is_visual: bool) -> Tensor:
    """Positions ([A, n]) moved to the beginning; text, which may be of several runs, closes ranks."""
    if is_visual:
        return position - position[:, 0].amin()
    return torch.arange(position.shape[1], dtype=position.dtype, device=position.device).expand_as(position)


def _some(rows: Tensor, count: int) -> Tensor:
    """At most `count` of these rows, evenly spread."""
    if count >= len(rows):
        return rows
    return rows[(torch.arange(count, device=rows.device) + 0.5).mul(len(rows) / max(count, 1)).long()]
