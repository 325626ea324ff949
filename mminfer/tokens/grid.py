"""Where the tokens of an image stand in its grid, as far as a layout tells."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mminfer.layout import TokenLayout


def image_views(layout: TokenLayout) -> list[Tensor]:
    """Rows ([n] int64, ascending) of the tokens that stand for patches, one tensor for each view of an image.

    An image is one view; but where a small view of the whole stands before the lines of a larger one, as in
    LLaVA-NeXT, these are two.
    """
    patches = ((layout.image_id >= 0) & (layout.size > 0)).nonzero()[:, 0]
    if len(patches) == 0:
        return []
    _, counts = layout.image_id[patches].unique_consecutive(return_counts=True)
    return [view for rows in patches.split(counts.tolist()) for view in _views(rows)]


def _views(rows: Tensor) -> list[Tensor]:
    """The rows of one image by view: the lines of the last one are as long as its last line."""
    ends = [*((rows.diff() > 1).nonzero()[:, 0] + 1).tolist(), len(rows)]
    if len(ends) == 1:
        return [rows]
    small = ends[0] - (ends[-1] - ends[-2])
    return [rows[:small], rows[small:]] if small > 0 else [rows]


def patch_places(rows: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Line and column of each token of one view.

    By the axes of M-RoPE where the model has them; else by the marks between lines (newlines, breaks), else as a
    square; tokens that form no grid stand in one line.

    Args:
        rows: [n] int64, ascending, of `image_views`.
        layout: the prompt, before anything left it.

    Returns:
        y and x, [n] int64 each, from 0.
    """
    count, order = len(rows), torch.arange(len(rows), device=rows.device)
    if layout.position.shape[0] == 3:
        y, x = (layout.position[axis, rows].unique(return_inverse=True)[1] for axis in (1, 2))
        if torch.stack([y, x]).unique(dim=1).shape[1] == count:
            return y, x
    line = torch.cat([rows.new_zeros(1), (rows.diff() > 1).cumsum(0)])
    lines = int(line[-1]) + 1
    width = math.isqrt(count) if lines == 1 else count // lines
    if count % width == 0 and ((lines == 1 and width**2 == count) or torch.equal(line, order // width)):
        return order // width, order % width
    return torch.zeros_like(order), order
