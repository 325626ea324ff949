"""Merging of rows in plain PyTorch."""

import torch

from mminfer_kernels.rows.reference import flat_index


@torch.no_grad()
def merge_rows(
    dst: torch.Tensor,
    src: torch.Tensor,
    index: torch.Tensor,
    dst_weight: torch.Tensor | None,
    src_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.merge_rows`."""
    dtype = torch.promote_types(torch.promote_types(dst.dtype, src.dtype), torch.float32)
    place = flat_index(index, dst.shape[-2])
    total = _weighted(dst.to(dtype, copy=True), dst_weight).flatten(0, -2)
    total.index_add_(0, place, _weighted(src.to(dtype), src_weight).flatten(0, -2))
    weight = _weights(dst_weight, dst, dtype).flatten()
    weight.index_add_(0, place, _weights(src_weight, src, dtype).flatten())
    merged = total.div_(weight[:, None]).to(dst.dtype)
    return merged.view(dst.shape), weight.view(dst.shape[:-1])


def _weighted(rows: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return rows if weight is None else rows * weight[..., None].to(rows.dtype)


def _weights(weight: torch.Tensor | None, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if weight is None:
        return torch.ones(rows.shape[:-1], dtype=dtype, device=rows.device)
    return weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
