"""The decode step in C++ on the CPU: all layers in one call, float32."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mminfer_kernels.decode_step.caches import LayerCache, PackedLayerCache
from mminfer_kernels.dispatch import BackendError
from mminfer_kernels.native import call, pointer

# A step that reads no more takes half a millisecond in one thread. Two would save a third of that, but where the system
# gives the second one no core at once, each step waits for milliseconds.
SERIAL_BYTES = 16 << 20

if TYPE_CHECKING:
    from mminfer_kernels.decode_step import DecoderWeights


def decode_step(
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: DecoderWeights,
    caches: Sequence[LayerCache | PackedLayerCache],
) -> Tensor:
    """See `mminfer_kernels.decode_step`."""
    _check(hidden_states, cos, sin, weights, caches)
    hidden_states = hidden_states.clone(memory_format=torch.contiguous_format)  # it is added to on the way
    logits = hidden_states.new_empty(len(hidden_states), len(weights.head))
    if not len(hidden_states):
        return logits
    words: list[int] = []
    for cache in caches:
        words += _cache_words(cache)
    held = weights.held
    head = held.norm.data_ptr(), held.head.data_ptr(), logits.data_ptr()
    hidden, inner = weights.sizes
    batch, vocabulary = logits.shape
    shape = batch, len(caches), hidden, weights.heads, weights.groups, weights.head_dim, inner, vocabulary
    read = weights.nbytes + sum(8 * cache.keys.numel() for cache in caches)
    call(
        "decode_step",
        weights.pointers,
        _words(words),
        _words(head),
        _words(shape),
        ctypes.c_float(weights.eps),
        ctypes.c_float(weights.scale),
        pointer(cos),
        pointer(sin),
        ctypes.c_int64(cos.stride(0)),
        pointer(hidden_states),
        ctypes.c_int32(1 if read <= SERIAL_BYTES else torch.get_num_threads()),
    )
    return logits


def _cache_words(cache: LayerCache | PackedLayerCache) -> tuple[int, ...]:
    """`StepCache` of the C++."""
    if isinstance(cache, PackedLayerCache):
        keys, values, segments, added, log_mass = cache
        log_masses = 0 if log_mass is None else log_mass.data_ptr()
        return keys.data_ptr(), values.data_ptr(), log_masses, 0, *segments.pointers, added, 0
    keys, values, starts, end = cache
    starting = 0 if starts is None else starts.data_ptr()
    return keys.data_ptr(), values.data_ptr(), 0, starting, 0, 0, end, keys.shape[2]


def _words(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _check(
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: DecoderWeights,
    caches: Sequence[LayerCache | PackedLayerCache],
) -> None:
    if not weights.fits_native or hidden_states.dtype != torch.float32:
        raise BackendError("decode_step: C++ takes dense float32 weights in sizes that are multiples of 16")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.stride() != sin.stride() or cos.stride(1) != 1:
        raise BackendError("decode_step: C++ takes cos and sin in float32, dense and laid out alike")
    for cache in caches:  # in the dtype of hidden_states, as all ops check
        beside = cache.log_mass if isinstance(cache, PackedLayerCache) else cache.starts
        whole = cache.keys.is_contiguous() and cache.values.is_contiguous()
        if not whole or (beside is not None and not beside.is_contiguous()):
            raise BackendError("decode_step: C++ takes contiguous float32 caches")
