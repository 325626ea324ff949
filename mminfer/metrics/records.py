"""What the prompt pass did, row by row: the raw material of every figure that is reported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from mminfer.technique import mean_length

LOG_MASS_BYTES = 4
SUMS = ("rows", "queries", "ffn", "pairs", "cache_flops", "prune_flops")  # over the chunks of a prompt
OF_CACHE = ("head_entries", "weighed")  # what is held at the end
PER_SEQUENCE = (*SUMS, *OF_CACHE, "keys")  # fields of a layer's record


@dataclass(frozen=True)
class LayerRecord:
    """One layer of one pass; each tuple has one number a sequence.

    Args:
        rows: rows that entered the layer.
        queries: rows that issued a query.
        keys: entries a head there were for the queries, their own and those beyond a window included; in chunks, the
            most. Like the pairs the mean over the heads, where these differ in length.
        ffn: rows that went through the FFN.
        pairs: query-key pairs a head that the attention looked at.
        head_entries: entries that the layer's cache holds afterwards in each head.
        weighed: how many of them, over all heads, have a log-mass beside keys and values.
        cache_flops: what compressing the cache spent.
        prune_flops: what choosing the tokens that leave spent.
    """

    rows: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    ffn: tuple[int, ...]
    pairs: tuple[int, ...]
    head_entries: tuple[tuple[int, ...], ...]
    weighed: tuple[int, ...]
    cache_flops: tuple[int, ...]
    prune_flops: tuple[int, ...]

    @property
    def entries(self) -> tuple[int, ...]:
        """Entries a head that the layer's cache holds afterwards: the mean, rounded, where its heads differ."""
        return tuple(mean_length(lengths) for lengths in self.head_entries)

    def cache_bytes(self, head_dim: int, element_size: int) -> int:
        """Bytes of keys and values (and of log-masses) that the layer's cache holds afterwards, of all sequences."""
        entries = sum(map(sum, self.head_entries))
        return 2 * entries * head_dim * element_size + LOG_MASS_BYTES * sum(self.weighed)


@dataclass
class PromptRecord:
    """One prompt pass.

    Args:
        past: tokens of each sequence that earlier passes had taken in.
        prompt: tokens of each sequence as they came in.
        visual: visual ones among them.
        merged: tokens left of each sequence after merging.
        layers: one record a layer.
        merge_flops: what merging spent, over the whole batch.
        pairs_ahead: pairs of each sequence's prompt in which a token sees a later one of its image; empty where none
            does.
        vision_flops: of the vision tower and projector, for each sequence; empty where features came ready made, as
            the host's `generate` hands them to a patched model.
        full_vision_flops: the same if all pictures went through the tower as they came.
        encoder_cache_hits: images and videos, of all sequences, that were encoded before.
    """

    past: tuple[int, ...]
    prompt: tuple[int, ...]
    visual: tuple[int, ...]
    merged: tuple[int, ...] = ()
    layers: list[LayerRecord] = field(default_factory=list)
    merge_flops: int = 0
    pairs_ahead: tuple[int, ...] = ()
    vision_flops: tuple[int, ...] = ()
    full_vision_flops: tuple[int, ...] = ()
    encoder_cache_hits: int = 0


def joined_layers(chunks: Sequence[Sequence[LayerRecord]]) -> list[LayerRecord]:
    """What each layer did over all chunks, given one record a layer of each; its entries are those at the end."""
    return [_joined_layer(layers) for layers in zip(*chunks, strict=True)]


def joined(records: Sequence[PromptRecord]) -> PromptRecord:
    """Passes that took a prompt in piece by piece, as one."""
    if len(records) == 1:
        return records[0]
    return PromptRecord(
        past=records[0].past,
        prompt=tuple(map(sum, zip(*(r.prompt for r in records), strict=True))),
        visual=tuple(map(sum, zip(*(r.visual for r in records), strict=True))),
        merged=tuple(map(sum, zip(*(r.merged for r in records), strict=True))),
        layers=joined_layers([r.layers for r in records]),
        merge_flops=sum(r.merge_flops for r in records),
        encoder_cache_hits=sum(r.encoder_cache_hits for r in records),
        **{name: _summed(records, name) for name in ("pairs_ahead", "vision_flops", "full_vision_flops")},
    )


def stacked(records: Sequence[PromptRecord]) -> PromptRecord:
    """Passes of single sequences as one pass of their batch."""
    if len(records) == 1:
        return records[0]
    layers = [_stacked_layer(of_all) for of_all in zip(*(r.layers for r in records), strict=True)]
    names = ("past", "prompt", "visual", "merged")
    facts = {name: tuple(n for r in records for n in getattr(r, name)) for name in names}
    return PromptRecord(
        **facts,
        layers=layers,
        merge_flops=sum(r.merge_flops for r in records),
        pairs_ahead=_some(n for r in records for n in r.pairs_ahead or (0,)),
        vision_flops=_some(n for r in records for n in r.vision_flops or (0,)),
        full_vision_flops=_some(n for r in records for n in r.full_vision_flops or (0,)),
        encoder_cache_hits=sum(r.encoder_cache_hits for r in records),
    )


def shares(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """A total shared out in whole numbers by these weights; nothing is lost by rounding unless all weights are 0."""
    whole = max(1, sum(weights))
    ends = [total * part // whole for part in accumulate(weights, initial=0)]
    return tuple(b - a for a, b in pairwise(ends))


def _summed(records: Sequence[PromptRecord], name: str) -> tuple[int, ...]:
    """Of each sequence the sum over passes of a field that may be empty; nothing if all are 0."""
    return _some(map(sum, zip(*(getattr(r, name) or (0,) * len(r.prompt) for r in records), strict=True)))


def _some(values: Iterable[int]) -> tuple[int, ...]:
    """The values, or nothing if all are 0."""
    found = tuple(values)
    return found if any(found) else ()


def _joined_layer(chunks: Sequence[LayerRecord]) -> LayerRecord:
    if len(chunks) == 1:
        return chunks[0]
    facts: dict[str, Any] = {
        name: tuple(map(sum, zip(*(getattr(c, name) for c in chunks), strict=True))) for name in SUMS
    }
    keys = tuple(map(max, zip(*(c.keys for c in chunks), strict=True)))
    return LayerRecord(**facts, keys=keys, **{name: getattr(chunks[-1], name) for name in OF_CACHE})


def _stacked_layer(sequences: Sequence[LayerRecord]) -> LayerRecord:
    facts: dict[str, Any] = {name: tuple(n for s in sequences for n in getattr(s, name)) for name in PER_SEQUENCE}
    return LayerRecord(**facts)
