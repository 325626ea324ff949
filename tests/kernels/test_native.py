"""Every native op against its reference on float64 inputs; see `agreement` for the rule."""

import mminfer_kernels
import pytest
import torch
from mminfer_kernels import (
    add_rows,
    apply_rotary,
    available_backends,
    backend_for,
    best_match,
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

pytestmark = pytest.mark.usefixtures("native")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(4, 4), (6, 2), (3, 1), (14, 2)]  # H, G
SIZES = [8, 33, 72, 80, 96, 128, 256]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def qkv(heads, groups, queries, keys, size=16, dtype=torch.float32, batch=2):
    return [torch.randn(batch, *shape, size).to(dtype) for shape in ((heads, queries), (groups, keys), (groups, keys))]


def strided(x, how):
    """The same values, laid out so that a dimension, the last or all are not contiguous."""
    if how == "transposed" and x.dim() > 1:
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if how in ("last", "transposed"):
        return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]
    if how == "reversed":
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    wide = x.new_full([2 * n for n in x.shape], 7)
    every = tuple(slice(None, None, 2) for _ in x.shape)
    wide[every] = x
    return wide[every]


LAYOUTS = ["transposed", "last", "reversed", "every other"]


def test_auto_takes_native_but_for_float64():
    for op in mminfer_kernels.OPS:
        if "native" in available_backends(op):
            assert (backend_for(op, torch.zeros(2)) == "native") == (op != "add_rows")  # torch's own is faster there
            assert backend_for(op, torch.zeros(2).double()) == "reference"
            assert backend_for(op, torch.zeros(2, dtype=torch.int64)) != "native"
    assert {op for op in mminfer_kernels.OPS if "native" not in available_backends(op)} == {
        "gather_rows", "fit_masses", "k_centres", "top_places",
    }  # fmt: skip


@every_dtype
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("tokens", [1, 63, 200])
def test_prompt_attention(tokens, heads, groups, dtype):
    q, k, v = qkv(heads, groups, tokens, tokens, dtype=dtype)
    agree(prompt_attention, q, k, v)
    agree(prompt_attention_mass, q, k, v)
    agree(prompt_attention_peak, q, k, v)
    agree(prompt_attention, q, k, v, scale=0.3, window=max(1, tokens // 3))


@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_head_sizes(size, dtype):
    q, k, v = qkv(4, 2, 70, 70, size, dtype)
    agree(prompt_attention, q, k, v)
    agree(prompt_attention_mass, q, k, v, torch.rand(2, 70))
    agree(prompt_attention_peak, q[:, :, 30:], k, v, counted=30)
    agree(column_mass, q, k)
    agree(power_iterate, q, k)
    agree(decode_attention, q[:, :, :2], k, v, torch.tensor([0, 31]))


@every_dtype
@pytest.mark.parametrize("picked", [[0], [199], [0, 1, 2, 120, 121, 150, 199], range(5, 200, 3)])
def test_query_subsets(picked, dtype):
    picked = list(picked)
    q, k, v = qkv(6, 2, len(picked), 200, dtype=dtype)
    index = torch.tensor(picked)
    agree(prompt_attention, q, k, v, query_index=index)
    agree(prompt_attention, q, k, v, query_index=index, window=37)
    agree(prompt_attention_mass, q, k, v, query_index=index)
    agree(prompt_attention_peak, q, k, v, query_index=index, counted=130)
    agree(column_mass, q, k, query_index=index, temperature=0.5)
    agree(power_iterate, q, k, query_index=index)


@every_dtype
@pytest.mark.parametrize("size", [16, 33])
def test_log_mass(size, dtype):
    q, k, v = qkv(6, 2, 70, 150, size, dtype)
    log_mass = torch.randint(1, 9, (2, 150, 2)).float().log().transpose(1, 2)
    agree(prompt_attention_peak, q, k, v, counted=100, log_mass=log_mass)
    agree(prompt_attention, q, k, v, log_mass=log_mass, window=90)
    index = torch.randperm(150)[:70].sort().values
    agree(prompt_attention, q, k, v, query_index=index, log_mass=log_mass.to(dtype))
    plain = prompt_attention(q, k, v, backend="native")
    assert torch.equal(prompt_attention(q, k, v, log_mass=torch.zeros(2, 2, 150), backend="native"), plain)


def test_places_may_be_a_strided_view():
    q, k, v = qkv(2, 1, 40, 80)
    index = torch.arange(80)[::2]
    for op, inputs in ((prompt_attention, (q, k, v)), (column_mass, (q, k)), (power_iterate, (q, k))):
        agree(op, *inputs, query_index=index)


def test_last_queries():
    q, k, v = qkv(6, 2, 37, 150)
    agree(prompt_attention, q, k, v)
    agree(prompt_attention, q, k, v, window=9)
    agree(prompt_attention_mass, q, k, v, torch.rand(2, 6, 37))
    agree(power_iterate, q, k, iterations=3)


@every_dtype
@pytest.mark.parametrize("causal", [True, False])
def test_column_mass(causal, dtype):
    q, k, _ = qkv(6, 2, 130, 130, dtype=dtype)
    for weights in (None, torch.rand(2, 6, 130), torch.rand(2, 130)):
        agree(column_mass, q, k, weights, temperature=0.3, causal=causal)
    packed = torch.tensor([0, 1, 1, 64, 130])
    agree(column_mass, q, k, torch.rand(2, 130), causal=causal, cu_seqlens=packed)
    if not causal:
        agree(column_mass, q, k[:, :, :60], causal=False)


@every_dtype
@pytest.mark.parametrize("iterations", [0, 1, 2, 7])
def test_power_iterate(iterations, dtype):
    q, k, _ = qkv(6, 2, 150, 150, dtype=dtype)
    agree(power_iterate, q, k, iterations=iterations, temperature=1.0)


@every_dtype
@pytest.mark.parametrize(("heads", "groups"), [*HEADS, (32, 2)])
@pytest.mark.parametrize(("queries", "entries"), [(1, 1), (1, 63), (1, 1000), (5, 63), (19, 300)])
def test_decode_attention(queries, entries, heads, groups, dtype):
    q, k, v = qkv(heads, groups, queries, entries, dtype=dtype)
    agree(decode_attention, q, k, v)
    agree(decode_attention, q, k, v, torch.tensor([entries - queries, (entries - queries) // 3]), scale=0.4)


@every_dtype
@pytest.mark.parametrize(("rows", "targets", "columns"), [(1, 1, 5), (63, 1000, 16), (300, 63, 33), (9, 2100, 8)])
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_best_match(leading, rows, targets, columns, dtype):
    src, dst = torch.randn(*leading, rows, columns).to(dtype), torch.randn(*leading, targets, columns).to(dtype)
    agree_on_best_match(src, dst)


@every_dtype
@pytest.mark.parametrize(("targets", "sources", "columns"), [(1, 1, 1), (63, 300, 33), (300, 63, 1100), (5, 1000, 16)])
def test_merge_rows(targets, sources, columns, dtype):
    dst, src = torch.randn(2, targets, columns).to(dtype), torch.randn(2, sources, columns).to(dtype)
    index = torch.randint(targets, (2, sources))
    agree(merge_rows, dst, src, index)
    agree(merge_rows, dst, src, index, torch.rand(2, targets) + 0.5, torch.rand(2, sources))
    agree(merge_rows, dst[0], src[0], index[0], src_weight=torch.zeros(sources))


def test_merge_rows_of_two_dtypes():
    index = torch.randint(9, (40,))
    agree(merge_rows, torch.randn(9, 8).half(), torch.randn(40, 8), index)
    agree(merge_rows, torch.randn(9, 8).half(), torch.randn(40, 8).bfloat16(), index)


@every_dtype
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("rows", "picked", "columns"), [(1, 1, 1), (63, 40, 33), (63, 200, 300), (1000, 63, 16)])
def test_add_rows_and_gather_rms_norm(rows, picked, columns, batched, dtype):
    x, index = torch.randn(2, 3, rows, columns).to(dtype), torch.randint(rows, (2, 3, picked))
    index = index if batched else index[0, 0]
    agree(add_rows, x, index, torch.randn(2, 3, picked, columns).to(dtype))
    agree(gather_rms_norm, x, index, torch.rand(columns).to(dtype), eps=1e-5)
    agree(gather_rms_norm, x[0], index[0] if batched else index, torch.rand(columns).to(dtype))


@every_dtype
@pytest.mark.parametrize("shape", [(1,), (63, 33), (2, 1000, 17)])
def test_swiglu(shape, dtype):
    agree(swiglu, 4 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))


@every_dtype
def test_swiglu_far_out(dtype):
    """Beyond 2^128 the power is infinite, not what the exponent's bits run over to."""
    gate = torch.cat([torch.linspace(-400, 400, 1601), torch.tensor([-6e4, 6e4])]).to(dtype)
    agree(swiglu, gate, torch.ones_like(gate))


def positions(*shape):
    """Fractional ones up to 2**20, where they have a spacing of 1/256."""
    return torch.randint(2**28, shape).double() / 256


@every_dtype
@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize(("half", "sections"), [(32, None), (9, None), (32, [8, 12, 12]), (8, [2, 3, 3])])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary(interleaved, half, sections, tokens, dtype):
    q, k, _ = qkv(4, 2, tokens, tokens, 2 * half, dtype)
    inv_freq = 1e6 ** -(torch.arange(half) / half)
    position = positions(2, tokens) if sections is None else positions(3, 2, tokens)
    settings = {"attention_scaling": 1.3, "sections": sections, "interleaved": interleaved and sections is not None}
    agree(rotary, q, k, position, inv_freq, **settings)
    exact = rotary_table(position, inv_freq, dtype=torch.float64, backend="reference", **settings)
    tables = {x: rotary_table(position, inv_freq, dtype=dtype, backend=x, **settings) for x in ("native", "reference")}
    assert_agrees(tables["native"], tables["reference"], exact)
    for table in (tables["native"], tuple(x.float() for x in exact)):
        agree(apply_rotary, q, k, *table)


def test_apply_rotary_leading_sizes():
    inv_freq = 1e4 ** -(torch.arange(8) / 8)
    table = rotary_table(positions(2, 3, 20), inv_freq)
    q, k = torch.randn(2, 3, 4, 20, 16), torch.randn(2, 3, 2, 20, 16)
    agree(apply_rotary, q, k, *table)
    agree(apply_rotary, q, k, *(x[:1, :1] for x in table))
    agree(apply_rotary, q, k, *(x[1, 2] for x in table))
    agree(apply_rotary, q[0, 0], k[0, 0], *(x[1, 2] for x in table))


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_do_not_matter(how):
    """What is strided in memory gives what its contiguous copy gives."""
    q, k, v = qkv(6, 2, 70, 70, 24)
    x, rows, weight = torch.randn(3, 50, 24), torch.randn(3, 20, 24), torch.rand(3, 50) + 0.5
    index, votes, position = torch.randint(50, (3, 20)), torch.rand(2, 70), positions(2, 70)
    inv_freq, ends = 1e4 ** -(torch.arange(12) / 12), torch.tensor([4, 30])
    calls = {
        prompt_attention: (q, k, v),
        prompt_attention_mass: (q, k, v, votes),
        prompt_attention_peak: (q, k, v),
        column_mass: (q, k, votes),
        power_iterate: (q, k),
        decode_attention: (q[:, :, :3], k, v, ends),
        best_match: (rows, x),
        merge_rows: (x, rows, index, weight, weight[:, :20]),
        add_rows: (x, index, rows),
        gather_rms_norm: (x, index, weight[0, :24]),
        swiglu: (x, x.flip(1)),
        rotary: (q, k, position, inv_freq),
        rotary_table: (position, inv_freq),
        apply_rotary: (q, k, position.float()[..., None].expand(2, 70, 24), torch.rand(2, 70, 24)),
    }
    for op, inputs in calls.items():
        found = op(*(strided(x, how) for x in inputs), backend="native")
        wanted = op(*(x.contiguous() for x in inputs), backend="native")
        for ours, theirs in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, wanted)), strict=True):
            if op is best_match and ours.is_floating_point():  # BLAS sums other strides in another order
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(ours, theirs), op.__name__


@pytest.mark.parametrize("how", ["contiguous", *LAYOUTS])
def test_in_place_on_any_layout(how):
    x, index, rows = torch.randn(4, 3, 20, 8), torch.randint(20, (4, 3, 9)), torch.randn(4, 3, 9, 8)
    q, k = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8)
    position, inv_freq = positions(2, 20), 1e4 ** -(torch.arange(4) / 4)
    wanted = add_rows(x, index, rows, backend="reference")
    turned = rotary(q, k, position, inv_freq, backend="reference")
    if how != "contiguous":
        x, q, k = (strided(t, how) for t in (x, q, k))
    assert add_rows(x, index, rows, inplace=True, backend="native") is x
    torch.testing.assert_close(x, wanted)
    mminfer_kernels.rotary_(q, k, position, inv_freq, backend="native")
    torch.testing.assert_close((q, k), turned, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_large():
    """Many blocks, tiles and stretches, the last ones in part."""
    q, k, v = qkv(14, 2, 3000, 3000, 64, batch=1)
    agree(prompt_attention_mass, q, k, v)
    agree(prompt_attention_peak, q[:, :, 1500:], k, v, counted=1500)
    agree(power_iterate, q[:, :2], k, temperature=1.0)
    agree(decode_attention, q[:, :, -1:], k, v)
    agree(prompt_attention, *(x.bfloat16() for x in (q, k, v)), window=500)
    agree(best_match, torch.randn(700, 384), torch.randn(900, 384))
    agree(merge_rows, torch.randn(500, 896), torch.randn(2500, 896), torch.randint(500, (2500,)))
