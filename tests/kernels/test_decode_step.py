"""The decode step in C++ against its reference on float64 inputs; see `agreement` for the rule."""

import importlib
from dataclasses import replace

import pytest
import torch
from mminfer_kernels import (
    BackendError,
    DecoderWeights,
    LayerCache,
    LayerWeights,
    decode_step,
    rotary_table,
)

from tests.kernels.agreement import assert_agrees

UNREAD = 1e9  # behind the end
HIDDEN, INNER, LAYERS, VOCABULARY = 48, 80, 3, 101


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """Of the step, however small it is."""
    monkeypatch.setattr(importlib.import_module("mminfer_kernels.decode_step.native"), "SERIAL_BYTES", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


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
    return DecoderWeights(
        tuple(layers), norm(HIDDEN), matrix(VOCABULARY, HIDDEN), heads, groups, size, 1e-6, size**-0.5
    )


def caches_of(batch, groups, size, entries, padded, dtype=torch.float64):
    """Layers of different lengths, with room; what lies behind the end must not be read."""
    out = []
    for layer in range(LAYERS):
        end = entries + 5 * layer
        keys, values = torch.full((2, batch, groups, end + 7, size), UNREAD, dtype=dtype)
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
    ends = {"norm": weights.norm.to(dtype), "head": weights.head.to(dtype)}
    return replace(weights, layers=layers, **ends), [
        LayerCache(*(x.clone() if isinstance(x, torch.Tensor) else x for x in to(c))) for c in caches
    ]


@pytest.mark.parametrize(
    ("heads", "groups", "size", "biased", "normed"),
    [(4, 4, 16, False, False), (6, 2, 32, True, False), (3, 1, 64, False, True), (2, 1, 80, True, True)],
)
@pytest.mark.parametrize(
    ("batch", "entries"),
    [
        (1, 0),
        (1, 63),
        (2, 300),
        *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((5, 129), (7, 1000), (16, 64))),
    ],
)
def test_native_is_as_right_as_pytorch_in_float32(isa, threads, batch, entries, heads, groups, size, biased, normed):
    weights, caches = (
        weights_of(heads, groups, size, biased, normed),
        caches_of(batch, groups, size, entries, batch > 1),
    )
    agrees(torch.randn(batch, HIDDEN, dtype=torch.float64), weights, caches)


def test_gates_far_from_zero(isa, threads):
    """SiLU of minus a thousand is 0, of plus a thousand itself."""
    weights = weights_of(4, 2, 16, False, False)
    steep = tuple(layer._replace(gate=1000 * layer.gate) for layer in weights.layers)
    agrees(torch.randn(2, HIDDEN, dtype=torch.float64), replace(weights, layers=steep), caches_of(2, 2, 16, 70, True))


def agrees(x, weights, caches):
    """Runs the step on float64, and in float32 both ways: logits and caches follow the rule of `agreement`."""
    (cos, sin), results = tables(len(x), weights.head_dim), []
    for dtype, backend in ((torch.float32, "native"), (torch.float32, "reference"), (torch.float64, "reference")):
        w, c = cast(weights, caches, dtype)
        logits = decode_step(x.to(dtype), cos.to(dtype), sin.to(dtype), w, c, backend=backend)
        for cache in c:
            assert (cache.keys[:, :, cache.end + 1 :] == UNREAD).all()
        held = [(cache.keys[:, :, : cache.end + 1], cache.values[:, :, : cache.end + 1]) for cache in c]
        results.append((logits, held))
    assert_agrees(*results)


def small(dtype=torch.float32):
    weights, caches = cast(weights_of(2, 1, 16, True, True), caches_of(2, 1, 16, 20, True), dtype)
    cos, sin = tables(2, 16, dtype)
    return {
        "hidden_states": torch.randn(2, HIDDEN, dtype=dtype), "cos": cos, "sin": sin, "weights": weights,
        "caches": caches,
    }  # fmt: skip


def test_only_the_column_at_the_end_is_written():
    arguments = small()
    before = [cache.keys.clone() for cache in arguments["caches"]]
    hidden = arguments["hidden_states"].clone()
    decode_step(**arguments)
    assert torch.equal(arguments["hidden_states"], hidden)
    for cache, keys in zip(arguments["caches"], before, strict=True):
        assert (cache.keys != keys)[:, :, cache.end].all()
        cache.keys[:, :, cache.end] = keys[:, :, cache.end]
        assert torch.equal(cache.keys, keys)


def test_what_does_not_fit_is_named():
    arguments = small()
    full = [cache._replace(end=cache.keys.shape[2]) for cache in arguments["caches"]]
    starts = [cache._replace(starts=cache.starts.int()) for cache in arguments["caches"]]
    wrong = {
        "hidden_states": {"hidden_states": torch.randn(2, 16)},
        "room for a column": {"caches": full},
        "starts is": {"caches": starts},
        "2 caches for 3 layers": {"caches": arguments["caches"][:2]},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            decode_step(**arguments | change)
    weights = arguments["weights"]
    layer = weights.layers[1]._replace(gate=torch.randn(INNER, HIDDEN + 1))
    with pytest.raises(ValueError, match="layer 1: gate is"):
        replace(weights, layers=(weights.layers[0], layer, weights.layers[2]))


@pytest.mark.parametrize("name", ["weights", "caches"])
@pytest.mark.parametrize("value", [None, 3, "x", {}, torch.ones(2)])
def test_what_is_no_weights_or_caches_is_a_type_error(name, value):
    with pytest.raises(TypeError, match=rf"{name} is {type(value).__name__}, wanted"):
        decode_step(**small() | {name: value})


def test_the_native_step_refuses_what_it_cannot_read(native):
    halved = small() | {"weights": small(torch.bfloat16)["weights"]}
    with pytest.raises(BackendError, match="dense float32 weights"):
        decode_step(**halved, backend="native")
    with pytest.raises(BackendError, match="contiguous"):
        arguments = small()
        caches = [c._replace(keys=c.keys.transpose(2, 3).contiguous().transpose(2, 3)) for c in arguments["caches"]]
        decode_step(**arguments | {"caches": caches}, backend="native")
