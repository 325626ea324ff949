"""How the tokens of an image lie over its picture."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mminfer.inspection.facts import Mask, Rows


def grids_of(rows: Rows, is_patch: Mask, position: NDArray[np.float64]) -> tuple[Rows, ...]:
    """The grids that show every patch of an image once: usually one; of LLaVA-NeXT's tiles a second one.

    By the axes of M-RoPE where there are any, else by newlines and gaps between the rows, else a square if the count
    is one, else all in one line.

    Args:
        rows: [n] of one image in the prompt, ascending.
        is_patch: [n], false at newlines.
        position: [A, n], where the host places them.

    Returns:
        [h, w] each, entries of `rows`.
    """
    patches = rows[is_patch]
    if len(position) == 3:
        grid = _by_axes(patches, position[1:, is_patch])
        if grid is not None:
            return (grid,)
    runs = _runs(rows, is_patch)
    if len(runs) > 1:
        width = len(runs[1])
        if all(len(run) == width for run in runs[1:]) and len(runs[0]) >= width:
            whole, first = np.split(runs[0], [len(runs[0]) - width])
            tiled = np.stack([first, *runs[1:]])
            return (_by_count(whole), tiled) if len(whole) else (tiled,)
    return (_by_count(patches),)


def _by_axes(patches: Rows, axes: NDArray[np.float64]) -> Rows | None:
    """[h, w]; None where the positions do not fill a grid."""
    if not len(patches):
        return None
    places = np.rint(axes - axes.min(1, keepdims=True)).astype(np.int64)
    height, width = (int(n) + 1 for n in places.max(1))
    if height * width != len(patches):
        return None
    grid = np.full((height, width), -1, np.int64)
    grid[places[0], places[1]] = patches
    return None if (grid < 0).any() else grid


def _runs(rows: Rows, is_patch: Mask) -> list[Rows]:
    """Patches without a newline or anything else between them."""
    patches, newlines_before = rows[is_patch], np.cumsum(~is_patch)[is_patch]
    breaks = np.flatnonzero((np.diff(patches) > 1) | (np.diff(newlines_before) > 0)) + 1
    return np.split(patches, breaks)


def _by_count(patches: Rows) -> Rows:
    side = math.isqrt(len(patches))
    return patches.reshape((side, side) if side * side == len(patches) else (1, -1))
