"""The decode step in C++ on the CPU: all layers in one call, float32."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mminfer_kernels.build import library
from mminfer_kernels.dispatch import BackendError

if TYPE_CHECKING:
    from mminfer_kernels.decode_step import DecoderWeights, LayerCache


@functools.cache
def _function() -> Callable[..., int]:
    loaded = library()
    if loaded is None:
        raise BackendError("decode_step: the C++ library is not there")
    function = loaded.mminfer_decode_step
    pointer, real = ctypes.c_void_p, ctypes.c_float
    function.argtypes = [pointer] * 3 + [real] * 2 + [pointer] * 2 + [ctypes.c_int64, pointer, ctypes.c_int32]
    function.restype = ctypes.c_int
    return function


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
    failed = _function()(
        weights.pointers,
        (ctypes.c_int64 * len(words))(*words),
        (ctypes.c_int64 * 7)(*shape),
        weights.eps,
        weights.scale,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.stride(0),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("decode_step: no memory for its scratch")
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
