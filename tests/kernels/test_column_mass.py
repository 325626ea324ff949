"""Truth: the dense causal attention matrix in float64."""

import math

import pytest
import torch
from mminfer_kernels import column_mass, power_iterate
from mminfer_kernels.column_mass import reference

pytestmark = pytest.mark.usefixtures("backend")

HEADS = [(4, 4), (6, 2), (3, 1)]  # H, G


def attention(heads, groups, queries, keys, batch=2, size=16, dtype=torch.float32):
    q = torch.randn(batch, heads, queries, size, dtype=torch.float64)
    k = torch.randn(batch, groups, keys, size, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def dense_matrix(q, k, index=None, temperature=1.0, causal=True, scale=None):
    """[B, H, N, N] float64; rows without a query are zero."""
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    index = torch.arange(keys - queries, keys) if index is None else index
    full = k.double().repeat_interleave(heads // k.shape[1], 1)
    logits = q.double() @ full.mT * (size**-0.5 if scale is None else scale) / temperature
    if causal:
        logits.masked_fill_(torch.arange(keys) > index[:, None], -math.inf)
    matrix = torch.zeros(batch, heads, keys, keys, dtype=torch.float64)
    matrix[:, :, index] = logits.softmax(-1)
    return matrix


def dense_power(matrix, iterations):
    keys = matrix.shape[-1]
    x = torch.full((*matrix.shape[:2], 1, keys), 1 / keys, dtype=torch.float64)
    for _ in range(iterations):
        x = x @ matrix
    return x[:, :, 0]


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("tokens", [1, 63, 300])
def test_column_mass_equals_the_dense_sum(tokens, heads, groups):
    q, k = attention(heads, groups, tokens, tokens)
    found = column_mass(q, k)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dense_matrix(q, k).sum(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.full((2, heads), float(tokens)))


@pytest.mark.parametrize("weights_shape", [(2, 6, 90), (2, 90)])
@pytest.mark.parametrize("causal", [True, False])
def test_weights_temperature_and_scale(weights_shape, causal):
    q, k = attention(6, 2, 90, 90)
    weights = torch.rand(weights_shape)
    matrix = dense_matrix(q, k, temperature=0.3, causal=causal, scale=0.2)
    per_head = (weights if weights.dim() == 3 else weights[:, None].expand(2, 6, 90)).double()
    wanted = (per_head[..., None] * matrix).sum(2)
    found = column_mass(q, k, weights, temperature=0.3, causal=causal, scale=0.2)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_every_query_sees_every_key_without_causal():
    q, k = attention(4, 2, 150, 70)
    full = k.double().repeat_interleave(2, 1)
    wanted = (q.double() @ full.mT / 4).softmax(-1).sum(2)
    torch.testing.assert_close(column_mass(q, k, causal=False).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("picked", [[0], [299], [0, 1, 2, 120, 121, 250, 299], list(range(5, 300, 3))])
def test_query_subsets(picked):
    index = torch.tensor(picked)
    q, k = attention(6, 2, len(picked), 300)
    matrix = dense_matrix(q, k, index, temperature=0.5)
    found = column_mass(q, k, temperature=0.5, query_index=index)
    torch.testing.assert_close(found.double(), matrix.sum(2), rtol=1e-5, atol=1e-6)
    found = power_iterate(q, k, temperature=0.5, query_index=index)
    torch.testing.assert_close(found.double(), dense_power(matrix, 5), rtol=1e-4, atol=1e-8)


def test_fewer_queries_than_keys_are_the_last():
    q, k = attention(4, 2, 70, 200)
    index = torch.arange(130, 200)
    assert torch.equal(column_mass(q, k), column_mass(q, k, query_index=index))
    torch.testing.assert_close(power_iterate(q, k), power_iterate(q, k, query_index=index))
    torch.testing.assert_close(column_mass(q, k).double(), dense_matrix(q, k).sum(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("tokens", [1, 63, 300])
@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_power_iteration_equals_the_dense_one(iterations, tokens, heads, groups):
    q, k = attention(heads, groups, tokens, tokens)
    wanted = dense_power(dense_matrix(q, k, temperature=0.1), iterations)
    found = power_iterate(q, k, iterations=iterations)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-8)


def test_float64_input_is_computed_in_float64():
    q, k = attention(4, 2, 130, 130, dtype=torch.float64)
    matrix = dense_matrix(q, k)
    torch.testing.assert_close(column_mass(q, k), matrix.sum(2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(power_iterate(q, k, temperature=1.0), dense_power(matrix, 5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_scored_in_float32(dtype):
    q, k = attention(4, 2, 130, 130, dtype=dtype)
    matrix = dense_matrix(q, k)  # of the same rounded inputs
    torch.testing.assert_close(column_mass(q, k).double(), matrix.sum(2), rtol=1e-5, atol=1e-5)


def test_non_contiguous_input():
    q = torch.randn(2, 80, 4, 16).transpose(1, 2)
    k = torch.randn(2, 80, 2, 16).transpose(1, 2)
    weights = torch.rand(2, 80, 4).transpose(1, 2)
    assert torch.equal(column_mass(q, k, weights), column_mass(q.contiguous(), k.contiguous(), weights.contiguous()))
    assert torch.equal(power_iterate(q, k), power_iterate(q.contiguous(), k.contiguous()))


def test_no_queries_give_no_mass():
    q, k = attention(4, 2, 0, 9)
    assert torch.equal(column_mass(q, k), torch.zeros(2, 4, 9))
    assert torch.equal(power_iterate(q, k), torch.zeros(2, 4, 9))


def test_small_scratch_splits_heads(monkeypatch):
    q, k = attention(6, 3, 200, 200)
    wanted = column_mass(q, k), power_iterate(q, k)
    monkeypatch.setattr(reference, "SCRATCH_BYTES", 2 * 200 * 4 * 32)  # one group of two heads at a time
    torch.testing.assert_close(column_mass(q, k), wanted[0])
    torch.testing.assert_close(power_iterate(q, k), wanted[1])


def test_wrong_input_is_named():
    q, k = attention(4, 2, 8, 8)
    wrong = {
        "do not divide": lambda: column_mass(q[:, :3], k),
        "wanted one floating dtype": lambda: column_mass(q, k.double()),
        "temperature is 0": lambda: column_mass(q, k, temperature=0),
        "weights has shape": lambda: column_mass(q, k, torch.ones(2, 7)),
        "at most one query a key": lambda: power_iterate(q, k[:, :, :4]),
        "strictly ascending": lambda: column_mass(q, k, query_index=torch.zeros(8, dtype=torch.int64)),
        "places below 8": lambda: column_mass(q, k, query_index=torch.arange(1, 9)),
        "wanted int64": lambda: column_mass(q, k, query_index=torch.arange(8, dtype=torch.int32)),
        "iterations is -1": lambda: power_iterate(q, k, iterations=-1),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
