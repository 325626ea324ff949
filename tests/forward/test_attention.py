"""Prompt attention against the whole score matrix in float64, and the seam to the host's modules."""

import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mminfer_kernels import prompt_attention, record_backends
from mminfer_kernels.prompt_attention import reference as sdpa
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mminfer import InferenceConfig, patched
from mminfer.forward.attention import NAME, Visibility, causal_attention, routed_attention
from mminfer.metrics.flops import causal_pairs, measured_flops
from tests.tiny import tiny_inputs, tiny_model


def qkv(queries, keys, heads=4, groups=2, size=8, dtype=torch.float32):
    q = torch.randn(1, heads, queries, size, dtype=dtype)
    return q, *torch.randn(2, 1, groups, keys, size, dtype=dtype).unbind()


def dense(q, k, v, scale, places=None, window=None):
    """The rule, with the whole matrix, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    places = torch.arange(k.shape[2]) if places is None else places
    age = places[:, None] - torch.arange(k.shape[2])
    seen = age >= 0 if window is None else (age >= 0) & (age < window)
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def check(q, k, v, scale=0.3, places=None, window=None):
    wanted = dense(q, k, v, scale, places, window)
    blocked = prompt_attention(q, k, v, scale, places, window, backend="reference")
    for out in (causal_attention(q, k, v, scale, Visibility(places, window)), blocked):
        assert out.shape == q.shape and out.dtype == q.dtype
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=2e-6)


@pytest.fixture(params=[None, (7, 1 << 24), (512, 100), (512, 1)], ids=["default", "rows", "mask", "one row"])
def _blocks(request, monkeypatch):
    """Blocks of seven rows, blocks as small as the mask may be, and a row at a time."""
    if request.param is not None:
        monkeypatch.setattr(sdpa, "BLOCK_ROWS", request.param[0])
        monkeypatch.setattr(sdpa, "MASK_ELEMENTS", request.param[1])


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("window", [None, 1, 5, 62, 63, 64, 1000])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_every_token_asks(heads, groups, window):
    check(*qkv(63, 63, heads, groups), window=window)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("window", [None, 1, 9, 40])
@pytest.mark.parametrize(
    "places",
    [
        [0],  # the first token alone
        [62],  # the last
        list(range(40, 63)),  # a later turn
        [3, 4, 20, 41, 42, 61],  # text among skipped images
        list(range(63)),
        list(range(0, 63, 2)),
    ],
    ids=["first", "last", "tail", "some", "all", "every other"],
)
def test_some_tokens_ask(places, window):
    places = torch.tensor(places)
    check(*qkv(len(places), 63), places=places, window=window)


@settings(deadline=None, max_examples=40)
@given(
    keys=st.integers(1, 60),
    window=st.none() | st.integers(1, 70),
    rows=st.integers(1, 20),
    elements=st.integers(1, 500),
    data=st.data(),
)
def test_any_queries_and_any_blocks(keys, window, rows, elements, data):
    asked = data.draw(st.lists(st.integers(0, keys - 1), unique=True, min_size=1).map(sorted))
    torch.manual_seed(keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "BLOCK_ROWS", rows)
        patch.setattr(sdpa, "MASK_ELEMENTS", elements)
        check(*qkv(len(asked), keys), places=torch.tensor(asked), window=window)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("keys", [1, 9])
def test_nobody_asks(keys, window):
    q, k, v = qkv(0, keys)
    out = causal_attention(q, k, v, 0.3, Visibility(torch.empty(0, dtype=torch.int64), window))
    assert out.shape == (1, 4, 0, 8)


@pytest.mark.parametrize("window", [None, 4])
def test_a_sequence_without_a_row(window):
    """Pruning may leave a sequence of a batch without a row."""
    q, k, v, places = *qkv(0, 0), torch.empty(0, dtype=torch.int64)
    assert causal_attention(q, k, v, 0.3, Visibility(places, window)).shape == (1, 4, 0, 8)


def test_one_token():
    q, k, v = qkv(1, 1)
    torch.testing.assert_close(causal_attention(q, k, v, 0.3), v.repeat_interleave(2, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    q, k, v = qkv(40, 63, dtype=dtype)
    places = torch.arange(23, 63)
    out, wanted = causal_attention(q, k, v, 0.3, Visibility(places)), dense(q, k, v, 0.3, places)
    assert out.dtype == dtype
    error, floor = (out.double() - wanted).abs().max(), (wanted.to(dtype).double() - wanted).abs().max()
    assert error <= 4 * floor


def test_non_contiguous_views():
    q, k, v = (torch.randn(1, 63, heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    check(q, k, v)
    check(q[:, :, 50:], k, v, places=torch.arange(50, 63), window=7)


def fake_config(name="sdpa"):
    return SimpleNamespace(_attn_implementation_internal=name)


def routed_in(config):
    return config._attn_implementation_internal == NAME and NAME in ALL_ATTENTION_FUNCTIONS


def untouched(*configs):
    names = [config._attn_implementation_internal for config in configs]
    return names == ["sdpa"] * len(configs) and NAME not in ALL_ATTENTION_FUNCTIONS


def test_routing_is_undone():
    config, before = fake_config(), set(ALL_ATTENTION_FUNCTIONS)
    with routed_attention(config):
        assert routed_in(config)
    assert untouched(config) and set(ALL_ATTENTION_FUNCTIONS) == before


def test_routing_is_undone_when_something_raises():
    config = fake_config()
    with pytest.raises(KeyboardInterrupt), routed_attention(config):
        raise KeyboardInterrupt
    assert untouched(config)


def test_routing_in_a_failing_pass_leaves_the_model_as_it_was():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[5]])
    host = model(**inputs).logits
    layer = model.base_model.language_model.layers[2]

    def fail(*args):
        raise RuntimeError("a failing layer")

    hooked, raises = (
        partial(layer.register_forward_pre_hook, fail),
        pytest.raises(RuntimeError, match="a failing layer"),
    )
    with patched(model, InferenceConfig()), hooked(), raises:
        model(**inputs)
    assert NAME not in ALL_ATTENTION_FUNCTIONS
    assert torch.equal(model(**inputs).logits, host)


def test_routing_nests():
    one, other = fake_config(), fake_config()
    with routed_attention(one):
        with routed_attention(other), routed_attention(one):
            assert routed_in(one) and routed_in(other)
        assert routed_in(one) and other._attn_implementation_internal == "sdpa"
    assert untouched(one, other)


def in_two_threads(first, second):
    """The second enters after the first and leaves after it; whether it was routed all the time."""
    entered, left, routed = threading.Event(), threading.Event(), []

    def work():
        with routed_attention(second):
            entered.set()
            left.wait(10)
            routed.append(routed_in(second))

    thread = threading.Thread(target=work)
    with routed_attention(first):
        thread.start()
        assert entered.wait(10)
    left.set()
    thread.join()
    return routed == [True]


def test_routing_of_two_models_in_two_threads():
    one, other = fake_config(), fake_config()
    assert in_two_threads(one, other)
    assert untouched(one, other)


def test_routing_of_one_model_in_two_threads():
    config = fake_config()
    assert in_two_threads(config, config)
    assert untouched(config)


def stand_in(q, k, v, *, softmax_scale, causal, window_size):
    """flash-attn as its documentation has it: [B, S, H, D], queries at the last places, window to the left."""
    assert causal
    queries, keys = q.shape[1], k.shape[1]
    age = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    seen = (age >= 0) & ((age <= window_size[0]) if window_size[0] >= 0 else True)
    repeat = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeat, 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * softmax_scale
    return torch.einsum("bhst,bthd->bshd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 9), (1, 5)])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_flash_attn_is_called_as_its_documentation_says(monkeypatch, queries, keys, window):
    q, k, v = torch.randn(1, 4, queries, 8), torch.randn(1, 2, keys, 8), torch.randn(1, 2, keys, 8)
    wanted = causal_attention(q, k, v, 0.3, Visibility(None, window))
    monkeypatch.setattr("mminfer.forward.attention._flash_for", lambda q: stand_in)
    with record_backends() as backends:
        got = causal_attention(q, k, v, 0.3, Visibility(None, window))
    assert backends["prompt_attention"] == "flash-attn"
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    with measured_flops() as counter:  # which would not see it
        causal_attention(q, k, v, 0.3, Visibility(None, window))
    assert counter.get_total_flops() == 4 * 4 * 8 * causal_pairs(queries, keys - queries, window)
