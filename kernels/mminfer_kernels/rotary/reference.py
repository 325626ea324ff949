"""Rotary tables and rotation in plain PyTorch."""

import math

import torch


@torch.no_grad()
def rotary_table(
    position: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float,
    axes: list[int] | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.rotary_table`; `axes` names the position axis of each frequency."""
    position = position[..., None] if axes is None else position.movedim(0, -1)[..., axes]
    angle = position * inv_freq.double()  # [..., N, D / 2]; float64 keeps 2**20 to 2**-33
    angle = torch.remainder(angle, 2 * math.pi)
    if dtype != torch.float64:
        angle = angle.float()
    angle = torch.cat((angle, angle), -1)
    return (angle.cos() * attention_scaling).to(dtype), (angle.sin() * attention_scaling).to(dtype)


def apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.apply_rotary`."""
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # [..., 1, N, D]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


@torch.no_grad()
def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    position: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float,
    axes: list[int] | None,
) -> None:
    """Write into `q` and `k`; see `mminfer_kernels.rotary_`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = rotary_table(position, inv_freq, attention_scaling, axes, dtype)
    for x, rotated in zip((q, k), apply_rotary(q, k, cos, sin), strict=True):
        x.copy_(rotated)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
