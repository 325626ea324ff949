"""Tokens that become part of others: means by size, and the layout that is left."""

from __future__ import annotations

import torch
from mminfer_kernels import gather_rows, merge_rows
from torch import Tensor

from mminfer.layout import TokenLayout


def average(inputs_embeds: Tensor, layout: TokenLayout, owner: Tensor) -> tuple[Tensor, TokenLayout]:
    """Joins each token to its owner: the mean of their patches.

    Args:
        inputs_embeds: [T, C].
        layout: of these T rows.
        owner: [T] int64: the row that each row becomes part of; its own where it stays.

    Returns:
        [K, C] and its layout.
    """
    stays = owner == torch.arange(len(layout), device=owner.device)
    index, gone = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
    target, weight = torch.searchsorted(index, owner[gone]), layout.size.where(layout.size > 0, 1)
    kept, left = gather_rows(inputs_embeds, index), gather_rows(inputs_embeds, gone)
    embeds, _ = merge_rows(kept, left, target, weight[index], weight[gone])
    return embeds, layout.merge(index, layout.size[index].index_add(0, target, layout.size[gone]), owner)
