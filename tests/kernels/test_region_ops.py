"""Products of pairs of rows, and regions: each backend against the rule in PyTorch, and arguments that do not fit.

What the rule itself gives is tested where regions are merged (`tests/tokens/test_regions.py`).
"""

import pytest
import torch
from mminfer_kernels import grow_regions, row_dots

LINES, COLUMNS = 13, 37


def grid(lines=LINES):
    at = torch.arange(lines * lines).view(lines, lines)
    steps = ((at[:, :-1], at[:, 1:]), (at[:-1], at[1:]))
    return torch.cat([torch.stack([a.flatten(), b.flatten()]) for a, b in steps], 1)


def smooth(seed):
    """Directions that turn slowly along lines and columns, with a blank corner."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.arange(LINES * LINES)
    angle = torch.stack([at // LINES, at % LINES, at // LINES + at % LINES], 1) * 0.3
    x = torch.sin(angle) @ torch.randn(3, COLUMNS, generator=generator)
    x += 0.3 * torch.randn(x.shape, generator=generator)
    x[(at // LINES < 5) & (at % LINES < 5)] = 1.0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("columns", [0, 1, 16, 37, 200])
@pytest.mark.usefixtures("backend")
def test_products_of_rows(dtype, columns):
    x = torch.randn(9, 2 * columns, generator=torch.Generator().manual_seed(1)).to(dtype)[:, ::2]
    first, second = torch.tensor([0, 8, 3, 3]), torch.tensor([8, 0, 3, 5])
    wanted = (x[first].double() * x[second].double()).sum(1)
    found = row_dots(x, first, second)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert row_dots(x, first[:0], second[:0]).shape == (0,)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize("largest", [None, 4])
@pytest.mark.parametrize("bounded", [False, True])
def test_both_backends_grow_the_same_regions(native, seed, threshold, largest, bounded):
    """Equal tokens among them, whose order blocks decide."""
    if not bounded and threshold is None and largest is None:
        pytest.skip("one region")
    x, pairs, at = smooth(seed), grid(), torch.arange(LINES * LINES)
    group = (at // LINES > 6).long()
    pairs = pairs[:, group[pairs[0]] == group[pairs[1]]]
    given = {"group": group, "spare": torch.tensor([40, 0])} if bounded else {}
    given["block"] = at // LINES // 2 * LINES + at % LINES // 2
    found = [
        grow_regions(x, torch.ones(len(x)), pairs, threshold, largest, backend=backend, **given).tolist()
        for backend in ("native", "reference")
    ]
    assert all(other == found[0] for other in found)
    joined = len(x) - len(set(found[0]))
    assert joined > 5 and (not bounded or (joined <= 40 and found[0][int(group.sum()) :][-1] == len(x) - 1))
    torch.set_num_threads(2)
    try:
        assert grow_regions(x, torch.ones(len(x)), pairs, threshold, largest, **given).tolist() == found[0]
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("backend")
def test_what_is_not_a_number_joins_nothing():
    x = torch.ones(4, 3)
    x[1] = torch.nan
    pairs = torch.tensor([[0, 1, 2], [1, 2, 3]])
    for threshold in (None, 0.5):
        assert grow_regions(x, torch.ones(4), pairs, threshold).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"x": torch.ones(4)}, "wanted [P, C]"),
        ({"sizes": torch.ones(4, dtype=torch.int64)}, "floats [P]"),
        ({"pairs": torch.tensor([[0, 4], [1, 0]])}, "from 0 to 3"),
        ({"pairs": torch.zeros(3, 2, dtype=torch.int64)}, "wanted [2, E]"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"largest": 0}, "largest is 0"),
        ({"spare": torch.tensor([1])}, "wanted both or none"),
        ({"group": torch.tensor([0, 0, 1, 0]), "spare": torch.tensor([1])}, "from 0 to 0"),
        ({"block": torch.zeros(3, dtype=torch.int64)}, "block is [3], wanted [4]"),
        ({"block": torch.zeros(4)}, "wanted torch.int64"),
    ],
)
def test_arguments_that_do_not_fit(given, told):
    fitting = {"x": torch.ones(4, 3), "sizes": torch.ones(4), "pairs": torch.tensor([[0], [1]])}
    with pytest.raises(ValueError) as error:
        grow_regions(**fitting | given)
    assert told in str(error.value)
