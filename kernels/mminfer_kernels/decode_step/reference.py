"""The decode step in plain PyTorch, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from mminfer_kernels.decode_attention import reference as attention
from mminfer_kernels.rotary.reference import apply_rotary

if TYPE_CHECKING:
    from mminfer_kernels.decode_step import DecoderWeights, LayerCache


@torch.no_grad()
def decode_step(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, weights: DecoderWeights, caches: Sequence[LayerCache]
) -> Tensor:
    """See `mminfer_kernels.decode_step`."""
    rows, size = hidden_states.shape[0], (weights.head_dim,)
    for layer, (keys, values, starts, end) in zip(weights.layers, caches, strict=True):
        x = rms_norm(hidden_states, hidden_states.shape[1:], layer.input_norm, weights.eps)
        q = linear(x, layer.q, layer.q_bias).view(rows, weights.heads, 1, *size)
        k = linear(x, layer.k, layer.k_bias).view(rows, weights.groups, 1, *size)
        v = linear(x, layer.v, layer.v_bias).view(rows, weights.groups, *size)
        q = q if layer.q_norm is None else rms_norm(q, size, layer.q_norm, weights.eps)
        k = k if layer.k_norm is None else rms_norm(k, size, layer.k_norm, weights.eps)
        q, k = apply_rotary(q, k, cos[:, None], sin[:, None])
        keys[:, :, end], values[:, :, end] = k[:, :, 0], v
        x = attention.decode_attention(q, keys[:, :, : end + 1], values[:, :, : end + 1], starts, weights.scale)
        hidden_states = hidden_states + linear(x.flatten(1), layer.o, layer.o_bias)
        x = rms_norm(hidden_states, hidden_states.shape[1:], layer.post_norm, weights.eps)
        x = silu(linear(x, layer.gate, layer.gate_bias)) * linear(x, layer.up, layer.up_bias)
        hidden_states = hidden_states + linear(x, layer.down, layer.down_bias)
    return linear(rms_norm(hidden_states, hidden_states.shape[1:], weights.norm, weights.eps), weights.head)
