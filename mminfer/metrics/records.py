"""What the prompt pass did, row by row: the raw material of every figure that is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

PER_SEQUENCE = ("rows", "queries", "ffn", "pairs", "entries")  # fields of a layer's record


@dataclass(frozen=True)
class LayerRecord:
    """One layer of one pass; each tuple has one number a sequence.

    Args:
        rows: rows that entered the layer.
        queries: rows that issued a query.
        ffn: rows that went through the FFN.
        pairs: query-key pairs of the attention.
        entries: entries a head that the layer's cache holds afterwards.
        overhead_flops: what the techniques themselves spent in this layer, over the whole batch.
    """

    rows: tuple[int, ...]
    queries: tuple[int, ...]
    ffn: tuple[int, ...]
    pairs: tuple[int, ...]
    entries: tuple[int, ...]
    overhead_flops: int = 0


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
        ahead: pairs of each sequence's prompt in which a token sees a later one of its image; empty where none does.
    """

    past: tuple[int, ...]
    prompt: tuple[int, ...]
    visual: tuple[int, ...]
    merged: tuple[int, ...] = ()
    layers: list[LayerRecord] = field(default_factory=list)
    merge_flops: int = 0
    ahead: tuple[int, ...] = ()


def joined_layers(chunks: Sequence[Sequence[LayerRecord]]) -> list[LayerRecord]:
    """What each layer did over all chunks, given one record a layer of each; its entries are those at the end."""
    return [_joined_layer(layers) for layers in zip(*chunks, strict=True)]


def joined(records: Sequence[PromptRecord]) -> PromptRecord:
    """Passes that took a prompt in piece by piece, as one."""
    if len(records) == 1:
        return records[0]
    ahead = tuple(map(sum, zip(*(r.ahead or (0,) * len(r.prompt) for r in records), strict=True)))
    return PromptRecord(
        past=records[0].past,
        prompt=tuple(map(sum, zip(*(r.prompt for r in records), strict=True))),
        visual=tuple(map(sum, zip(*(r.visual for r in records), strict=True))),
        merged=tuple(map(sum, zip(*(r.merged for r in records), strict=True))),
        layers=joined_layers([r.layers for r in records]),
        merge_flops=sum(r.merge_flops for r in records),
        ahead=ahead if any(ahead) else (),
    )


def stacked(records: Sequence[PromptRecord]) -> PromptRecord:
    """Passes of single sequences as one pass of their batch."""
    if len(records) == 1:
        return records[0]
    layers = [_stacked_layer(of_all) for of_all in zip(*(r.layers for r in records), strict=True)]
    names = ("past", "prompt", "visual", "merged")
    facts = {name: tuple(n for r in records for n in getattr(r, name)) for name in names}
    ahead = tuple(n for r in records for n in r.ahead or (0,))
    return PromptRecord(
        **facts,
        layers=layers,
        merge_flops=sum(r.merge_flops for r in records),
        ahead=ahead if any(ahead) else (),
    )


def _joined_layer(chunks: Sequence[LayerRecord]) -> LayerRecord:
    if len(chunks) == 1:
        return chunks[0]
    sums = {name: tuple(map(sum, zip(*(getattr(c, name) for c in chunks), strict=True))) for name in PER_SEQUENCE}
    overhead_flops = sum(c.overhead_flops for c in chunks)
    return LayerRecord(**{**sums, "entries": chunks[-1].entries}, overhead_flops=overhead_flops)


def _stacked_layer(sequences: Sequence[LayerRecord]) -> LayerRecord:
    facts = {name: tuple(n for s in sequences for n in getattr(s, name)) for name in PER_SEQUENCE}
    overhead_flops = sum(s.overhead_flops for s in sequences)
    return LayerRecord(**facts, overhead_flops=overhead_flops)
