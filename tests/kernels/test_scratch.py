"""No op ever holds anything near an N x N matrix."""

import pytest
import torch
from mminfer_kernels import best_match, column_mass, power_iterate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOKENS, HEADS = 2000, 2


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        self.elements = max(self.elements, *sizes, 0)
        return out


def attention(op, **settings):
    op(torch.randn(1, HEADS, TOKENS, 16), torch.randn(1, 1, TOKENS, 16), **settings)


CALLS = {
    "column_mass": lambda: attention(column_mass),
    "column_mass of every third query": lambda: column_mass(
        torch.randn(1, HEADS, 667, 16), torch.randn(1, 1, TOKENS, 16), query_index=torch.arange(0, TOKENS, 3)
    ),
    "column_mass not causal": lambda: attention(column_mass, causal=False),
    "power_iterate": lambda: attention(power_iterate),
    "best_match": lambda: best_match(torch.randn(HEADS, TOKENS, 16), torch.randn(HEADS, TOKENS, 16)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_scratch_stays_far_below_n_squared(call):
    with LargestTensor() as largest:
        call()
    assert TOKENS < largest.elements <= 128 * HEADS * TOKENS  # 128 rows a head: 1/15 of the whole
