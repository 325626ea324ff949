"""A compressed cache as plain tensors and plain data, for a safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mminfer.forward.kv_cache import CompressedCache, Continuation
from mminfer.forward.kv_layer import CompressedLayer
from mminfer.forward.packed_layer import PackedLayer, layer_of
from mminfer.technique import COLUMNS, CacheEntries

# The names in the file of the fields of `Continuation`, in their order.
CONTINUATION_NAMES = ("decode_position", "resume_position", "run_position")


def cache_tensors(cache: CompressedCache) -> dict[str, Tensor]:
    """Every sequence's entries in every layer, named `layer.sequence.column`, and where the sequences go on."""
    named = zip(CONTINUATION_NAMES, cache.continuation.columns, strict=True)
    tensors = {name: column.clone() for name, column in named}
    for i, layer in enumerate(cache.layers):
        for b in range(layer.batch_size):
            for name, column in layer.row(b).columns.items():
                if column is not None:
                    tensors[f"{i}.{b}.{name}"] = column.contiguous()
    return tensors


def cache_facts(cache: CompressedCache) -> dict[str, Any]:
    """What of a cache is no tensor; its names are those of the file."""
    return {
        "logical_length": cache.logical_length,
        "tokens": list(cache.tokens),
        "seen": [list(layer.tokens_seen) for layer in cache.layers],
        "head_lengths": [_head_lengths(layer) for layer in cache.layers],
        "rotary_length": cache.rotary_length,
    }


def restore_cache(tensors: dict[str, Tensor], facts: dict[str, Any], device: torch.device) -> CompressedCache:
    """The cache that `cache_tensors` and `cache_facts` describe.

    Raises:
        KeyError: a tensor is missing.
    """
    cache = CompressedCache()
    cache.headroom = 0
    here = {name: tensor.to(device) for name, tensor in tensors.items()}
    layers = []
    for i, (tokens_seen, lengths) in enumerate(zip(facts["seen"], facts["head_lengths"], strict=True)):
        rows = [_entries(here, f"{i}.{b}", of_heads) for b, of_heads in enumerate(lengths)]
        layers.append(layer_of(rows, tokens_seen, cache))
    continuation = Continuation(*(here[name] for name in CONTINUATION_NAMES))
    cache.commit(layers, facts["logical_length"], facts["tokens"], continuation, facts["rotary_length"])
    return cache


def _head_lengths(layer: CompressedLayer) -> list[list[int] | None]:
    """Of each sequence the entries of each head; None: the heads are alike, and have an axis of their own."""
    if isinstance(layer, PackedLayer):
        return [list(lengths) for lengths in layer.head_lengths]
    return [None] * layer.batch_size


def _entries(tensors: dict[str, Tensor], place: str, head_lengths: Sequence[int] | None) -> CacheEntries:
    """One sequence's entries in one layer.

    Args:
        tensors: all there are.
        place: the beginning of their names, `layer.sequence`.
        head_lengths: as of `CacheEntries`.
    """
    columns = {name: tensors.get(f"{place}.{name}") for name in COLUMNS}
    for name in ("keys", "values"):
        if columns[name] is None:
            raise KeyError(f"{place}.{name}")
    return CacheEntries.of(columns, None if head_lengths is None else tuple(head_lengths))
