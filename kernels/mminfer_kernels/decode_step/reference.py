"""The decode step in plain PyTorch, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from mminfer_kernels.decode_attention import reference as attention
from mminfer_kernels.decode_step.caches import LayerCache, PackedLayerCache
from mminfer_kernels.rotary.reference import apply_rotary

if TYPE_CHECKING:
    from mminfer_kernels.decode_step import DecoderWeights


@torch.no_grad()
def decode_step(
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: DecoderWeights,
    caches: Sequence[LayerCache | PackedLayerCache],
) -> Tensor:
    """See `mminfer_kernels.decode_step`."""
    rows, size = hidden_states.shape[0], (weights.head_dim,)
    for layer, cache in zip(weights.layers, caches, strict=True):
        x = rms_norm(hidden_states, hidden_states.shape[1:], layer.input_norm, weights.eps)
        q = linear(x, layer.q, layer.q_bias).view(rows, weights.heads, 1, *size)
        k = linear(x, layer.k, layer.k_bias).view(rows, weights.groups, 1, *size)
        v = linear(x, layer.v, layer.v_bias).view(rows, weights.groups, *size)
        q = q if layer.q_norm is None else rms_norm(q, size, layer.q_norm, weights.eps)
        k = k if layer.k_norm is None else rms_norm(k, size, layer.k_norm, weights.eps)
        q, k = apply_rotary(q, k, cos[:, None], sin[:, None])
        x = _attend(q, k[:, :, 0], v, cache, float(weights.scale))
        hidden_states = hidden_states + linear(x.flatten(1), layer.o, layer.o_bias)
        x = rms_norm(hidden_states, hidden_states.shape[1:], layer.post_norm, weights.eps)
        x = silu(linear(x, layer.gate, layer.gate_bias)) * linear(x, layer.up, layer.up_bias)
        hidden_states = hidden_states + linear(x, layer.down, layer.down_bias)
    return linear(rms_norm(hidden_states, hidden_states.shape[1:], weights.norm, weights.eps), weights.head)


def _attend(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | PackedLayerCache, scale: float) -> Tensor:
    """Writes the new keys and values [B, G, D] behind those of the cache; attention of q [B, H, 1, D] over all."""
    if isinstance(cache, PackedLayerCache):
        keys, values, segments, added, log_mass = cache
        lengths = segments.lengths + added
        rows = segments.first + lengths
        keys[rows], values[rows] = k, v
        if log_mass is not None:
            log_mass[rows] = 0
        return attention.packed_decode_attention(q, keys, values, segments.first, lengths + 1, scale, log_mass, None)
    keys, values, starts, end = cache
    keys[:, :, end], values[:, :, end] = k, v
    return attention.decode_attention(q, keys[:, :, : end + 1], values[:, :, : end + 1], starts, scale)
