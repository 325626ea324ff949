import math

import pytest
import torch
from mminfer_kernels import decode_attention

pytestmark = pytest.mark.usefixtures("backend")


def dense(q, k, v, starts, scale=None):
    queries, entries = q.shape[2], k.shape[2]
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeat, 1) for x in (k, v))
    logits = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    place = torch.arange(entries)
    hidden = place > torch.arange(entries - queries, entries)[:, None]
    hidden = hidden | (place < starts[:, None])[:, None, None]
    return logits.masked_fill(hidden, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("entries", [5, 63, 300])
@pytest.mark.parametrize("padded", [True, False])
def test_equals_dense_attention(padded, entries, queries, heads, groups):
    q = torch.randn(2, heads, queries, 16)
    k, v = torch.randn(2, groups, entries, 16), torch.randn(2, groups, entries, 16)
    starts = torch.tensor([0, (entries - queries) // 2]) if padded else None
    wanted = dense(q, k, v, torch.zeros(2) if starts is None else starts)
    found = decode_attention(q, k, v, starts)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_one_entry_one_query_and_a_scale():
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    torch.testing.assert_close(decode_attention(q, k, v), v.expand(1, 2, 1, 8))
    k, v = torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
    wanted = dense(q, k, v, torch.zeros(1), scale=0.7)
    torch.testing.assert_close(decode_attention(q, k, v, scale=0.7).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 3])
def test_what_lies_before_a_row_starts_is_never_read_into_it(queries):
    q, k, v = torch.randn(2, 4, queries, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 16)
    starts = torch.tensor([20, 0], dtype=torch.int32)
    wanted = decode_attention(q[:1], k[:1, :, 20:], v[:1, :, 20:])
    k[0, :, :20], v[0, :, :20] = 1e4, -1e4
    torch.testing.assert_close(decode_attention(q, k, v, starts)[:1], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    q, k, v = (torch.randn(2, heads, n, 16).to(dtype) for heads, n in ((4, 1), (2, 90), (2, 90)))
    found = decode_attention(q, k, v, torch.tensor([3, 40]))
    assert found.dtype == dtype
    wanted = dense(q, k, v, torch.tensor([3, 40]))
    assert (found.double() - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()


def test_non_contiguous_input():
    q = torch.randn(2, 3, 4, 16).transpose(1, 2)
    k, v = torch.randn(2, 2, 128, 16)[:, :, 60:], torch.randn(2, 68, 2, 16).transpose(1, 2)
    found = decode_attention(q, k, v)
    torch.testing.assert_close(found, decode_attention(q.contiguous(), k.contiguous(), v.contiguous()))


def test_wrong_input_is_named():
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16)
    wrong = {
        "twice": lambda: decode_attention(q, k, k[:, :, 1:]),
        "do not divide": lambda: decode_attention(q[:, :3], k, k),
        "the queries' own": lambda: decode_attention(torch.randn(2, 4, 10, 16), k, k),
        "starts is": lambda: decode_attention(q, k, k, torch.zeros(3, dtype=torch.int64)),
        "wanted integers": lambda: decode_attention(q, k, k, torch.zeros(2)),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
