"""Views of a layer as techniques are given them, for tests of single techniques."""

from typing import Any

import torch

from mminfer.technique import CacheEntries, LayerView


def layer_view(queries: torch.Tensor, entries: CacheEntries | torch.Tensor, **facts: Any) -> LayerView:
    """One sequence in layer 0 of a model of 12 layers, all of it new; `facts` change what they name.

    Args:
        queries: [1, H, S, D].
        entries: what the layer holds, or its keys [1, G, N, D].
    """
    if isinstance(entries, torch.Tensor):
        entries = CacheEntries(entries, entries)
    given: dict[str, Any] = {
        "is_visual": torch.zeros(len(entries), dtype=torch.bool),
        "query_index": None,
        "scale": 1.0,
        "layer_idx": 0,
        "num_layers": 12,
        "prompt_tokens": len(entries),
        "tokens_seen": len(entries),
    }
    return LayerView(queries, entries, **given | facts)
