"""Tokens that become part of others: means by size, and the layout that is left."""

from __future__ import annotations

from dataclasses import replace

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
    own, owner = layout.on_host, owner.cpu()  # how many stay must be known there
    stays = owner == torch.arange(len(own))
    index, gone = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
    target, weight = torch.searchsorted(index, owner[gone]), own.size.where(own.size > 0, 1)
    size = own.size[index].index_add(0, target, own.size[gone])
    facts = (index, gone, target, weight[index], weight[gone], size, owner)
    rows, left, into, heavy, light, sizes, owners = (x.to(layout.device, non_blocking=True) for x in facts)
    kept, others = gather_rows(inputs_embeds, rows), gather_rows(inputs_embeds, left)
    embeds, _ = merge_rows(kept, others, into, heavy, light)
    merged = layout.merge(rows, sizes, owners)
    return embeds, merged if own is layout else replace(merged, host=replace(own.select(index), size=size))
