"""The decode step in C++ on the CPU: all layers in one call, float32."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mminfer_kernels.dispatch import BackendError
from mminfer_kernels.native import call, pointer

if TYPE_CHECKING:
    from mminfer_kernels.decode_step import DecoderWeights, LayerCache


def decode_step(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, weights: DecoderWeights, caches: Sequence[LayerCache]
) -> Tensor:
    """See `mminfer_kernels.decode_step`."""
    _check(hidden_states, cos, sin, weights, caches)
    out = hidden_states.clone(memory_format=torch.contiguous_format)
    words = []
    for keys, values, starts, end in caches:
        words += keys.data_ptr(), values.data_ptr(), 0 if starts is None else starts.data_ptr(), end, keys.shape[2]
    hidden, inner = weights.sizes
    shape = (len(out), len(caches), hidden, weights.heads, weights.groups, weights.head_dim, inner)
    call(
        "decode_step",
        weights.pointers,
        (ctypes.c_int64 * len(words))(*words),
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_float(weights.eps),
        ctypes.c_float(weights.scale),
        pointer(cos),
        pointer(sin),
        ctypes.c_int64(cos.stride(0)),
        pointer(out),
        ctypes.c_int32(torch.get_num_threads()),
    )
    return out


def _check(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, weights: DecoderWeights, caches: Sequence[LayerCache]
) -> None:
    if not weights.fits_native or hidden_states.dtype != torch.float32:
        raise BackendError("decode_step: C++ takes dense float32 weights in sizes that are multiples of 16")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.stride() != sin.stride() or cos.stride(1) != 1:
        raise BackendError("decode_step: C++ takes cos and sin in float32, dense and laid out alike")
    for keys, values, starts, _ in caches:
        whole = keys.is_contiguous() and values.is_contiguous() and (starts is None or starts.is_contiguous())
        if not whole or keys.dtype != torch.float32 or values.dtype != torch.float32:
            raise BackendError("decode_step: C++ takes contiguous float32 caches")
