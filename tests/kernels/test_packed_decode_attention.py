"""Decode attention over packed caches, in which every head has a length of its own: values, and what is refused."""

import math

import pytest
import torch
from mminfer_kernels import decode_attention, packed_decode_attention

from tests.kernels.agreement import agree

GAP = 3  # rows between segments, which nobody may read
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(lengths, size, dtype=torch.float32, heads=None):
    """q, keys, values, first and lengths of segments in disorder, NaN before, between and behind them."""
    lengths = torch.tensor(lengths)
    batch, groups = lengths.shape
    first, rows = torch.zeros_like(lengths), GAP
    for i in torch.randperm(batch * groups).tolist():
        first.view(-1)[i] = rows
        rows += int(lengths.view(-1)[i]) + GAP
    keys, values = torch.full((2, rows, size), math.nan, dtype=dtype)
    for start, length in zip(first.flatten().tolist(), lengths.flatten().tolist(), strict=True):
        keys[start : start + length] = torch.randn(length, size)
        values[start : start + length] = torch.randn(length, size)
    return torch.randn(batch, heads or groups, 1, size).to(dtype), keys, values, first, lengths


def dense(q, keys, values, first, lengths, scale=None, log_mass=None):
    """In float64, one query head at a time."""
    batch, heads, _, size = q.shape
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // first.shape[1])
            rows = torch.arange(int(first[b, g]), int(first[b, g] + lengths[b, g]))
            logits = keys[rows].double() @ q[b, h, 0].double() * (size**-0.5 if scale is None else scale)
            logits = logits if log_mass is None else logits + log_mass[rows]
            out[b, h, 0] = logits.softmax(0) @ values[rows].double()
    return out


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("lengths", "heads"), [([[1]], 1), ([[1, 700], [63, 64]], 2), ([[5, 1, 129]], 9), ([[300], [1], [77]], 14)]
)
@pytest.mark.parametrize("massed", [True, False])
def test_equals_dense_attention(massed, lengths, heads):
    inputs = packed(lengths, 16, heads=heads)
    log_mass = 3 * torch.rand(len(inputs[1])) if massed else None
    found = packed_decode_attention(*inputs, 0.4, log_mass)
    assert found.shape == inputs[0].shape and found.is_contiguous()
    torch.testing.assert_close(found.double(), dense(*inputs, 0.4, log_mass), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("backend")
def test_heads_of_one_length_are_the_padded_form():
    q, k, v = torch.randn(2, 6, 1, 80), torch.randn(2, 3, 90, 80), torch.randn(2, 3, 90, 80)
    first, lengths = 90 * torch.arange(6).view(2, 3), torch.full((2, 3), 90)
    found = packed_decode_attention(q, k.view(-1, 80), v.view(-1, 80), first, lengths, longest=90)
    torch.testing.assert_close(found, decode_attention(q, k, v))


@pytest.mark.usefixtures("backend")
def test_a_row_of_log_n_counts_for_n_rows():
    q, keys, values = torch.randn(1, 4, 1, 16), torch.randn(40, 16), torch.randn(40, 16)
    counts = torch.randint(1, 6, (40,))
    first, lengths = torch.tensor([[0, 11]]), torch.tensor([[11, 29]])
    found = packed_decode_attention(q, keys, values, first, lengths, log_mass=counts.log())
    copies = keys.repeat_interleave(counts, 0), values.repeat_interleave(counts, 0)
    ends = counts.cumsum(0)
    first = torch.stack([torch.zeros((), dtype=torch.int64), ends[10]])[None]
    lengths = torch.stack([ends[10], ends[-1] - ends[10]])[None]
    torch.testing.assert_close(found, packed_decode_attention(q, *copies, first, lengths), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("backend")
def test_a_row_of_minus_infinity_counts_for_none():
    """Also where a whole stretch of a head is left out, at its beginning or its end."""
    q, keys, values, first, lengths = packed([[300, 200]], 16)
    log_mass = torch.zeros(len(keys))
    ends = first + lengths
    log_mass[first[0, 0] : first[0, 0] + 150], log_mass[ends[0, 1] - 150 : ends[0, 1]] = -math.inf, -math.inf
    found = packed_decode_attention(q, keys, values, first, lengths, log_mass=log_mass)
    cut = first + torch.tensor([[150, 0]]), lengths - 150
    torch.testing.assert_close(found, packed_decode_attention(q, keys, values, *cut))


@pytest.mark.usefixtures("backend")
def test_segments_may_share_rows():
    q, keys, values, first, lengths = packed([[50, 50]], 16, heads=4)
    first[0, 1], lengths[0, 1] = first[0, 0] + 10, 30
    found = packed_decode_attention(q, keys, values, first, lengths)
    torch.testing.assert_close(found.double(), dense(q, keys, values, first, lengths), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("backend")
def test_any_strides_and_no_sequence():
    q, keys, values, first, lengths = packed([[20, 70], [31, 1]], 24, heads=4)
    wanted = packed_decode_attention(q, keys, values, first, lengths)
    spread = torch.stack([keys, values], 1)  # rows of keys and values in turn
    places = (x.t().contiguous().t() for x in (first, lengths))
    found = packed_decode_attention(q, spread[:, 0], spread[:, 1], *places)
    torch.testing.assert_close(found, wanted)
    by_columns = packed_decode_attention(q, keys.t().contiguous().t(), values, first, lengths)
    torch.testing.assert_close(by_columns, wanted)
    assert packed_decode_attention(q[:0], keys, values, first[:0], lengths[:0]).shape == (0, 4, 1, 24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [33, 64, 80, 96, 128])
def test_native_is_as_right_as_the_reference(native, size, dtype):
    inputs = packed([[1, 1500, 40], [64, 200, 3]], size, dtype, heads=9)
    inputs[1].nan_to_num_(7.0), inputs[2].nan_to_num_(7.0)  # a bar needs numbers
    agree(packed_decode_attention, *inputs)
    agree(packed_decode_attention, *inputs, log_mass=3 * torch.rand(len(inputs[1])), scale=0.3)


def test_every_instruction_set(isa):
    inputs = packed([[1, 90, 40]], 34, heads=6)
    inputs[1].nan_to_num_(7.0), inputs[2].nan_to_num_(7.0)
    for dtype in DTYPES:
        q, keys, values = (x.to(dtype) for x in inputs[:3])
        agree(packed_decode_attention, q, keys, values, *inputs[3:], log_mass=torch.rand(len(keys)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_the_reference_are_float32s(dtype):
    """Before they are scaled float16 could not hold them, and bfloat16 rounds them by whole numbers."""
    q, keys, values, first, lengths = packed([[200, 90]], 64, heads=4)
    q, keys, values = (x.to(dtype) for x in (80 * q, 80 * keys, values))
    found = packed_decode_attention(q, keys, values, first, lengths, scale=2e-4, backend="reference")
    wide = [x.float() for x in (q, keys, values)]
    exact = packed_decode_attention(*wide, first, lengths, scale=2e-4, backend="reference")
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("lengths", [[[9000, 1, 50]], [[50, 50, 9000]], [[3000, 3001, 2999]]])
def test_unequal_heads_are_cut_over_threads(native, lengths):
    """However many threads there are, and where a head begins and ends among the parts."""
    inputs, before = packed(lengths, 64, heads=6), torch.get_num_threads()
    wanted, log_mass = dense(*inputs), torch.zeros(len(inputs[1]))
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = packed_decode_attention(*inputs, backend="native")
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
            assert torch.equal(packed_decode_attention(*inputs, log_mass=log_mass, backend="native"), found)
    finally:
        torch.set_num_threads(before)


def test_wrong_input_is_named():
    q, keys, values, first, lengths = packed([[5, 1, 129]], 16, heads=9)
    rows = len(keys)
    wrong = {
        r"wanted \[B, H, 1, D\]": {"q": torch.randn(1, 9, 2, 16)},
        r"wanted twice \[R, D\]": {"values": values[1:]},
        "one floating dtype": {"keys": keys.half()},
        "do not divide": {"q": q[:, :8]},
        "wanted int64": {"lengths": lengths.int()},
        r"wanted twice \[1, G\]": {"first": first.repeat(2, 1)},
        f"a segment of {rows + 1} rows begins at row": {"lengths": torch.tensor([[5, rows + 1, 3]])},
        "a segment of 0 rows": {"lengths": torch.tensor([[5, 0, 3]])},
        "begins at row -1": {"first": first - first.min() - 1},
        "begins at row 9223372036854775807": {"first": torch.full_like(first, 2**63 - 1)},
        "wanted lengths from 1 to 128": {"longest": 128},
        "longest is 0": {"longest": 0},
        "log_mass is": {"log_mass": torch.zeros(rows - 1)},
        r"wanted float32 \[": {"log_mass": torch.zeros(rows).half()},
        "there are 0 rows": {"keys": keys[:0], "values": values[:0]},
    }
    given = {"q": q, "keys": keys, "values": values, "first": first, "lengths": lengths}
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            packed_decode_attention(**given | change)
