import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mminfer_kernels import merge_rows

pytestmark = pytest.mark.usefixtures("backend")


def one_by_one(dst, src, index, dst_weight, src_weight):
    """[T, C] float64, one source after the other."""
    total, weight = dst.double() * dst_weight.double()[:, None], dst_weight.double().clone()
    for row, place, share in zip(src.double(), index.tolist(), src_weight.double(), strict=True):
        total[place] += row * share
        weight[place] += share
    return total / weight[:, None], weight


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("targets", "sources"), [(1, 1), (63, 300), (300, 63)])
def test_equals_adding_one_by_one(targets, sources, weighted):
    dst, src = torch.randn(3, targets, 8), torch.randn(3, sources, 8)
    index = torch.randint(targets, (3, sources))
    weights = (torch.rand(3, targets) + 0.5, torch.rand(3, sources)) if weighted else (None, None)
    merged, weight = merge_rows(dst, src, index, *weights)
    for batch in range(3):
        ones = torch.ones(targets), torch.ones(sources)
        wanted = one_by_one(
            dst[batch],
            src[batch],
            index[batch],
            *((weights[0][batch], weights[1][batch]) if weighted else ones),
        )
        torch.testing.assert_close(merged[batch].double(), wanted[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weight[batch].double(), wanted[1], rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(targets=st.integers(1, 20), sources=st.integers(0, 20), seed=st.integers(0, 999))
def test_weight_and_weighted_sum_are_conserved(targets, sources, seed):
    torch.manual_seed(seed)
    dst, src = torch.randn(targets, 4).double(), torch.randn(sources, 4).double()
    dst_weight, src_weight = torch.rand(targets).double() + 0.1, torch.rand(sources).double()
    merged, weight = merge_rows(dst, src, torch.randint(targets, (sources,)), dst_weight, src_weight)
    torch.testing.assert_close(weight.sum(), dst_weight.sum() + src_weight.sum())
    before = (dst * dst_weight[:, None]).sum(0) + (src * src_weight[:, None]).sum(0)
    torch.testing.assert_close((merged * weight[:, None]).sum(0), before)


def test_half_precision_accumulates_in_float32():
    dst, src = torch.ones(1, 4, dtype=torch.bfloat16), torch.ones(1000, 4, dtype=torch.bfloat16)
    merged, weight = merge_rows(dst, src, torch.zeros(1000, dtype=torch.int64))
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, dst)
    assert weight.dtype == torch.float32 and weight.tolist() == [1001.0]


def test_it_is_deterministic_and_leaves_its_input_alone():
    dst, src = torch.randn(2, 5, 8), torch.randn(2, 400, 8)
    index, before = torch.randint(5, (2, 400)), dst.clone()
    first = merge_rows(dst, src, index)[0]
    assert all(torch.equal(first, merge_rows(dst, src, index)[0]) for _ in range(5))
    assert torch.equal(dst, before)


def test_no_sources_change_nothing():
    dst = torch.randn(2, 5, 8)
    merged, weight = merge_rows(dst, dst[:, :0], torch.zeros(2, 0, dtype=torch.int64))
    assert torch.equal(merged, dst) and torch.equal(weight, torch.ones(2, 5))


def test_non_contiguous_input():
    dst, src = torch.randn(2, 8, 5).mT, torch.randn(2, 30, 2, 8)[:, :, 1]
    index, weight = torch.randint(5, (30, 2)).T, torch.rand(2, 10)[:, ::2]
    found = merge_rows(dst, src, index, weight)
    wanted = merge_rows(dst.contiguous(), src.contiguous(), index.contiguous(), weight.contiguous())
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_wrong_input_is_named():
    dst, src, index = torch.randn(5, 8), torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    wrong = {
        "wanted \\[..., T, C\\]": lambda: merge_rows(dst, src[:, :4], index),
        "index is": lambda: merge_rows(dst, src, index[:2]),
        "wanted int64": lambda: merge_rows(dst, src, index.int()),
        "dst_weight": lambda: merge_rows(dst, src, index, torch.ones(3)),
        "src_weight": lambda: merge_rows(dst, src, index, None, torch.ones(5)),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
