"""The decode step in C++ against its reference on float64 inputs."""

from dataclasses import replace

import pytest
import torch
from mminfer_kernels import (
    BackendError,
    DecoderWeights,
    LayerCache,
    LayerWeights,
    available_backends,
    decode_step,
    rotary_table,
)
from mminfer_kernels.backends import cpu_takes

native = pytest.mark.skipif(not cpu_takes(torch.empty(0)), reason="no C++ library here")
HIDDEN, INNER, LAYERS = 48, 80, 3


def weights_of(heads, groups, size, biased, normed, dtype=torch.float64):
    def matrix(out, width):
        return torch.randn(out, width, dtype=dtype) * width**-0.5

    def bias(out):
        return torch.randn(out, dtype=dtype) if biased else None

    def norm(width):
        return 1 + torch.rand(width, dtype=dtype)

    layers = []
    for _ in range(LAYERS):
        q, k, v = (part for n in (heads, groups, groups) for part in [(matrix(n * size, HIDDEN), bias(n * size))])
        head_norms = (norm(size), norm(size)) if normed else (None, None)
        o, gate, up = (matrix(HIDDEN, heads * size), bias(HIDDEN)), (matrix(INNER, HIDDEN), bias(INNER)), None
        up = (matrix(INNER, HIDDEN), bias(INNER))
        down = (matrix(HIDDEN, INNER), bias(HIDDEN))
        layers.append(LayerWeights(norm(HIDDEN), *q, *k, *v, *o, *head_norms, norm(HIDDEN), *gate, *up, *down))
    return DecoderWeights(tuple(layers), heads, groups, size, 1e-6, size**-0.5)


def caches_of(batch, groups, size, entries, padded, dtype=torch.float64):
    """Layers of different lengths, with room; what lies behind the end must not be read."""
    out = []
    for layer in range(LAYERS):
        end = entries + 5 * layer
        keys, values = torch.full((2, batch, groups, end + 7, size), 1e9, dtype=dtype)
        for buffer in (keys, values):
            buffer[:, :, :end] = torch.randn(batch, groups, end, size, dtype=dtype)
        starts = torch.arange(batch) * end // batch if padded else None
        out.append(LayerCache(keys, values, starts, end))
    return out


def tables(batch, size, dtype=torch.float64):
    position = torch.arange(batch).double()[:, None] * 7.25 + 1000
    cos, sin = rotary_table(position, 1e4 ** (-torch.arange(0, size, 2) / size), dtype=torch.float64)
    return cos[:, 0].to(dtype), sin[:, 0].to(dtype)


def cast(weights, caches, dtype):
    def to(values):
        return [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values]

    layers = tuple(LayerWeights(*to(layer)) for layer in weights.layers)
    return replace(weights, layers=layers), [LayerCache(*(x.clone() if isinstance(x, torch.Tensor) else x for x in to(c))) for c in caches]


@native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("heads", "groups", "size", "biased", "normed"),
    [(4, 4, 16, False, False), (6, 2, 32, True, False), (3, 1, 64, False, True), (2, 1, 80, True, True)],
)
@pytest.mark.parametrize(("batch", "entries"), [(1, 0), (1, 63), (2, 300), (5, 129), (7, 1000), (16, 64)])
def test_native_is_as_right_as_pytorch_in_float32(batch, entries, heads, groups, size, biased, normed, threads):
    weights, caches = weights_of(heads, groups, size, biased, normed), caches_of(batch, groups, size, entries, batch > 1)
    x, (cos, sin) = torch.randn(batch, HIDDEN, dtype=torch.float64), tables(batch, size)
    results = {}
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "native")):
        w, c = cast(weights, caches, dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = decode_step(x.to(dtype), cos.to(dtype), sin.to(dtype), w, c, backend=backend)
        finally:
            torch.set_num_threads(before)
        results[dtype, backend] = [out, *(t for cache in c for t in cache[:2])]
    truth = results[torch.float64, "reference"]
    for want, other, got in zip(truth, results[torch.float32, "reference"], results[torch.float32, "native"], strict=True):
        floor = 4 * torch.finfo(torch.float32).eps * want[want < 1e9].abs().max()
        assert (got - want).abs().max() <= 2 * (other - want).abs().max() + floor
