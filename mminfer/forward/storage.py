"""A compressed cache as plain tensors and plain data, for a safetensors file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mminfer.forward.kv_cache import CompressedCache, CompressedLayer, Places
from mminfer.technique import COLUMNS, CacheEntries

PLACES = ("decode_position", "resume_position", "run_position")


def cache_tensors(cache: CompressedCache) -> dict[str, Tensor]:
    """Every sequence's entries in every layer, named `layer.sequence.column`, and where the sequences go on."""
    tensors = {name: column.clone() for name, column in zip(PLACES, cache.places.columns, strict=True)}
    for i, layer in enumerate(cache.layers):
        for b in range(layer.batch_size):
            for name, column in layer.row(b).columns.items():
                if column is not None:
                    tensors[f"{i}.{b}.{name}"] = column.contiguous()
    return tensors


def cache_facts(cache: CompressedCache) -> dict[str, Any]:
    """What of a cache is no tensor."""
    seen = [list(layer.seen) for layer in cache.layers]
    return {
        "logical_length": cache.logical_length,
        "tokens": list(cache.tokens),
        "seen": seen,
        "rotary_length": cache.rotary_length,
    }


def restore_cache(tensors: dict[str, Tensor], facts: dict[str, Any], device: torch.device) -> CompressedCache:
    """The cache that `cache_tensors` and `cache_facts` describe.

    Raises:
        KeyError: a tensor is missing.
    """
    cache = CompressedCache()
    layers = []
    for i, seen in enumerate(facts["seen"]):
        rows = []
        for b in range(len(seen)):
            columns = {name: tensors.get(f"{i}.{b}.{name}") for name in COLUMNS}
            if columns["keys"] is None or columns["values"] is None:
                raise KeyError(f"{i}.{b}.keys")
            rows.append(CacheEntries.of({n: None if x is None else x.to(device) for n, x in columns.items()}))
        layers.append(CompressedLayer(rows, seen, cache))
    places = Places(*(tensors[name].to(device) for name in PLACES))
    cache.commit(layers, facts["logical_length"], facts["tokens"], places, facts["rotary_length"])
    return cache
