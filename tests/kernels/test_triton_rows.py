"""The Triton kernels of rows and of rotary positions, interpreted, against the reference in float64."""

import pytest
import torch
from mminfer_kernels import (
    BackendError,
    add_rows,
    apply_rotary,
    best_match,
    gather_rms_norm,
    gather_rows,
    k_centres,
    merge_rows,
    rotary,
    rotary_,
    rotary_table,
    swiglu,
)

from tests.kernels.triton_bar import dirty_memory, meets_the_bar

pytestmark = pytest.mark.usefixtures(dirty_memory.__name__)

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
COPIED = [*DTYPES, torch.bool, torch.uint8, torch.int16, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("leading", "rows", "targets", "size"), [((), 1, 1, 64), ((3,), 63, 17, 100), ((1, 2), 17, 130, 24)]
)
def test_best_match(leading, rows, targets, size, dtype):
    src, dst = torch.randn(*leading, rows, size).to(dtype), torch.randn(*leading, targets, size).to(dtype)
    meets_the_bar(best_match, src, dst, floor=2e-7)


def test_best_match_of_equals_takes_the_first_and_of_zeros_zero():
    dst = torch.eye(40)[[1, 0, 1, 0, *range(2, 38), 2, 1]]
    similarity, index = best_match(torch.eye(40)[:3], dst, backend="triton")
    assert index.tolist() == [1, 0, 4] and torch.equal(similarity, torch.ones(3))
    src = torch.randn(5, 8)
    src[2] = 0
    assert best_match(src, torch.randn(4, 8), backend="triton")[0][2] == 0
    assert torch.equal(best_match(src, torch.zeros(40, 8), backend="triton")[0], torch.zeros(5))
    assert best_match(src, torch.zeros(40, 8), backend="triton")[1].tolist() == [0] * 5


@pytest.mark.parametrize(("leading", "points", "most"), [((), 1, 1), ((3,), 20, 20), ((2, 3), 98, 30), ((2,), 5, 0)])
def test_k_centres(leading, points, most):
    """Each set chooses as many as it may, none and all of them too; what is beyond the bounds is held to them."""
    x = torch.randn(*leading, points, 6)
    counts = torch.randint(-1, most + 2, leading)
    centre, owner = meets_the_bar(k_centres, x @ x.mT, counts, most)
    sizes = counts.clamp(0, most)
    assert torch.equal((centre < points).sum(-1), sizes)
    assert bool((centre.diff() >= 0).all()) and bool(((owner >= 0) & (owner < points)).all())
    own = (owner == torch.arange(points)).sum(-1)
    assert torch.equal(own[sizes > 0], sizes[sizes > 0])


def test_k_centres_of_shorter_sets_are_those_of_the_set_alone():
    x = torch.randn(3, 30, 6)
    x[1, 20:], x[2, 1:] = 0, 0
    counts, sizes = torch.tensor([4, 20, 7]), torch.tensor([30, 20, 1])
    centre, owner = meets_the_bar(k_centres, x @ x.mT, counts, 25, sizes)
    for n, (count, size) in enumerate(zip(counts.tolist(), sizes.tolist(), strict=True)):
        own, count = x[n, :size] @ x[n, :size].mT, min(count, size)
        alone, whose = k_centres(own, torch.tensor(count), count, backend="reference")
        assert torch.equal(centre[n, :count], alone) and bool((centre[n, count:] == 30).all())
        assert torch.equal(owner[n, :size], whose)


def test_k_centres_of_equals_are_never_the_same_and_nan_is_no_place():
    same, nan = torch.ones(2, 6, 6), torch.full((2, 6, 6), torch.nan)
    for similarity in (same, nan):
        centre, owner = k_centres(similarity, torch.tensor([6, 2]), 6, backend="triton")
        assert centre[0].tolist() == list(range(6)) and len({*centre[1].tolist()}) == 3 and bool((owner < 6).all())
    meets_the_bar(k_centres, same, torch.tensor([6, 2]), 6)


def test_best_match_of_strided_rows():
    src, dst = torch.randn(2, 30, 3, 8).transpose(1, 2), torch.randn(2, 3, 80, 8)[:, :, ::2]
    meets_the_bar(best_match, src, dst, floor=2e-7)
    meets_the_bar(best_match, src.contiguous().mT, torch.randn(2, 3, 5, 30), floor=2e-7)
    meets_the_bar(best_match, src[:, :, :0], dst)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("targets", "sources"), [(1, 1), (17, 63), (63, 9), (5, 0)])
def test_merge_rows(targets, sources, weighted, dtype):
    dst, src = torch.randn(2, targets, 24).to(dtype), torch.randn(2, sources, 24).to(dtype)
    weights = (torch.rand(2, targets) + 0.5, torch.rand(2, sources)) if weighted else (None, None)
    meets_the_bar(merge_rows, dst, src, torch.randint(targets, (2, sources)), *weights)


def test_merge_rows_of_strided_rows_all_into_one():
    dst, src = torch.randn(2, 8, 5).mT, torch.randn(2, 30, 2, 8)[:, :, 1]
    meets_the_bar(merge_rows, dst, src, torch.full((2, 30), 3), torch.rand(2, 10)[:, ::2] + 0.1)


def test_merging_and_adding_give_the_same_bits_every_time():
    dst, src, index = torch.randn(5, 24), torch.randn(90, 24), torch.randint(5, (90,))
    first = merge_rows(dst, src, index, backend="triton")[0], add_rows(dst, index, src, backend="triton")
    again = merge_rows(dst, src, index, backend="triton")[0], add_rows(dst, index, src, backend="triton")
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("dtype", COPIED)
def test_gather_rows_copies_any_dtype(dtype):
    x = torch.randint(0, 2, (2, 3, 63, 5)).to(dtype)
    index = torch.tensor([0, 5, 5, 62])
    assert torch.equal(gather_rows(x, index, backend="triton"), x[:, :, index])
    assert torch.equal(gather_rows(x, index.clamp(max=2), 1, backend="triton"), x[:, index.clamp(max=2)])
    assert torch.equal(gather_rows(x[0, 0, :, 0], index, 0, backend="triton"), x[0, 0, :, 0][index])


@pytest.mark.parametrize(("leading", "kept"), [((), 3), ((4,), 0), ((2, 3), 17), ((2, 1, 2), 40)])
def test_gather_rows_of_its_own_for_each(leading, kept):
    x, index = torch.randn(*leading, 30, 1100), torch.randint(30, (*leading, kept))
    assert torch.equal(
        gather_rows(x, index, backend="triton"), x.gather(-2, index[..., None].expand(*index.shape, 1100))
    )


def test_gather_rows_of_strided_tensors():
    x, index = torch.randn(2, 30, 3, 8).transpose(1, 2), torch.randint(30, (7, 2, 3)).permute(1, 2, 0)
    assert torch.equal(gather_rows(x, index, backend="triton"), gather_rows(x, index, backend="reference"))
    few = index[0, 0].clamp(max=7)
    assert torch.equal(gather_rows(x.mT, few, 2, backend="triton"), x.mT[:, :, few])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(10, 4), (2, 33, 100), (2, 2, 9, 1030)])
@pytest.mark.parametrize("batched", [True, False])
def test_add_rows(batched, shape, dtype):
    x = torch.randn(shape).to(dtype)
    index = torch.randint(shape[-2], (*shape[:-2], 7) if batched else (7,))
    before, rows = x.clone(), torch.randn(*shape[:-2], 7, shape[-1]).to(dtype)
    meets_the_bar(add_rows, x, index, rows)
    assert torch.equal(x, before)


@pytest.mark.parametrize("batched", [True, False])
def test_add_rows_in_place_of_strided_tensors(batched):
    index = torch.tensor([[1, 4], [0, 2], [9, 9]]) if batched else torch.tensor([1, 4])
    rows, wide = torch.randn(3, 2, 4), torch.randn(2, 3, 10, 4)
    for x in (
        torch.randn(10, 3, 4).transpose(0, 1),
        wide[0],
        torch.randn(3, 4, 10).mT,
        torch.randn(3, 10, 8)[..., ::2],
    ):
        wanted = add_rows(x, index, rows, backend="reference")
        assert add_rows(x, index, rows, inplace=True, backend="triton") is x
        torch.testing.assert_close(x, wanted)
    four = torch.randn(2, 10, 3, 4).transpose(1, 2)  # its leading dimensions do not merge
    wanted = add_rows(four, torch.tensor([2, 2]), torch.ones(2, 3, 2, 4), backend="reference")
    add_rows(four, torch.tensor([2, 2]), torch.ones(2, 3, 2, 4), inplace=True, backend="triton")
    torch.testing.assert_close(four, wanted)


def test_add_no_rows():
    x = torch.randn(6, 4)
    assert torch.equal(add_rows(x, torch.zeros(0, dtype=torch.int64), x[:0], backend="triton"), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (2, 63, 100), (2, 3, 9, 17)])
def test_gather_rms_norm(shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    meets_the_bar(gather_rms_norm, x, torch.randint(shape[-2], (*shape[:-2], 5)), weight)
    meets_the_bar(gather_rms_norm, x, torch.randint(shape[-2], (5,)), weight, eps=0.1)
    assert gather_rms_norm(x, torch.zeros(0, dtype=torch.int64), weight, backend="triton").shape[-2] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17,), (63, 100), (2, 3, 1100), (2, 0)])
def test_swiglu(shape, dtype):
    gate, up = torch.randn(*shape[:-1], 2 * shape[-1]).mul(20).to(dtype).chunk(2, -1)
    meets_the_bar(swiglu, gate, up)


def inverse_frequencies(size, base=1e6):
    return 1 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)


@pytest.mark.parametrize("scaling", [1.0, 1.5])
@pytest.mark.parametrize("size", [2, 24, 128])
def test_rotary_table_is_right_to_1e_6_up_to_a_million_positions(size, scaling):
    whole = torch.tensor([0, 1, 2, 3, 5, 2**16 - 1, 2**20 - 1, 2**20], dtype=torch.float64)
    position = torch.cat([whole, whole + 1 / 256, whole + 0.7, -whole])
    angle = (position[:, None] * inverse_frequencies(size).double()).repeat(1, 2)
    cos, sin = rotary_table(position, inverse_frequencies(size), scaling, backend="triton")
    assert (cos.double() - scaling * angle.cos()).abs().max() <= 1e-6
    assert (sin.double() - scaling * angle.sin()).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_table_of_three_axes(interleaved, dtype):
    position = torch.rand(3, 2, 17, dtype=torch.float64) * 2**20
    found = rotary_table(position, inverse_frequencies(24), 1.5, [4, 4, 4], dtype, interleaved, backend="triton")
    exact = rotary_table(position, inverse_frequencies(24), 1.5, [4, 4, 4], torch.float64, interleaved)
    for mine, truth in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_float64_tables_are_left_to_others():
    position, inv_freq = torch.zeros(4, dtype=torch.float64), inverse_frequencies(24)
    with pytest.raises(BackendError, match="cannot take"):
        rotary_table(position, inv_freq, dtype=torch.float64, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sections", [None, [4, 4, 4]])
@pytest.mark.parametrize(("heads", "groups", "tokens"), [(1, 1, 1), (9, 3, 17), (8, 8, 70)])
def test_rotary(heads, groups, tokens, sections, dtype):
    q, k = torch.randn(2, heads, tokens, 24).to(dtype), torch.randn(2, groups, tokens, 24).to(dtype)
    position = torch.rand(*(() if sections is None else (3,)), 2, tokens, dtype=torch.float64) * 2**20
    before = q.clone()
    found = meets_the_bar(rotary, q, k, position, inverse_frequencies(24), 1.5, sections)
    assert torch.equal(q, before)
    rotary_(q, k, position, inverse_frequencies(24), 1.5, sections, backend="triton")
    assert torch.equal(q, found[0]) and torch.equal(k, found[1])


def test_rotary_in_place_of_strided_heads():
    q, k = torch.randn(2, 17, 4, 24).transpose(1, 2), torch.randn(2, 2, 24, 17).mT
    position = torch.rand(2, 17, dtype=torch.float64) * 1000
    wanted = rotary(q, k, position, inverse_frequencies(24), backend="reference")
    rotary_(q, k, position, inverse_frequencies(24), backend="triton")
    torch.testing.assert_close((q, k), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", ["its own", torch.float32])
def test_apply_rotary(table_dtype, dtype):
    q, k = torch.randn(2, 9, 17, 24).to(dtype), torch.randn(2, 17, 3, 24).to(dtype).transpose(1, 2)
    position = torch.rand(2, 17, dtype=torch.float64) * 1000
    cos, sin = rotary_table(position, inverse_frequencies(24), dtype=dtype if table_dtype == "its own" else table_dtype)
    meets_the_bar(apply_rotary, q, k, cos, sin)
    meets_the_bar(apply_rotary, q, k, cos[0], sin[0])
    meets_the_bar(apply_rotary, q[0], k[0], cos[0], sin[0])


def test_float16_tables_round_as_the_host_models_do():
    q, k = torch.randn(2, 9, 17, 24).half(), torch.randn(2, 3, 17, 24).half()
    cos, sin = rotary_table(torch.rand(2, 17).double() * 1000, inverse_frequencies(24), dtype=torch.float16)
    found, wanted = (apply_rotary(q, k, cos, sin, backend=x) for x in ("triton", "reference"))
    assert all(map(torch.equal, found, wanted))
