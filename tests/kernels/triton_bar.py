"""What the tests of Triton kernels share: the bar they have to meet, and memory that is never innocently zero."""

import pytest
import torch

FLOOR = 2e-6  # of values near 1: a float32 sum in another order


def wide(x):
    """In float64, where a number can be."""
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def meets_the_bar(op, *args, floor=FLOOR, **settings):
    """Flash attention's rule: at most twice the error of the reference in the same dtype; indices are the same.

    Returns:
        What the Triton backend returned.
    """
    found = op(*args, backend="triton", **settings)
    plain = op(*args, backend="reference", **settings)
    truth = op(*map(wide, args), backend="reference", **{name: wide(x) for name, x in settings.items()})
    for mine, theirs, exact in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, plain, truth)), strict=True):
        assert (mine.dtype, mine.shape, mine.device) == (theirs.dtype, theirs.shape, theirs.device)
        if not mine.is_floating_point():
            assert torch.equal(mine, exact)
        elif mine.numel():
            assert mine.isfinite().all()
            error, allowed = (mine.double() - exact).abs().max(), (theirs.double() - exact).abs().max()
            # Of few numbers in half precision the reference may be lucky: to round the result is allowed.
            step = floor if mine.dtype.itemsize > 2 else max(floor, torch.finfo(mine.dtype).eps / 2)
            assert error <= 2 * allowed + step * max(1.0, exact.abs().max().item()), (error, allowed)
    return found


@pytest.fixture
def dirty_memory(monkeypatch):
    """`torch.empty` returns NaN, so that an element no kernel writes shows."""

    def dirty(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            return (
                x.fill_(float("nan")) if x.is_floating_point() else x.fill_(1) if x.dtype == torch.bool else x.fill_(77)
            )

        return empty

    monkeypatch.setattr(torch, "empty", dirty(torch.empty))
    monkeypatch.setattr(torch, "empty_like", dirty(torch.empty_like))
