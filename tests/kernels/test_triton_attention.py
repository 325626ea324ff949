"""The Triton kernels of attention, interpreted, against the reference in float64."""

import pytest
import torch
from mminfer_kernels import (
    column_mass,
    decode_attention,
    packed_decode_attention,
    power_iterate,
    prompt_attention,
    prompt_attention_mass,
    prompt_attention_peak,
)
from mminfer_kernels.column_mass import triton_kernel as column_kernel
from mminfer_kernels.decode_attention import triton_kernel as decode_kernel

from tests.kernels.triton_bar import dirty_memory, meets_the_bar

pytestmark = pytest.mark.usefixtures(dirty_memory.__name__)

DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
SHAPES = [  # H, G, S, N, D
    (2, 2, 1, 1, 64),
    (3, 1, 17, 17, 16),
    (4, 2, 63, 63, 24),
    pytest.param((6, 2, 33, 100, 80), marks=pytest.mark.slow),
]


def tensors(shape, dtype=torch.float32, batch=1):
    heads, groups, queries, keys, size = shape
    q = torch.randn(batch, heads, queries, size)
    k, v = torch.randn(batch, groups, keys, size), torch.randn(batch, groups, keys, size)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def some_places(queries, keys):
    return torch.randperm(keys)[:queries].sort().values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_column_mass(shape, dtype):
    q, k, _ = tensors(shape, dtype)
    found = meets_the_bar(column_mass, q, k, floor=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.full(q.shape[:2], float(q.shape[2])))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
def test_column_mass_of_weighted_places(per_head, causal):
    q, k, _ = tensors((6, 2, 33, 70, 16), batch=2)
    weights, index = torch.rand(2, 6, 33) if per_head else torch.rand(2, 33), some_places(33, 70)
    meets_the_bar(column_mass, q, k, weights, temperature=0.3, causal=causal, query_index=index, scale=0.2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ends", [[0, 70], [0, 1, 33, 33, 64, 70]])
def test_column_mass_of_packed_sequences(ends, causal):
    q, k, _ = tensors((4, 2, 70, 70, 16))
    meets_the_bar(column_mass, q, k, torch.rand(1, 70), causal=causal, cu_seqlens=torch.tensor(ends))


def test_votes_of_unit_size_in_a_strided_view():
    q, k, _ = tensors((4, 2, 40, 40, 16), batch=2)
    meets_the_bar(column_mass, q, k, torch.rand(2, 40, 4).transpose(1, 2))


@pytest.mark.parametrize("settled_rows", [4096, 32])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 63), pytest.param(65, 100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("chosen", [True, False])
def test_power_iterate(monkeypatch, chosen, queries, keys, settled_rows):
    """Both ways: all iterations as passes, and rows settled in several blocks."""
    monkeypatch.setattr(column_kernel, "SETTLED_ROWS", settled_rows)
    q, k, _ = tensors((2, 1, queries, keys, 16))
    index = some_places(queries, keys) if chosen else None
    meets_the_bar(power_iterate, q, k, iterations=3, temperature=0.5, query_index=index, floor=1e-7)


@pytest.mark.slow
def test_power_iterate_with_more_votes_than_a_pass_casts(monkeypatch):
    monkeypatch.setattr(column_kernel, "SETTLED_ROWS", 32)
    q, k, _ = tensors((1, 1, 50, 50, 16))
    meets_the_bar(power_iterate, q, k, iterations=18, temperature=0.5, floor=1e-7)


def test_no_iterations_and_no_queries():
    q, k, _ = tensors((2, 1, 9, 9, 16))
    meets_the_bar(power_iterate, q, k, iterations=0)
    meets_the_bar(power_iterate, q[:, :, :0], k)
    meets_the_bar(column_mass, q[:, :, :0], k)
    meets_the_bar(prompt_attention_peak, q[:, :, :0], k, k, counted=5)
    assert torch.equal(prompt_attention(q[:, :, :0], k, k, backend="triton"), q[:, :, :0])
    meets_the_bar(decode_attention, q[:, :, :0], k, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prompt_attention(shape, dtype):
    meets_the_bar(prompt_attention, *tensors(shape, dtype))


@pytest.mark.parametrize("window", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 200)), 40])
@pytest.mark.parametrize("chosen", [True, False])
def test_prompt_attention_of_windows_and_places(chosen, window):
    q, k, v = tensors((6, 2, 45, 90, 16))
    meets_the_bar(prompt_attention, q, k, v, query_index=some_places(45, 90) if chosen else None, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [True, False])
def test_prompt_attention_mass(chosen, dtype):
    q, k, v = tensors((6, 2, 45, 90, 16), dtype)
    index = some_places(45, 90) if chosen else None
    meets_the_bar(prompt_attention_mass, q, k, v, torch.rand(1, 45), scale=0.4, query_index=index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counted", [None, 0, 33, pytest.param(58, marks=pytest.mark.slow)])
@pytest.mark.parametrize("chosen", [True, False])
def test_prompt_attention_peak(chosen, counted, dtype):
    """Keys that every query sees, and keys that some or none of them see."""
    q, k, v = tensors((6, 2, 27, 60, 24), dtype)
    index = some_places(27, 60) if chosen else None
    meets_the_bar(prompt_attention_peak, q, k, v, scale=0.4, query_index=index, counted=counted)


@pytest.mark.parametrize("chosen", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_log_mass(chosen):
    q, k, v = tensors((6, 2, 27, 60, 24), batch=2)
    given = {"query_index": some_places(27, 60) if chosen else None, "log_mass": 3 * torch.rand(2, 60, 2).mT}
    meets_the_bar(prompt_attention, q, k, v, window=20, **given)
    meets_the_bar(prompt_attention_peak, q, k, v, counted=50, **given)


def test_large_logits_overflow_nothing():
    q, k, v = tensors((2, 1, 40, 40, 16))
    floor = 1e-4  # logits of a thousand: half of the last place of one is 3e-5, in base 2 as in base e
    meets_the_bar(prompt_attention_mass, 20 * q, 20 * k, v, floor=floor)
    meets_the_bar(prompt_attention_peak, 20 * q, 20 * k, v, floor=floor)
    meets_the_bar(decode_attention, 20 * q[:, :, :1], 20 * k, v, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 1, 1, 80), (4, 2, 1, 130, 64), (6, 2, 5, 100, 24),
        pytest.param((40, 1, 2, 70, 16), marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize("padded", [True, False])
def test_decode_attention(monkeypatch, padded, shape, dtype):
    monkeypatch.setattr(decode_kernel, "PART_KEYS", 32)
    q, k, v = tensors(shape, dtype, batch=2)
    starts = torch.tensor([0, shape[3] - shape[2]]) if padded else None
    meets_the_bar(decode_attention, q, k, v, starts)


def test_decode_attention_of_one_part():
    meets_the_bar(
        decode_attention, *tensors((6, 2, 3, 90, 24), torch.float16, 2), torch.tensor([3, 50], dtype=torch.int32)
    )


def test_decode_attention_reads_nothing_before_a_row_starts(monkeypatch):
    monkeypatch.setattr(decode_kernel, "PART_KEYS", 32)
    q, k, v = tensors((4, 2, 3, 90, 16), batch=2)
    starts = torch.tensor([40, 0])
    wanted = decode_attention(q, k, v, starts, backend="reference")
    k[0, :, :40], v[0, :, :40] = torch.nan, torch.nan
    torch.testing.assert_close(decode_attention(q, k, v, starts, backend="triton"), wanted)


def segments(lengths):
    """First rows and lengths, in the reverse order of heads, with rows between them."""
    lengths = torch.tensor(lengths)
    backwards = (lengths + 2).flatten().flip(0).cumsum(0).flip(0).view(lengths.shape)
    return backwards - lengths, lengths, int(backwards.max()) + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "size"), [([[1]], 2, 80), ([[1, 130], [70, 3]], 6, 24), ([[33, 300]], 2, 16)]
)
@pytest.mark.parametrize("massed", [True, False])
def test_packed_decode_attention(monkeypatch, massed, lengths, heads, size, dtype):
    """The longest head is cut into more parts than are merged at a time."""
    monkeypatch.setattr(decode_kernel, "PART_KEYS", 32)
    monkeypatch.setattr(decode_kernel, "MOST_PARTS", 4)
    monkeypatch.setattr(decode_kernel, "_programs", lambda x: 200)
    first, lengths, rows = segments(lengths)
    q, keys, values = torch.randn(len(first), heads, 1, size), torch.randn(rows, size), torch.randn(rows, size)
    inputs = q.to(dtype), keys.to(dtype), values.to(dtype), first, lengths
    log_mass = 3 * torch.rand(rows) if massed else None
    found = meets_the_bar(packed_decode_attention, *inputs, log_mass=log_mass)
    bounded = packed_decode_attention(*inputs, log_mass=log_mass, longest=int(lengths.max()) + 7, backend="triton")
    torch.testing.assert_close(bounded, found)


def test_rows_of_no_head_are_not_read(monkeypatch):
    monkeypatch.setattr(decode_kernel, "PART_KEYS", 32)
    first, lengths, rows = segments([[40, 1, 90]])
    q, keys, values = torch.randn(1, 3, 1, 16), torch.randn(rows, 16), torch.randn(rows, 16)
    wanted = packed_decode_attention(q, keys, values, first, lengths, backend="reference")
    used = torch.zeros(rows, dtype=torch.bool)
    for start, length in zip(first[0].tolist(), lengths[0].tolist(), strict=True):
        used[start : start + length] = True
    keys[~used], values[~used] = torch.nan, torch.nan
    torch.testing.assert_close(packed_decode_attention(q, keys, values, first, lengths, backend="triton"), wanted)


@pytest.mark.parametrize("wrong", [(-1, 5), (0, 0), (60, 41), (0, 2**40), (2**63 - 1, 2**63 - 1), (0, 70)])
def test_a_head_whose_rows_are_not_there_is_not_a_number(monkeypatch, wrong):
    """On a GPU nobody looks before; the others are what they are."""
    monkeypatch.setattr(decode_kernel, "PART_KEYS", 32)
    q, keys = torch.randn(1, 2, 1, 16), torch.randn(100, 16)
    first, lengths = torch.tensor([[3, wrong[0]]]), torch.tensor([[40, wrong[1]]])
    found = decode_kernel.packed_decode_attention(q, keys, keys, first, lengths, None, None, 40)
    alone = packed_decode_attention(q[:, :1], keys, keys, first[:, :1], lengths[:, :1], backend="reference")
    torch.testing.assert_close(found[:, :1], alone)
    assert found[:, 1].isnan().all()


@pytest.mark.slow
def test_non_contiguous_input():
    q = torch.randn(2, 40, 4, 16).transpose(1, 2)
    k, v = torch.randn(2, 2, 100, 16)[:, :, 60:], torch.randn(2, 40, 2, 16).transpose(1, 2)
    columns = torch.randn(2, 2, 16, 40).mT  # not even the last dimension is dense
    for op, args in ((prompt_attention_mass, (q, k, v)), (decode_attention, (q[:, :, :2], k, columns))):
        found, wanted = op(*args, backend="triton"), op(*(x.contiguous() for x in args), backend="triton")
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    meets_the_bar(prompt_attention, columns, k, v)
    meets_the_bar(column_mass, columns, columns)
    meets_the_bar(power_iterate, q, k, iterations=2, temperature=1.0)


@pytest.mark.slow
def test_bfloat16():
    """Interpreted it is float32 inside, so one shape tells all there is to tell."""
    q, k, v = tensors((6, 2, 33, 70, 24), torch.bfloat16)
    meets_the_bar(column_mass, q, k)
    meets_the_bar(power_iterate, q, k, iterations=2, temperature=1.0)
    meets_the_bar(prompt_attention, q, k, v)
    meets_the_bar(prompt_attention_mass, q, k, v)
    meets_the_bar(prompt_attention_peak, q, k, v)
    meets_the_bar(decode_attention, q[:, :, :2], k, v)


def test_the_same_bits_every_time():
    q, k, v = tensors((4, 2, 63, 63, 16))
    first = prompt_attention_mass(q, k, v, backend="triton")
    assert all(map(torch.equal, first, prompt_attention_mass(q, k, v, backend="triton")))
