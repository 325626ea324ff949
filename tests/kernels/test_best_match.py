import pytest
import torch
from mminfer_kernels import best_match

pytestmark = pytest.mark.usefixtures("backend")


def dense(src, dst):
    src, dst = src.double(), dst.double()
    cosines = src @ dst.mT / src.norm(dim=-1)[..., :, None] / dst.norm(dim=-1)[..., None, :]
    return cosines.max(-1)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("rows", "targets"), [(1, 1), (63, 300), (300, 63)])
def test_equals_the_dense_argmax(leading, rows, targets):
    src, dst = torch.randn(*leading, rows, 24), torch.randn(*leading, targets, 24)
    similarity, index = best_match(src, dst)
    wanted = dense(src, dst)
    assert similarity.dtype == torch.float32 and torch.equal(index, wanted.indices)
    torch.testing.assert_close(similarity.double(), wanted.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_compare_at_full_precision(dtype):
    src, dst = torch.randn(70, 24).to(dtype), torch.randn(50, 24).to(dtype)
    similarity, index = best_match(src, dst)
    wanted = dense(src, dst)
    assert similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(index, wanted.indices)


def test_lengths_do_not_matter():
    src, dst = torch.randn(40, 24), torch.randn(30, 24)
    stretched = best_match(src * torch.logspace(-3, 3, 40)[:, None], dst * 1e4)
    assert torch.equal(stretched[1], best_match(src, dst)[1])


def test_zero_rows_have_similarity_zero():
    src, dst = torch.randn(5, 8), torch.randn(4, 8)
    src[2] = 0
    similarity, _ = best_match(src, dst)
    assert similarity[2] == 0 and similarity.isfinite().all()
    assert torch.equal(best_match(src, torch.zeros(4, 8))[0], torch.zeros(5))


def test_the_first_of_equals_wins():
    dst = torch.eye(4)[[1, 0, 1, 0, 2, 2]]
    assert best_match(torch.eye(4)[:3], dst)[1].tolist() == [1, 0, 4]


def test_non_contiguous_input():
    src, dst = torch.randn(2, 90, 3, 8).transpose(1, 2), torch.randn(2, 3, 160, 8)[:, :, ::2]
    found, wanted = best_match(src, dst), best_match(src.contiguous(), dst.contiguous())
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_no_source_gives_nothing_and_no_target_is_an_error():
    similarity, index = best_match(torch.randn(2, 0, 8), torch.randn(2, 3, 8))
    assert similarity.shape == index.shape == (2, 0) and index.dtype == torch.int64
    with pytest.raises(ValueError, match="no row to match"):
        best_match(torch.randn(2, 3, 8), torch.randn(2, 0, 8))
    with pytest.raises(ValueError, match=r"src is \[2, 3, 8\] and dst \[3, 8\]"):
        best_match(torch.randn(2, 3, 8), torch.randn(3, 8))
    with pytest.raises(ValueError, match="one floating dtype"):
        best_match(torch.randn(3, 8), torch.randn(3, 8).half())
