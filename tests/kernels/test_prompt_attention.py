import math

import pytest
import torch
from mminfer_kernels import column_mass, prompt_attention, prompt_attention_mass, prompt_attention_peak

pytestmark = pytest.mark.usefixtures("backend")

HEADS = [(4, 4), (6, 2), (3, 1)]  # H, G


def qkv(heads, groups, queries, keys, size=16, dtype=torch.float32):
    shapes = (heads, queries), (groups, keys), (groups, keys)
    return [torch.randn(2, *shape, size).to(dtype) for shape in shapes]


def dense(q, k, v, index=None, window=None, scale=None):
    """Attention and the matrix [B, H, S, N], both float64."""
    queries, keys = q.shape[2], k.shape[2]
    index = torch.arange(keys - queries, keys) if index is None else index
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    place = torch.arange(keys)
    hidden = place > index[:, None]
    if window is not None:
        hidden |= place <= index[:, None] - window
    matrix = logits.masked_fill(hidden, -math.inf).softmax(-1)
    return matrix @ v, matrix


def dense_peak(matrix, groups, counted=None):
    """[B, G, counted] of the matrix [B, H, S, N]: the largest of a group's queries."""
    return matrix.unflatten(1, (groups, -1)).amax((2, 3))[..., :counted]


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("tokens", [1, 63, 300])
def test_equals_dense_attention(tokens, heads, groups):
    q, k, v = qkv(heads, groups, tokens, tokens)
    wanted, matrix = dense(q, k, v)
    torch.testing.assert_close(prompt_attention(q, k, v).double(), wanted, rtol=1e-5, atol=1e-6)
    found, mass = prompt_attention_mass(q, k, v)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass.double(), matrix.sum(2), rtol=1e-5, atol=1e-5)
    assert mass.dtype == torch.float32
    found, peak = prompt_attention_peak(q, k, v)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(peak.double(), dense_peak(matrix, groups), rtol=1e-5, atol=1e-6)
    assert peak.dtype == torch.float32


@pytest.mark.parametrize("window", [None, 1, 7, 200, 900])
@pytest.mark.parametrize("picked", [None, [0], [299], [0, 1, 2, 120, 250, 299], range(5, 300, 3)])
def test_query_subsets_and_windows(picked, window):
    index = None if picked is None else torch.tensor(list(picked))
    q, k, v = qkv(6, 2, 40 if picked is None else len(index), 300)
    wanted, matrix = dense(q, k, v, index, window, scale=0.3)
    found = prompt_attention(q, k, v, scale=0.3, query_index=index, window=window)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    if window is None:
        weights = torch.rand(q.shape[:3])
        found, mass = prompt_attention_mass(q, k, v, weights, 0.3, index)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mass.double(), (weights[..., None] * matrix).sum(2), rtol=1e-5, atol=1e-6)
        peak = prompt_attention_peak(q, k, v, 0.3, index)[1]
        torch.testing.assert_close(peak.double(), dense_peak(matrix, 2), rtol=1e-5, atol=1e-6)
        assert torch.equal(peak == 0, dense_peak(matrix, 2) == 0)  # of keys that no query sees


@pytest.mark.parametrize("counted", [0, 1, 63, 64, 65, 150, 190, 199, 200])
@pytest.mark.parametrize("size", [1, 33])
def test_peaks_of_the_first_keys(size, counted):
    """Entries of a cache, and queries behind them: those and all keys, and any number in between."""
    q, k, v = qkv(6, 2, 50, 200, size)
    for scale in (None, 2.0):
        wanted, matrix = dense(q, k, v, scale=scale)
        found, peak = prompt_attention_peak(q, k, v, scale, counted=counted)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(peak.double(), dense_peak(matrix, 2, counted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 3, 10, 17, 20])
@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (28, 4)])
def test_few_queries_of_many_heads(heads, groups, queries):
    """Whose heads may share the lanes of a vector: each row is its own head's, whatever lies beside it."""
    q, k, v = qkv(heads, groups, queries, 150)
    wanted, matrix = dense(q, k, v)
    torch.testing.assert_close(prompt_attention(q, k, v).double(), wanted, rtol=1e-5, atol=1e-6)
    found, peak = prompt_attention_peak(q, k, v)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(peak.double(), dense_peak(matrix, groups), rtol=1e-5, atol=1e-6)


def test_masses_are_those_of_column_mass():
    q, k, v = qkv(6, 2, 100, 100)
    weights = torch.rand(2, 100)
    torch.testing.assert_close(prompt_attention_mass(q, k, v, weights)[1], column_mass(q, k, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    q, k, v = qkv(4, 2, 90, 90, dtype=dtype)
    wanted, matrix = dense(q, k, v)
    found, mass = prompt_attention_mass(q, k, v)
    assert found.dtype == dtype and mass.dtype == torch.promote_types(dtype, torch.float32)
    assert (found.double() - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()
    torch.testing.assert_close(mass.double(), matrix.sum(2), rtol=1e-5, atol=1e-5)
    same, peak = prompt_attention_peak(q, k, v, counted=70)
    assert torch.equal(same, found) and peak.dtype == mass.dtype
    torch.testing.assert_close(peak.double(), dense_peak(matrix, 2, 70), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_key_may_stand_for_several(dtype, chosen):
    """As if it were there so many times."""
    q, k, v = qkv(6, 2, 40, 100, dtype=dtype)
    times, last = torch.randint(1, 6, (60,)), torch.ones(40, dtype=torch.int64)
    log_mass = torch.cat([times, last]).float().log().expand(2, 2, 100)
    index = torch.arange(60, 100)
    copied = [torch.cat([x[:, :, :60].repeat_interleave(times, 2), x[:, :, 60:]], 2) for x in (k, v)]
    wanted, peak = prompt_attention_peak(q.double(), *(x.double() for x in copied))
    given = {"query_index": index if chosen else None, "log_mass": log_mass}
    found, raised = prompt_attention_peak(q, k, v, counted=60, **given)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.bfloat16 else {"rtol": 0.0, "atol": 0.01}
    torch.testing.assert_close(found.double(), wanted, **close)
    first = times.cumsum(0) - times
    torch.testing.assert_close(raised.double(), peak[..., first] * times, rtol=1e-5, atol=1e-5)
    assert torch.equal(prompt_attention(q, k, v, **given), found)
    windowed = prompt_attention(q, k, v, window=45, **given)
    near = [x[:, :, 55:].double() for x in (k, v)]  # of the last query
    truth = prompt_attention(q[:, :, 39:].double(), *near, log_mass=log_mass[..., 55:])
    torch.testing.assert_close(windowed[:, :, 39:].double(), truth, **close)


def test_no_queries_and_no_batch():
    q, k, v = qkv(4, 2, 0, 9)
    assert prompt_attention(q, k, v).shape == (2, 4, 0, 16)
    assert torch.equal(prompt_attention_mass(q, k, v)[1], torch.zeros(2, 4, 9))
    assert prompt_attention_mass(k[:0], k[:0], v[:0])[1].shape == (0, 2, 9)
    assert torch.equal(prompt_attention_peak(q, k, v)[1], torch.zeros(2, 2, 9))
    assert torch.equal(prompt_attention_peak(q, k, v, counted=4)[1], torch.zeros(2, 2, 4))
    assert prompt_attention_peak(k[:0], k[:0], v[:0], counted=0)[1].shape == (0, 2, 0)


def test_wrong_input_is_named():
    q, k, v = qkv(4, 2, 8, 8)
    wrong = {
        "window is 0": lambda: prompt_attention(q, k, v, window=0),
        "wanted the same of both": lambda: prompt_attention(q, k, v[:, :, 1:]),
        "at most one query a key": lambda: prompt_attention(q, k[:, :, 1:], v[:, :, 1:]),
        "weights has shape": lambda: prompt_attention_mass(q, k, v, torch.ones(2, 7)),
        r"log_mass is torch.float32 .2, 2, 7., wanted float32 .2, 2, 8., one a key": lambda: prompt_attention_peak(
            q, k, v, log_mass=torch.zeros(2, 2, 7)
        ),
        "log_mass is torch.int64": lambda: prompt_attention(q, k, v, log_mass=torch.zeros(2, 2, 8).long()),
        "log_mass is 3,": lambda: prompt_attention(q, k, v, log_mass=3),
        "counted is 9, wanted a whole number from 0 to 8": lambda: prompt_attention_peak(q, k, v, counted=9),
        "counted is -1": lambda: prompt_attention_peak(q, k, v, counted=-1),
        "counted is True": lambda: prompt_attention_peak(q, k, v, counted=True),
        "heads of no element": lambda: prompt_attention_peak(q[..., :0], k[..., :0], v[..., :0]),
        "strictly ascending": lambda: prompt_attention(q, k, v, query_index=torch.zeros(8, dtype=torch.int64)),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
