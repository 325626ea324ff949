"""Properties of the Triton ops on random small shapes, besides the bar that all of them meet."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mminfer_kernels import (
    add_rows,
    apply_rotary,
    best_match,
    column_mass,
    decode_attention,
    gather_rms_norm,
    gather_rows,
    merge_rows,
    power_iterate,
    prompt_attention,
    prompt_attention_mass,
    prompt_attention_peak,
    rotary,
    rotary_table,
    swiglu,
)

from tests.kernels.triton_bar import dirty_memory, meets_the_bar

pytestmark = [pytest.mark.usefixtures(dirty_memory.__name__), pytest.mark.slow]

EXAMPLES = 20  # an op; the interpreter takes 50 to 200 ms for one

bounded = settings(
    deadline=None,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
seeds = st.integers(0, 2**16)


@st.composite
def attention(draw):
    """q, k, v and either no or ascending places of the queries among the keys."""
    torch.manual_seed(draw(seeds))
    groups, repeat, size = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    keys = draw(st.integers(1, 40))
    queries = draw(st.integers(1, keys))
    dtype = draw(dtypes)
    q = torch.randn(1, groups * repeat, queries, size).to(dtype)
    k, v = torch.randn(2, 1, groups, keys, size).to(dtype)
    return q, k, v, torch.randperm(keys)[:queries].sort().values if draw(st.booleans()) else None


@st.composite
def rows_of(draw, columns=40):
    """x [B, N, C], an index [K] or [B, K] into it, and rows [B, K, C]."""
    torch.manual_seed(draw(seeds))
    batch, rows, kept = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(0, 12))
    dtype, width = draw(dtypes), draw(st.integers(1, columns))
    index = torch.randint(rows, (batch, kept) if draw(st.booleans()) else (kept,))
    return torch.randn(batch, rows, width).to(dtype), index, torch.randn(batch, kept, width).to(dtype)


@bounded
@given(attention(), st.booleans(), st.floats(0.1, 4))
def test_column_mass_conserves_votes(inputs, causal, temperature):
    q, k, _, index = inputs
    weights = torch.rand(q.shape[:3])
    mass = meets_the_bar(column_mass, q, k, weights, temperature=temperature, causal=causal, query_index=index)
    torch.testing.assert_close(mass.sum(-1), weights.sum(-1))


@bounded
@given(attention(), st.integers(0, 3))
def test_power_iterate_conserves_no_more_than_it_had(inputs, iterations):
    q, k, _, index = inputs
    found = meets_the_bar(power_iterate, q, k, iterations, temperature=0.5, query_index=index, floor=1e-7)
    assert (found >= 0).all() and (found.sum(-1) <= 1 + 1e-5).all()


@bounded
@given(attention(), st.one_of(st.none(), st.integers(1, 50)))
def test_prompt_attention_is_a_mean_of_values(inputs, window):
    q, k, v, index = inputs
    meets_the_bar(prompt_attention, q, k, v, query_index=index, window=window)
    ones = prompt_attention(q, k, torch.ones_like(v), query_index=index, window=window, backend="triton")
    # Numerator and denominator are sums of up to N powers, rounded apart.
    torch.testing.assert_close(ones, torch.ones_like(q), rtol=0, atol=8 * torch.finfo(q.dtype).eps)


@bounded
@given(attention())
def test_prompt_attention_mass_is_both_ops(inputs):
    q, k, v, index = inputs
    out, mass = meets_the_bar(prompt_attention_mass, q, k, v, query_index=index)
    assert torch.equal(out, prompt_attention(q, k, v, query_index=index, backend="triton"))
    torch.testing.assert_close(mass, column_mass(q, k, query_index=index, backend="triton"))


@bounded
@given(attention(), st.data())
def test_prompt_attention_peak(inputs, data):
    q, k, v, index = inputs
    counted = data.draw(st.integers(0, k.shape[2]))
    out, peak = meets_the_bar(prompt_attention_peak, q, k, v, query_index=index, counted=counted)
    assert torch.equal(out, prompt_attention(q, k, v, query_index=index, backend="triton"))
    assert (peak >= 0).all() and (peak <= 1 + 1e-5).all()


@bounded
@given(attention(), st.data())
def test_decode_attention_ignores_what_lies_before_the_start(inputs, data):
    q, k, v, _ = inputs
    start = data.draw(st.integers(0, k.shape[2] - q.shape[2]))
    found = meets_the_bar(decode_attention, q, k, v, torch.tensor([start]))
    cut = decode_attention(q, k[:, :, start:], v[:, :, start:], backend="triton")
    torch.testing.assert_close(found, cut, rtol=0, atol=4 * torch.finfo(q.dtype).eps * v.abs().max().item())


@bounded
@given(rows_of(), st.integers(1, 40))
def test_best_match_does_not_mind_lengths(inputs, targets):
    src, dst = inputs[0], torch.randn(inputs[0].shape[0], targets, inputs[0].shape[-1] + 1).to(inputs[0].dtype)
    src = torch.cat([src, torch.randn(*src.shape[:-1], 1).to(src.dtype)], -1)  # in one dimension all match all
    found = meets_the_bar(best_match, src, dst, floor=5e-7)
    stretched = best_match(src * 2, dst * 4, backend="triton")
    assert torch.equal(stretched[1], found[1])
    torch.testing.assert_close(stretched[0], found[0])


@bounded
@given(rows_of())
def test_merge_rows_conserves_weight_and_weighted_sum(inputs):
    dst, index, src = inputs
    index = index.expand(src.shape[:-1])
    dst_weight, src_weight = torch.rand(dst.shape[:-1]) + 0.1, torch.rand(src.shape[:-1])
    merged, weight = meets_the_bar(merge_rows, dst, src, index, dst_weight, src_weight)
    torch.testing.assert_close(weight.sum(-1), dst_weight.sum(-1) + src_weight.sum(-1))
    if dst.dtype == torch.float32:
        before = (dst * dst_weight[..., None]).sum(-2) + (src * src_weight[..., None]).sum(-2)
        torch.testing.assert_close((merged * weight[..., None]).sum(-2), before, rtol=1e-4, atol=1e-5)


@bounded
@given(rows_of())
def test_gather_then_add_gives_back_what_was_added(inputs):
    x, index, rows = inputs
    meets_the_bar(add_rows, x, index, rows)
    gathered = gather_rows(x, index, backend="triton")
    assert torch.equal(gathered, gather_rows(x, index, backend="reference"))
    places = torch.arange(x.shape[1])
    assert torch.equal(gather_rows(x, places, backend="triton"), x)
    assert torch.equal(add_rows(torch.zeros_like(x), places, x, backend="triton"), x)


@bounded
@given(rows_of(), st.floats(1e-6, 1))
def test_gather_rms_norm_is_the_norm_of_gathered_rows(inputs, eps):
    x, index, _ = inputs
    weight = torch.randn(x.shape[-1]).to(x.dtype)
    found = meets_the_bar(gather_rms_norm, x, index, weight, eps)
    first = gather_rows(x, index, backend="triton")
    assert torch.equal(found, gather_rms_norm(first, torch.arange(first.shape[1]), weight, eps, backend="triton"))


@bounded
@given(rows_of(), st.floats(0.1, 30))
def test_swiglu_of_a_large_gate_is_the_product(inputs, scale):
    gate, _, _ = inputs
    gate = (gate * scale).to(gate.dtype)
    meets_the_bar(swiglu, gate, gate.flip(-1))
    assert torch.equal(swiglu(torch.full_like(gate, 64.0), gate, backend="triton"), gate * 64)


@bounded
@given(attention(), st.integers(0, 2**20), st.integers(0, 255), st.sampled_from([1e4, 1e6]), st.booleans())
def test_rotation_keeps_lengths(inputs, whole, fraction, base, several):
    x = inputs[0].repeat_interleave(2, -1)  # an even size
    half, tokens = x.shape[-1] // 2, x.shape[2]
    inv_freq = 1 / base ** (torch.arange(half) / half)
    position = torch.arange(tokens, dtype=torch.float64)[None] + whole + fraction / 256
    sections = [half // 3, half - half // 3] if several else None
    position = torch.stack([position, position / 2]) if several else position
    cos, sin = meets_the_bar(rotary_table, position, inv_freq, sections=sections, floor=1e-6)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos), rtol=0, atol=1e-6)
    meets_the_bar(apply_rotary, x, x[:, :1], cos, sin)
    found = meets_the_bar(rotary, x, x[:, :1], position, inv_freq, sections=sections)[0]
    length = x.float().norm(dim=-1)
    torch.testing.assert_close(found.float().norm(dim=-1), length, rtol=4 * torch.finfo(x.dtype).eps, atol=1e-6)
