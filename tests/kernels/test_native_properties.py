"""Native kernels on drawn shapes: as near to the truth as the reference is, and what each op promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mminfer_kernels import (
    add_rows,
    apply_rotary,
    column_mass,
    decode_attention,
    gather_rms_norm,
    merge_rows,
    power_iterate,
    prompt_attention,
    prompt_attention_mass,
    prompt_attention_peak,
    rotary,
    rotary_table,
    swiglu,
)

from tests.kernels.agreement import agree, agree_on_best_match, assert_agrees

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.slow]

drawn = settings(deadline=None, max_examples=200)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def attentions(draw):
    """q, k, v and the places of the queries, or None for the last ones."""
    groups, repeat, keys = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 90))
    places = draw(st.one_of(st.none(), st.sets(st.integers(0, keys - 1), min_size=1)))
    queries = draw(st.integers(1, keys)) if places is None else len(places)
    size, dtype, batch = draw(st.integers(1, 40)), draw(dtypes), draw(st.integers(1, 2))
    torch.manual_seed(draw(st.integers(0, 999)))
    shapes = (groups * repeat, queries), (groups, keys), (groups, keys)
    q, k, v = (torch.randn(batch, *shape, size).to(dtype) for shape in shapes)
    return q, k, v, None if places is None else torch.tensor(sorted(places))


@st.composite
def rows_of_two(draw, least=0):
    """Rows [B, T, C] and [B, S, C] of one dtype."""
    targets, sources, columns = draw(st.integers(1, 40)), draw(st.integers(least, 60)), draw(st.integers(3, 50))
    dtype, batch = draw(dtypes), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 999)))
    return torch.randn(batch, targets, columns).to(dtype), torch.randn(batch, sources, columns).to(dtype)


@st.composite
def turned(draw):
    """q, k, positions, frequencies and how they are dealt."""
    half, tokens, batch = draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.integers(1, 2))
    cut = sorted(draw(st.integers(0, half)) for _ in range(2))
    sections = draw(st.sampled_from([None, [cut[0], cut[1] - cut[0], half - cut[1]]]))
    dtype, most = draw(dtypes), draw(st.sampled_from([1, 1000, 2**20]))
    torch.manual_seed(draw(st.integers(0, 999)))
    q, k = torch.randn(batch, 4, tokens, 2 * half).to(dtype), torch.randn(batch, 2, tokens, 2 * half).to(dtype)
    position = torch.rand(*(() if sections is None else (3,)), batch, tokens).double() * most
    how = {"sections": sections, "interleaved": sections is not None and draw(st.booleans())}
    return q, k, position, 1e6 ** -(torch.arange(half) / half), how


@drawn
@given(attentions(), st.one_of(st.none(), st.integers(1, 100)), st.sampled_from([None, 0.1, 1.0]))
def test_prompt_attention(inputs, window, scale):
    q, k, v, places = inputs
    found = agree(prompt_attention, q, k, v, scale=scale, query_index=places, window=window)
    assert found.abs().max() <= v.abs().max()  # rows are means of values


@drawn
@given(attentions(), st.booleans())
def test_prompt_attention_mass(inputs, weighted):
    q, k, v, places = inputs
    weights = torch.rand(q.shape[:3]) if weighted else None
    found, mass = agree(prompt_attention_mass, q, k, v, weights, query_index=places)
    assert torch.equal(found, prompt_attention(q, k, v, query_index=places, backend="native"))
    votes = float(q.shape[2]) if weights is None else weights.sum(-1)
    torch.testing.assert_close(mass.sum(-1), torch.as_tensor(votes).expand(q.shape[:2]), rtol=1e-5, atol=1e-5)


@drawn
@given(attentions(), st.data())
def test_prompt_attention_peak(inputs, data):
    q, k, v, places = inputs
    counted = data.draw(st.integers(0, k.shape[2]))
    found, peak = agree(prompt_attention_peak, q, k, v, query_index=places, counted=counted)
    assert torch.equal(found, prompt_attention(q, k, v, query_index=places, backend="native"))
    assert (peak >= 0).all() and (peak <= 1 + 1e-6).all()


@drawn
@given(attentions(), st.booleans(), st.sampled_from([1.0, 0.1]))
def test_column_mass(inputs, causal, temperature):
    q, k, _, places = inputs
    mass = agree(column_mass, q, k, temperature=temperature, causal=causal, query_index=places if causal else None)
    torch.testing.assert_close(mass.sum(-1), torch.full(q.shape[:2], float(q.shape[2])), rtol=1e-5, atol=1e-5)
    assert (mass >= 0).all()


@drawn
@given(attentions(), st.integers(0, 7), st.sampled_from([1.0, 0.1]))
def test_power_iterate(inputs, iterations, temperature):
    q, k, _, places = inputs
    how = {"iterations": iterations, "temperature": temperature, "query_index": places}
    votes = agree(power_iterate, q, k, **how, least_size=1 / k.shape[2])  # of what a key starts with little may be left
    assert (votes >= 0).all() and (votes.sum(-1) <= 1 + 1e-5).all()


@drawn
@given(attentions(), st.data())
def test_decode_attention(inputs, data):
    q, k, v, _ = inputs
    spare = k.shape[2] - q.shape[2]
    starts = torch.tensor([data.draw(st.integers(-3, spare + 3)) for _ in range(len(q))])
    for b, start in enumerate(starts.clamp(0, spare)):
        k[b, :, :start] = v[b, :, :start] = 0.5
    found = agree(decode_attention, q, k, v, starts)
    for b, start in enumerate(starts.clamp(0, spare)):
        k[b, :, :start] = v[b, :, :start] = torch.nan
    assert torch.equal(decode_attention(q, k, v, starts, backend="native"), found)


@drawn
@given(rows_of_two())
def test_best_match(rows):
    dst, src = rows
    agree_on_best_match(src, dst)


@drawn
@given(rows_of_two(), st.booleans(), st.booleans())
def test_merge_rows(rows, weighted, voting):
    dst, src = rows
    index = torch.randint(dst.shape[1], src.shape[:2])
    weights = torch.rand(dst.shape[:2]) + 0.1 if weighted else None, torch.rand(src.shape[:2]) if voting else None
    merged, total = agree(merge_rows, dst, src, index, *weights)
    before = sum(float(x.shape[1] * len(x) if w is None else w.sum()) for x, w in zip((dst, src), weights, strict=True))
    assert float(total.sum()) == pytest.approx(before, rel=1e-5)
    alone = torch.ones(dst.shape[:2], dtype=torch.bool).scatter_(1, index, False)
    if weights[0] is None:
        assert torch.equal(merged[alone], dst[alone])


@drawn
@given(rows_of_two(), st.booleans())
def test_add_rows(rows, batched):
    x, added = rows
    index = torch.randint(x.shape[1], added.shape[:2] if batched else added.shape[1:2])
    # Rows that meet in one place are added one by one in their dtype: each step rounds a sum that the next may cancel.
    passed = add_rows(x.double().abs(), index, added.double().abs(), backend="reference")
    found = agree(add_rows, x, index, added, least_size=float(passed.max()) if passed.numel() else 0.0)
    other = torch.ones(x.shape[:2], dtype=torch.bool).scatter_(1, index.expand(added.shape[:2]), False)
    assert torch.equal(found[other], x[other])


@drawn
@given(rows_of_two(), st.booleans())
def test_gather_rms_norm(rows, batched):
    x, picked = rows
    index = torch.randint(x.shape[1], picked.shape[:2] if batched else picked.shape[1:2])
    found = agree(gather_rms_norm, x, index, torch.rand(x.shape[2]).to(x.dtype))
    assert found.shape == picked.shape


@drawn
@given(rows_of_two(least=1), st.sampled_from([1, 30, 1000]))
def test_swiglu(rows, factor):
    gate = factor * rows[1]
    agree(swiglu, gate, rows[1].flip(-1))


@drawn
@given(turned(), st.sampled_from([1.0, 0.7]))
def test_rotary(inputs, scaling):
    q, k, position, inv_freq, how = inputs
    found = agree(rotary, q, k, position, inv_freq, scaling, **how)
    for ours, given_ in zip(found, (q, k), strict=True):
        tolerance = 8 * torch.finfo(q.dtype).eps
        torch.testing.assert_close(
            ours.float().norm(dim=-1), scaling * given_.float().norm(dim=-1), rtol=tolerance, atol=tolerance
        )


@drawn
@given(turned(), dtypes)
def test_rotary_table(inputs, dtype):
    _, _, position, inv_freq, how = inputs
    tables = [
        rotary_table(position, inv_freq, dtype=kind, backend=backend, **how)
        for kind, backend in ((dtype, "native"), (dtype, "reference"), (torch.float64, "reference"))
    ]
    assert_agrees(*tables)
    half = inv_freq.shape[0]
    assert all(torch.equal(x[..., :half], x[..., half:]) for x in tables[0])


@drawn
@given(turned(), st.booleans())
def test_apply_rotary(inputs, in_float32):
    q, k, position, inv_freq, how = inputs
    dtype = torch.float32 if in_float32 else q.dtype
    table = rotary_table(position, inv_freq, dtype=dtype, backend="native", **how)
    agree(apply_rotary, q, k, *table)
