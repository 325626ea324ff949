"""One step of decoding over the compressed cache."""

from __future__ import annotations

from functools import partial

import torch
from mminfer_kernels import decode_attention
from torch import Tensor

from mminfer.attention import routed_attention
from mminfer.cache.kv_cache import CompressedCache, CompressedLayer
from mminfer.config import InferenceConfig
from mminfer.models.base import ModelAdapter
from mminfer.prefill import fractional


@torch.no_grad()
def decode_step(
    adapter: ModelAdapter, config: InferenceConfig, hidden_states: Tensor, cache: CompressedCache
) -> Tensor:
    """Runs one new token of each sequence; if anything raises, the cache is as it was.

    Args:
        adapter: the host model.
        config: the techniques (only positions matter here).
        hidden_states: [B, 1, C], the tokens' embeddings.
        cache: grows by one column.

    Returns:
        [B, 1, C], before the final norm.
    """
    position = cache.next_position.to(hidden_states.device)[:, None].expand(adapter.position_axes, -1, 1)
    tables = adapter.rotary(hidden_states, position, fractional(config))
    with routed_attention(adapter.text_config):
        for layer, kind, held in zip(adapter.layers, adapter.layer_kinds, cache.layers, strict=True):
            hidden_states = layer(
                hidden_states,
                position_embeddings=tables[kind],
                attention_mask=None,
                use_cache=False,
                attend=partial(_attend, held),
            )
    cache.advance(1)
    return hidden_states


def _attend(held: CompressedLayer, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    keys, values = held.stage(k, v)
    starts = held.starts
    if window is not None and keys.shape[2] > window:
        keys, values = keys[:, :, -window:], values[:, :, -window:]
        starts = None if starts is None else (starts - (held.end + 1 - window)).clamp_min(0)
    return decode_attention(q, keys, values, starts, scale)
