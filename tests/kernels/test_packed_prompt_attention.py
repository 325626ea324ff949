"""Attention of a prompt over heads of different lengths: each head as if it were alone."""

import pytest
import torch
from mminfer_kernels import packed_prompt_attention, prompt_attention
from mminfer_kernels.packed_prompt_attention import triton_kernel

from tests.kernels.agreement import agree
from tests.kernels.triton_bar import meets_the_bar

LENGTHS = [[9, 9], [9, 70], [200, 12], [9, 64, 65]]
SEVERAL = torch.tensor([-8, -5, -4, -1])


def packed(lengths, queries, repeat=3, size=16, dtype=torch.float32, gap=5):
    """q, keys, values, first and lengths, with rows between segments that nobody may read."""
    first, end = [], gap
    for length in lengths:
        first.append(end)
        end += length + gap
    keys, values = torch.full((end, size), torch.nan), torch.full((end, size), torch.nan)
    for start, length in zip(first, lengths, strict=True):
        keys[start : start + length], values[start : start + length] = torch.randn(2, length, size)
    q = torch.randn(1, repeat * len(lengths), queries, size)
    return q.to(dtype), keys.to(dtype), values.to(dtype), torch.tensor(first), torch.tensor(lengths)


def head_by_head(q, keys, values, first, lengths, query_index=None, log_mass=None):
    found = []
    for q_head, start, length in zip(q.chunk(len(first), 1), first.tolist(), lengths.tolist(), strict=True):
        k, v = (x[None, None, start : start + length] for x in (keys, values))
        index = None if query_index is None else query_index + length
        mass = None if log_mass is None else log_mass[None, None, start : start + length]
        found.append(prompt_attention(q_head, k, v, query_index=index, log_mass=mass))
    return torch.cat(found, 1)


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("index", [None, SEVERAL])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.usefixtures("backend")
def test_each_head_as_if_alone(lengths, index, weighed):
    inputs = packed(lengths, 9 if index is None else 4)
    given = {"query_index": index, "log_mass": 3 * torch.rand(len(inputs[1])) if weighed else None}
    found = packed_prompt_attention(*inputs, **given)
    torch.testing.assert_close(found, head_by_head(*inputs, **given), rtol=1e-5, atol=1e-6)
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [33, 64])
def test_native(native, size, dtype):
    inputs = packed([300, 40, 77], 40, 2, size, dtype)
    mass = torch.rand(len(inputs[1]))
    agree(packed_prompt_attention, *inputs, scale=0.2, log_mass=mass)
    shared = torch.tensor([5, 5, 100])  # segments may share rows, and lie in any order
    agree(packed_prompt_attention, *inputs[:3], shared.flip(0), torch.tensor([100, 41, 200]))
    across = (x.mT.contiguous().mT for x in inputs[1:3])
    found = packed_prompt_attention(inputs[0], *across, *inputs[3:], backend="native")
    assert torch.equal(found, packed_prompt_attention(*inputs, backend="native"))


def test_heads_alike_are_those_of_prompt_attention(native):
    q, keys, values, first, lengths = packed([150, 150], 60, gap=0)
    k, v = (x.view(1, 2, 150, 16) for x in (keys, values))
    assert torch.equal(
        packed_prompt_attention(q, keys, values, first, lengths, backend="native"),
        prompt_attention(q, k, v, backend="native"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("index", [None, SEVERAL])
@pytest.mark.parametrize("weighed", [True, False])
def test_triton(weighed, index, dtype):
    inputs = packed([40, 9, 33], 9 if index is None else 4, 2, 24, dtype)
    mass = 3 * torch.rand(len(inputs[1])) if weighed else None
    meets_the_bar(packed_prompt_attention, *inputs, None, index, mass)


def test_triton_reads_no_row_that_is_not_there():
    """On a GPU nobody looks at segments before the kernel does."""
    q, keys, values, _, _ = packed([20, 20], 9)
    for first, lengths in (([5, 2**40], [20, 20]), ([5, -3], [20, 20]), ([5, 5], [20, 8]), ([5, 5], [20, 2000])):
        segments = torch.tensor(first), torch.tensor(lengths)
        for index in (None, torch.arange(-9, 0)):
            found = triton_kernel.packed_prompt_attention(q, keys, values, *segments, 0.25, index)
            assert found[:, :3].isfinite().all() and found[:, 3:].isnan().all()


def test_no_queries():
    q, keys, values, first, lengths = packed([4, 1], 0)
    for backend in ("auto", "reference", "triton"):
        assert packed_prompt_attention(q, keys, values, first, lengths, backend=backend).shape == (1, 6, 0, 16)


def test_wrong_input_is_named():
    q, keys, values, first, lengths = packed([12, 9], 9)
    wrong = {
        r"wanted .1, H, S, D. and .R, D.": lambda: packed_prompt_attention(q[0], keys, values, first, lengths),
        r"wanted twice .R, D.": lambda: packed_prompt_attention(q, keys, values[1:], first, lengths),
        "wanted one floating dtype": lambda: packed_prompt_attention(q, keys, values.half(), first, lengths),
        r"wanted int64 .G. of both": lambda: packed_prompt_attention(q, keys, values, first[None], lengths),
        r"wanted twice .1, G.": lambda: packed_prompt_attention(q, keys, values, first[:1], lengths),
        "wanted int64": lambda: packed_prompt_attention(q, keys, values, first.int(), lengths),
        "a segment of 8 rows begins at row 22": lambda: packed_prompt_attention(q, keys, values, first, lengths - 1),
        "a segment of 12 rows begins at row 25": lambda: packed_prompt_attention(q, keys, values, first + 20, lengths),
        "do not divide evenly over 2 key heads": lambda: packed_prompt_attention(
            q[:, :5], keys, values, first, lengths
        ),
        "query_index runs from -9 to 0, wanted strictly ascending places from -36 to -1": lambda: (
            packed_prompt_attention(q[:, :, :2], keys, values, first, lengths, query_index=torch.tensor([-9, 0]))
        ),
        "a segment of 9 rows begins at row 22, wanted lengths from 10": lambda: packed_prompt_attention(
            q[:, :, :2], keys, values, first, lengths, query_index=torch.tensor([-10, -1])
        ),
        "query_index is torch.int64 .2.": lambda: packed_prompt_attention(
            q, keys, values, first, lengths, query_index=torch.tensor([-9, -1])
        ),
        "log_mass is torch.float32 .35.": lambda: packed_prompt_attention(
            q, keys, values, first, lengths, log_mass=torch.zeros(35)
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
