"""The decode step in C++ on the CPU: all layers in one call, float32."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mminfer_kernels.dispatch import BackendError
from mminfer_kernels.native import call, pointer

# A step that reads no more takes half a millisecond in one thread. Two would save a third of that, but where the system
# gives the second one no core at once, each step waits for milliseconds.
SERIAL_BYTES = 16 << 20

if TYPE_CHECKING:
    from mminfer_kernels.decode_step import DecoderWeights, LayerCache


def decode_step(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, weights: DecoderWeights, caches: Sequence[LayerCache]
) -> Tensor:
    """See `mminfer_kernels.decode_step`."""
    _check(hidden_states, cos, sin, weights, caches)
    hidden_states = hidden_states.clone(memory_format=torch.contiguous_format)  # it is added to on the way
    logits = hidden_states.new_empty(len(hidden_states), len(weights.head))
    if not len(hidden_states):
        return logits
    words: list[int] = []
    for keys, values, starts, end in caches:
        words += keys.data_ptr(), values.data_ptr(), 0 if starts is None else starts.data_ptr(), end, keys.shape[2]
    held = weights.held
    head = held.norm.data_ptr(), held.head.data_ptr(), logits.data_ptr()
    hidden, inner = weights.sizes
    batch, vocabulary = logits.shape
    shape = batch, len(caches), hidden, weights.heads, weights.groups, weights.head_dim, inner, vocabulary
    read = weights.nbytes + sum(8 * keys.numel() for keys, *_ in caches)
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


def _words(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _check(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, weights: DecoderWeights, caches: Sequence[LayerCache]
) -> None:
    if not weights.fits_native or hidden_states.dtype != torch.float32:
        raise BackendError("decode_step: C++ takes dense float32 weights in sizes that are multiples of 16")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.stride() != sin.stride() or cos.stride(1) != 1:
        raise BackendError("decode_step: C++ takes cos and sin in float32, dense and laid out alike")
    for keys, values, starts, _ in caches:  # in the dtype of hidden_states, as all ops check
        whole = keys.is_contiguous() and values.is_contiguous() and (starts is None or starts.is_contiguous())
        if not whole:
            raise BackendError("decode_step: C++ takes contiguous float32 caches")
