"""By how much two implementations may differ: flash-attention's rule, with the reference on float64 inputs as truth."""

import torch
from mminfer_kernels import best_match
from torch.utils._pytree import tree_leaves, tree_map

# Where the reference happens to be exact, rounding the result once to the kernel's dtype must still be allowed: four
# units in its last place, of the largest true value. In float32 eight times that, as sums are taken in another order
# and 2^x, sine and cosine are polynomials within 1e-7.
FLOOR_STEPS = {torch.float32: 32, torch.bfloat16: 4, torch.float16: 4}


def as_double(inputs):
    """Floating tensors of any nesting as float64, everything else as it is."""
    return tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs)


def error(found, truth):
    """Largest absolute difference; infinite if anything is not finite."""
    if found.numel() == 0:
        return 0.0
    return float((found.detach().double() - truth).abs().max().nan_to_num(torch.inf))


def assert_agrees(found, reference, truth, least_size=0.0, floor_steps=None):
    """`err(found) <= 2 * err(reference in the same dtype) + floor` for each tensor; integers are equal.

    The floor is relative to the largest true value, or to `least_size` where that is larger; so many steps of the
    dtype's eps, those of `FLOOR_STEPS` unless told.
    """
    for ours, theirs, exact in zip(*map(tree_leaves, (found, reference, truth)), strict=True):
        assert ours.shape == exact.shape and ours.dtype == theirs.dtype
        if not ours.is_floating_point():
            assert torch.equal(ours, exact)
            continue
        size = max(least_size, float(exact.abs().max()) if exact.numel() else 0.0)
        steps = FLOOR_STEPS[ours.dtype] if floor_steps is None else floor_steps
        floor = steps * torch.finfo(ours.dtype).eps * size
        assert error(ours, exact) <= 2 * error(theirs, exact) + floor
    return found


def agree(op, *inputs, least_size=0.0, **settings):
    """Runs a public op natively, as the reference, and as the reference on float64 inputs; gives the native result."""
    inputs, settings = list(inputs), dict(settings)
    found = op(*inputs, **settings, backend="native")
    reference = op(*inputs, **settings, backend="reference")
    truth = op(*as_double(inputs), **as_double(settings), backend="reference")
    return assert_agrees(found, reference, truth, least_size)


def agree_on_best_match(src, dst):
    """The native best match is as right as the reference, and no other row is nearer than the one that it chose.

    Two rows may be about as near, and the best cosine may cancel to next to nothing: the bar is the size of the terms
    that cosines sum, and of what was chosen the cosine counts, not the place.
    """
    (similarity, index), (reference, _) = (best_match(src, dst, backend=x) for x in ("native", "reference"))
    src, dst = src.double(), dst.double()
    (truth, _), (terms, _) = (best_match(*x, backend="reference") for x in ((src, dst), (src.abs(), dst.abs())))
    size = float(terms.max()) if terms.numel() else 0.0
    assert_agrees(similarity, reference, truth, least_size=size)
    chosen = torch.nn.functional.cosine_similarity(src, dst.gather(-2, index[..., None].expand_as(src)), -1)
    torch.testing.assert_close(chosen, truth, rtol=0, atol=2e-6)
