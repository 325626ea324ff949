import pytest
import torch
from mminfer_kernels import add_rows, gather_rms_norm, gather_rows, swiglu

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_gather_the_same_rows_everywhere(dtype):
    x = torch.randint(0, 2, (2, 3, 63, 4)).to(dtype)
    index = torch.tensor([0, 5, 5, 62])
    assert torch.equal(gather_rows(x, index), x[:, :, index])
    assert torch.equal(gather_rows(x, index.clamp(max=2), dim=1), x[:, index.clamp(max=2)])
    assert torch.equal(gather_rows(x[0, 0, :, 0], index, dim=0), x[0, 0, :, 0][index])


@pytest.mark.parametrize("leading", [(4,), (2, 3)])
@pytest.mark.parametrize("kept", [0, 1, 40])
def test_gather_rows_of_its_own_for_each(leading, kept):
    x, index = torch.randn(*leading, 63, 5), torch.randint(63, (*leading, kept))
    assert torch.equal(gather_rows(x, index), x.gather(-2, index[..., None].expand(*index.shape, 5)))


def test_gather_from_no_rows():
    assert gather_rows(torch.randn(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 4)


def test_gather_from_non_contiguous():
    x, index = torch.randn(2, 30, 3, 8).transpose(1, 2), torch.randint(30, (7, 2, 3)).permute(1, 2, 0)
    assert torch.equal(gather_rows(x, index), gather_rows(x.contiguous(), index.contiguous()))


@pytest.mark.parametrize("batched", [True, False])
def test_add_rows_adds_up(batched):
    x = torch.randn(3, 10, 4)
    index = torch.tensor([[0, 9, 9]] * 3) if batched else torch.tensor([0, 9, 9])
    rows, before = torch.randn(3, 3, 4), x.clone()
    found = add_rows(x, index, rows)
    wanted = x.clone()
    wanted[:, 0] += rows[:, 0]
    wanted[:, 9] += rows[:, 1] + rows[:, 2]
    torch.testing.assert_close(found, wanted)
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("batched", [True, False])
def test_add_rows_in_place(batched, layout):
    x = torch.randn(10, 3, 4).transpose(0, 1)
    x = x.contiguous() if layout == "contiguous" else x
    index = torch.tensor([[1, 4], [0, 2], [9, 3]]) if batched else torch.tensor([1, 4])
    rows = torch.randn(3, 2, 4)
    wanted = add_rows(x, index, rows)
    found = add_rows(x, index, rows, inplace=True)
    assert found is x and torch.equal(x, wanted)


def test_add_no_rows():
    x = torch.randn(6, 4)
    assert torch.equal(add_rows(x, torch.zeros(0, dtype=torch.int64), x[:0]), x)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gather_rms_norm_is_the_norm_of_the_gathered(dtype, batched):
    x, weight = torch.randn(2, 3, 40, 24).to(dtype), torch.rand(24).to(dtype)
    index = torch.randint(40, (2, 3, 9) if batched else (9,))
    rows = gather_rows(x, index).double()
    wanted = rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    found = gather_rms_norm(x, index, weight, 1e-5)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_swiglu(dtype):
    gate, up = 5 * torch.randn(3, 40, 24).to(dtype), torch.randn(3, 40, 24).to(dtype)
    wanted = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    assert swiglu(gate, up).dtype == dtype
    torch.testing.assert_close(swiglu(gate, up), wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_add_rows_of_integers(dtype):
    x, index = torch.arange(12).view(4, 3).to(dtype), torch.tensor([1, 1])
    assert add_rows(x, index, torch.ones(2, 3, dtype=dtype))[1].tolist() == [5, 6, 7]


def test_wrong_input_is_named():
    x, index = torch.randn(2, 6, 4), torch.zeros(2, 3, dtype=torch.int64)
    wrong = {
        "wanted a dimension": lambda: gather_rows(x, index[0], dim=3),
        "wanted -2": lambda: gather_rows(x, index, dim=0),
        "wanted int64": lambda: gather_rows(x, index.int()),
        "wanted \\[K\\] or": lambda: gather_rows(x, index[:1]),
        "rows is": lambda: add_rows(x, index, torch.randn(2, 2, 4)),
        "weight is": lambda: gather_rms_norm(x, index, torch.ones(5)),
        "wanted the same": lambda: swiglu(x, x[:1]),
        "wanted torch.float32": lambda: add_rows(x, index, torch.randn(2, 3, 4).half()),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
