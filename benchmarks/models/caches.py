"""Caches full of random entries, on a model's device and in its type: what a step costs does not ask what they hold."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from mminfer.forward.kv_cache import CompressedCache, Continuation
from mminfer.forward.packed_layer import layer_of
from mminfer.technique import CacheEntries


def random_cache(model: Any, entries: int, tokens: int, batch: int = 1, heads_differ: bool = False) -> CompressedCache:
    """What prompts of so many tokens would leave.

    Args:
        model: whose.
        entries: of each head, or of the mean head.
        tokens: of each prompt.
        batch: prompts.
        heads_differ: let the heads of a layer hold one, two, three, ... parts of its entries, packed.
    """
    heads, size = _heads(model)
    parts = [2 * entries * (n + 1) // (heads + 1) for n in range(heads)]

    def random(count: int, length: int) -> CacheEntries:
        keys, values = (torch.randn(1, count, length, size, device=model.device, dtype=model.dtype) for _ in range(2))
        return CacheEntries(keys, values)

    def sequence() -> CacheEntries:
        if not heads_differ:
            return random(heads, entries)
        return CacheEntries.of_heads([random(1, length).weighed() for length in parts])

    cache, seen = CompressedCache(), [tokens] * batch
    layers = [layer_of([sequence() for _ in seen], seen, cache) for _ in range(_layers(model))]
    end = torch.full((batch,), float(tokens), dtype=torch.float64)
    cache.commit(layers, tokens, seen, Continuation.behind_text(end))
    return cache


def host_cache(model: Any, tokens: int, room: int | None = None, batch: int = 1) -> Any:
    """The host's own, as full.

    Args:
        model: whose.
        tokens: entries a head.
        room: for how many more, of a static cache; None: it grows.
        batch: sequences.
    """
    text, (heads, size) = model.config.get_text_config(), _heads(model)
    cache = DynamicCache(config=text) if room is None else StaticCache(config=text, max_cache_len=tokens + room)
    for layer in range(_layers(model)):
        keys, values = (
            torch.randn(batch, heads, tokens, size, device=model.device, dtype=model.dtype) for _ in range(2)
        )
        cache.update(keys, values, layer)
    return cache


def _heads(model: Any) -> tuple[int, int]:
    """Key/value heads of a layer, and the size of one."""
    text = model.config.get_text_config()
    return text.num_key_value_heads, text.hidden_size // text.num_attention_heads


def _layers(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)
