"""Gathering and adding of rows in plain PyTorch.

Batched indices are flattened: `index_select` and `index_add_` copy whole rows, `gather` and `scatter_add_` go
element by element, which measures 5 to 15 times slower on CPU.
"""

import torch
from torch.nn.functional import silu


def flat_index(index: torch.Tensor, rows: int) -> torch.Tensor:
    """Places in [B * N, C] of batched places in [B, N, C]: `index` [..., K] plus N a step of the batch."""
    if index.dim() == 1:
        return index
    leading = index.shape[:-1]
    offset = torch.arange(leading.numel(), device=index.device).mul_(rows)
    return (index + offset.view(*leading, 1)).flatten()


def gather_rows(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """See `mminfer_kernels.gather_rows`."""
    if index.dim() == 1:
        return x.index_select(dim, index)
    flat = x.flatten(0, -2).index_select(0, flat_index(index, x.shape[-2]))
    return flat.view(*index.shape, x.shape[-1])


def add_rows(x: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Write into `x`; see `mminfer_kernels.add_rows`."""
    if index.dim() == 1:
        x.index_add_(-2, index, rows)
    elif x.is_contiguous():
        x.flatten(0, -2).index_add_(0, flat_index(index, x.shape[-2]), rows.flatten(0, -2))
    else:
        x.scatter_add_(-2, index[..., None].expand_as(rows), rows)


@torch.no_grad()
def gather_rms_norm(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `mminfer_kernels.gather_rms_norm`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = gather_rows(x, index, -2).to(dtype)
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return (rows * weight.to(dtype)).to(x.dtype)


@torch.no_grad()
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `mminfer_kernels.swiglu`."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    return (silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)
