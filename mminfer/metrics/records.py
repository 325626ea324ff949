"""What the prompt pass did, row by row: the raw material of every figure that is reported."""

from __future__ import annotations

from dataclasses import dataclass, field


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
