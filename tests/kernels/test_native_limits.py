"""What native kernels must not do: read or write elsewhere, let garbage through, depend on threads or lanes."""

from contextlib import contextmanager

import pytest
import torch
from mminfer_kernels import (
    add_rows,
    apply_rotary,
    best_match,
    column_mass,
    decode_attention,
    gather_rms_norm,
    merge_rows,
    packed_prompt_attention,
    power_iterate,
    prompt_attention,
    prompt_attention_mass,
    prompt_attention_peak,
    rotary,
    rotary_table,
    swiglu,
)

from tests.kernels.agreement import agree

pytestmark = pytest.mark.usefixtures("native")

HUGE = 1e30


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def qkv(heads, groups, queries, keys, size=16, batch=2):
    return [torch.randn(batch, *shape, size) for shape in ((heads, queries), (groups, keys), (groups, keys))]


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, HUGE, -HUGE])
@pytest.mark.parametrize("entries", [50, 2000])
@pytest.mark.parametrize("queries", [1, 3])
def test_what_lies_before_a_row_starts_does_not_leak(queries, entries, garbage):
    """Not even as 0 * NaN."""
    q, k, v = qkv(4, 2, queries, entries)
    starts = torch.tensor([20, entries - queries])
    wanted = [decode_attention(q[b : b + 1], k[b : b + 1, :, s:], v[b : b + 1, :, s:]) for b, s in enumerate(starts)]
    for b, start in enumerate(starts):
        k[b, :, :start], v[b, :, :start] = garbage, garbage
    found = decode_attention(q, k, v, starts, backend="native")
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("queries", [1, 3])
def test_starts_outside_count_as_the_nearest(queries, backend):
    q, k, v = qkv(4, 2, queries, 40)
    wanted = decode_attention(q, k, v, torch.tensor([0, 40 - queries]), backend=backend)
    for starts in ([-1, 40 - queries + 1], [-(2**40), 2**40]):
        assert torch.equal(decode_attention(q, k, v, torch.tensor(starts), backend=backend), wanted)


@pytest.mark.parametrize("queries", [2, 20])
def test_decode_does_not_see_behind_a_query(queries):
    q, k, v = qkv(4, 2, queries, 90)
    wanted = decode_attention(q, k, v, backend="native")
    k[:, :, -1], v[:, :, -1] = HUGE, HUGE
    found = decode_attention(q, k, v, backend="native")
    assert torch.equal(found[:, :, :-1], wanted[:, :, :-1])


@pytest.mark.parametrize("place", [1, 40, 63, 64, 149])
def test_prompt_does_not_see_behind_a_query(place):
    q, k, v = qkv(6, 2, 150, 150)
    wanted = prompt_attention_mass(q, k, v, backend="native")[0][:, :, :place]
    masses = [op(q[:, :, :place], k[:, :, :place], backend="native") for op in (column_mass, power_iterate)]
    k[:, :, place:], v[:, :, place:] = HUGE, HUGE
    assert torch.equal(prompt_attention(q, k, v, backend="native")[:, :, :place], wanted)
    votes = (torch.arange(150) < place).float().expand(2, 150)
    found, mass = prompt_attention_mass(q, k, v, votes, backend="native")
    assert torch.equal(found[:, :, :place], wanted)
    torch.testing.assert_close(mass[:, :, :place], masses[0])
    short = [x[:, :, :place].clone() for x in (q, k, v)]
    peak = prompt_attention_peak(q[:, :, :place], k, v, query_index=torch.arange(place), backend="native")[1]
    assert torch.equal(peak[..., :place], prompt_attention_peak(*short, backend="native")[1])
    assert (peak[..., place:] == 0).all()
    index = torch.arange(place)
    q, k, v = q[:, :, :place], torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    k[:, :, :place], v[:, :, :place] = torch.randn_like(k[:, :, :place]), torch.randn_like(v[:, :, :place])
    calls = [(op, (k, v)) for op in (prompt_attention, prompt_attention_mass, prompt_attention_peak)]
    for op, inputs in (*calls, (power_iterate, (k,))):
        found = op(q, *inputs, query_index=index, backend="native")
        assert all(x.isfinite().all() for x in (found if isinstance(found, tuple) else (found,)))


def test_window_does_not_see_before_it():
    q, k, v = qkv(6, 2, 150, 150)
    wanted = prompt_attention(q, k, v, window=20, backend="native")
    k[:, :, :100], v[:, :, :100] = HUGE, HUGE
    found = prompt_attention(q, k, v, window=20, backend="native")
    assert torch.equal(found[:, :, 120:], wanted[:, :, 120:])


@pytest.mark.parametrize("place", [-1, -9, 6, 2**40])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places_outside_are_an_error(dtype, batched, place):
    x, rows = torch.zeros(2, 6, 4, dtype=dtype), torch.zeros(2, 3, 4, dtype=dtype)
    index = torch.tensor([[0, 1, 5], [2, place, 5]])
    only = index if batched else index[1]
    wanted = "wanted places from 0 to 5"
    with pytest.raises(IndexError, match=wanted):
        merge_rows(x, rows, index, backend="native")
    with pytest.raises(IndexError, match=wanted):
        merge_rows(x.half(), rows.float(), index, backend="native")
    with pytest.raises(IndexError, match=wanted):
        add_rows(x, only, rows, inplace=True, backend="native")
    with pytest.raises(IndexError, match=wanted):
        gather_rms_norm(x, only, x[0, 0], backend="native")


def test_no_row_has_no_place():
    x, index = torch.zeros(2, 0, 4), torch.zeros(2, 3, dtype=torch.int64)
    for call in (
        lambda: merge_rows(x, torch.zeros(2, 3, 4), index, backend="native"),
        lambda: add_rows(x, index, torch.zeros(2, 3, 4), backend="native"),
        lambda: gather_rms_norm(x, index, torch.zeros(4), backend="native"),
    ):
        with pytest.raises(IndexError, match="wanted places from 0"):
            call()


@pytest.mark.parametrize("batch", [0, 2])
def test_empty_inputs(batch):
    q, k, v = qkv(4, 2, 0, 9, batch=batch)
    full = qkv(4, 2, 9, 9, batch=0)
    for op in (prompt_attention, prompt_attention_mass, prompt_attention_peak, decode_attention):
        agree(op, q, k, v)
        agree(op, *full)
    for op in (column_mass, power_iterate):
        agree(op, q, k)
        agree(op, *full[:2])
    agree(column_mass, *full[:2], cu_seqlens=torch.tensor([0, 4, 9]))
    none = torch.zeros(batch, 0, dtype=torch.int64)
    agree(best_match, torch.randn(batch, 0, 8), torch.randn(batch, 3, 8))
    for columns in (0, 8):
        x, rows = torch.randn(batch, 5, columns), torch.randn(batch, 0, columns)
        agree(merge_rows, x, rows, none)
        agree(merge_rows, x, torch.randn(batch, 7, columns), torch.ones(batch, 7, dtype=torch.int64))
        agree(merge_rows, rows, rows, none)
        agree(add_rows, x, none, rows)
        agree(gather_rms_norm, x, none, torch.randn(columns))
    nothing = torch.randn(batch, 3, 0, 8)
    agree(add_rows, nothing, torch.zeros(batch, 3, 0, dtype=torch.int64), nothing)
    agree(swiglu, nothing, nothing)
    position, inv_freq = torch.zeros(batch, 0).double(), torch.ones(8)
    q, k = torch.randn(batch, 4, 0, 16), torch.randn(batch, 2, 0, 16)
    agree(rotary, q, k, position, inv_freq)
    agree(apply_rotary, q, k, *rotary_table(position, inv_freq, backend="native"))


def every_op(batch=2, tokens=150, size=24):
    """Calls of each op, by name, on inputs large enough for several units of work."""
    q, k, v = qkv(6, 2, tokens, tokens, size, batch)
    x, rows, weight = torch.randn(2, 90, 600), torch.randn(2, 300, 600), torch.rand(600)
    index = torch.randint(90, (2, 300))
    position, inv_freq = torch.rand(batch, tokens).double() * 1e4, 1e4 ** -(torch.arange(size // 2) / (size // 2))
    table = rotary_table(position, inv_freq)
    return {
        "prompt_attention": lambda **to: prompt_attention(q, k, v, window=50, **to),
        "prompt_attention_mass": lambda **to: prompt_attention_mass(q, k, v, **to),
        "prompt_attention_peak": lambda **to: prompt_attention_peak(q, k, v, counted=tokens // 2, **to),
        "packed_prompt_attention": lambda **to: packed_prompt_attention(
            q[:1], k[0, 0], v[0, 0], *(torch.tensor(x) for x in ([0, 0], [tokens, tokens])), **to
        ),
        "column_mass": lambda **to: column_mass(q, k, **to),
        "power_iterate": lambda **to: power_iterate(q, k, **to),
        "decode_attention": lambda **to: decode_attention(q[:, :, -3:], k, v, torch.tensor([7] * batch), **to),
        "best_match": lambda **to: best_match(rows, x, **to),
        "merge_rows": lambda **to: merge_rows(x, rows, index, torch.ones(2, 90), **to),
        "add_rows": lambda **to: add_rows(x, index, rows, **to),
        "gather_rms_norm": lambda **to: gather_rms_norm(x, index, weight, **to),
        "swiglu": lambda **to: swiglu(rows, rows, **to),
        "rotary": lambda **to: rotary(q, k, position, inv_freq, **to),
        "rotary_table": lambda **to: rotary_table(position, inv_freq, **to),
        "apply_rotary": lambda **to: apply_rotary(q, k, *table, **to),
    }


# Sums over queries are split by the number of threads; so are the keys of a long cache.
SPLIT = {"column_mass", "prompt_attention_mass", "decode_attention"}


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", every_op())
def test_threads_do_not_matter(name):
    run = every_op(tokens=700)[name]
    with threads(1):
        wanted = as_tuple(run(backend="native"))
    for count in (2, 5):
        with threads(count):
            found, again = as_tuple(run(backend="native")), as_tuple(run(backend="native"))
        for one, other, alone in zip(found, again, wanted, strict=True):
            assert torch.equal(one, other)
            if name not in SPLIT:
                assert torch.equal(one, alone)
            torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-6)
    if name == "prompt_attention_mass":
        assert torch.equal(found[0], wanted[0])


def test_a_long_cache_is_split_over_threads():
    q, k, v = qkv(4, 2, 1, 9000, 64, batch=1)
    for count in (1, 2, 5):
        with threads(count):
            found = agree(decode_attention, q, k, v, torch.tensor([4100]))
            assert torch.equal(found, decode_attention(q, k, v, torch.tensor([4100]), backend="native"))


@pytest.mark.parametrize("size", [24, 34, 80])
def test_every_instruction_set(isa, size):
    """Head sizes that are not a multiple of the lanes among them."""
    q, k, v = qkv(6, 2, 77, 77, size)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b, c = q.to(dtype), k.to(dtype), v.to(dtype)
        agree(prompt_attention, a, b, c, window=30)
        agree(prompt_attention_mass, a, b, c, torch.rand(2, 77), query_index=torch.arange(77))
        agree(prompt_attention_peak, a[:, :, 37:], b, c, counted=41)
        agree(column_mass, a, b, causal=False)
        agree(power_iterate, a, b)
        agree(decode_attention, a[:, :, :3], b, c, torch.tensor([0, 40]))
        x, rows, index = a[:, 0], b[:, 1], torch.randint(77, (2, 77))
        agree(best_match, x, rows)
        agree(merge_rows, x, rows, index, torch.rand(2, 77) + 0.5)
        agree(add_rows, x, index, rows)
        agree(gather_rms_norm, x, index, a[0, 0, 0])
        agree(swiglu, 40 * x, rows)
        agree(swiglu, torch.linspace(-400, 400, 1601).to(dtype), torch.ones(1601, dtype=dtype))
        position, inv_freq = torch.rand(2, 77).double() * 2**20, 1e4 ** -(torch.arange(size // 2) / (size // 2))
        agree(rotary, a, b, position, inv_freq)
        agree(apply_rotary, a, b, *rotary_table(position, inv_freq, backend="native"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_as_torch_does(isa, dtype):
    """Every 16-bit float comes back from an addition of zero; sums of two are rounded to nearest, ties to even."""

    def normal(x):  # to the kernels denormals are zero
        return x.isfinite() & ((x.abs() >= torch.finfo(torch.float32).tiny) | (x == 0))

    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
    every = every[normal(every.float())][None]
    first = torch.zeros(1, dtype=torch.int64)
    assert torch.equal(add_rows(torch.zeros_like(every), first, every, backend="native"), every)
    other = every[:, torch.randperm(every.shape[1])]
    total = every.float() + other.float()
    found = add_rows(every, first, other, backend="native")
    assert torch.equal(found[normal(total)], total.to(dtype)[normal(total)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_is_rounded_as_torch_does(isa, dtype):
    wide = torch.randn(4000) * 10 ** torch.linspace(-9, 5, 4000)
    edges = [65503.9, 65519.99, 65520.0, 7e4, -7e4, 2.0**-25, 3 * 2.0**-26, 2.0**-14, 0.99999 * 2.0**-14, 3e38]
    table = torch.cat([wide, torch.tensor(edges)]).repeat(2)[None]
    x = (torch.arange(table.shape[1]) < len(wide) + len(edges)).to(dtype)[None, None]  # ones, then zeros
    found = apply_rotary(x, x, table, table, backend="native")[0]  # 1 * cos - 0 * sin, 0 * cos + 1 * sin
    assert torch.equal(found[0], table.to(dtype))
