"""Cells that repeat an earlier one of their picture, found without looking at most of their pixels."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_LOOK = 16  # values that are compared of all pairs; the others only where these agree


def repeating(one: Tensor, other: Tensor, bound: float) -> Tensor:
    """[...] bool: where two lots of cells ([..., P]) differ by no more than the bound in any value."""
    alike = _within(one[..., :FIRST_LOOK], other[..., :FIRST_LOOK], bound)
    pairs = alike.nonzero(as_tuple=True)
    if len(pairs[0]):
        alike[pairs] = _within(one[pairs], other[pairs], bound)
    return alike


def _within(one: Tensor, other: Tensor, bound: float) -> Tensor:
    return (one == other).all(-1) if bound == 0 else ((one - other).abs() <= bound).all(-1)


def roots(parent: Tensor) -> Tensor:
    """[N] int64: the first of each chain, given the earlier cell ([N] int64) that each follows, or its own number."""
    while True:
        further = parent[parent]
        if torch.equal(further, parent):
            return parent
        parent = further


def bounded(cells: Tensor, parent: Tensor, bound: float) -> Tensor:
    """[N] int64: `roots`, of chains that are cut wherever a cell would lie beyond the bound from what stands for it.

    Args:
        cells: [N, P].
        parent: [N] int64, as of `roots`.
        bound: of the difference of any value; 0: chains are of equal cells.
    """
    own = torch.arange(len(parent), device=parent.device)
    while True:
        owner = roots(parent)
        if bound == 0:
            return owner
        left = (owner != own).nonzero()[:, 0]
        far = torch.zeros_like(own, dtype=torch.bool)
        far[left] = ~repeating(cells[left], cells[owner[left]], bound)
        first = (far & ~far[parent]).nonzero()[:, 0]  # those behind it may be near to it
        if not len(first):
            return owner
        parent = parent.index_copy(0, first, first)
