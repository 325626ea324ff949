"""Lots that techniques draw: the baselines that every rule must beat."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_lot(shape: tuple[int, ...], seed: int, layer_idx: int, like: Tensor) -> Tensor:
    """Uniform numbers of this shape, the same for the same seed and layer, on the device of `like`."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer_idx)
    return torch.rand(shape, generator=generator, dtype=torch.float32).to(like.device, non_blocking=True)
