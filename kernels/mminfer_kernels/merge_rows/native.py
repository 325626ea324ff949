"""Merging of rows in C++ on the CPU (`csrc/cpu/rows.cpp`), in CUDA on a GPU."""

import ctypes

import torch

from mminfer_kernels.merge_rows import reference
from mminfer_kernels.native import DTYPE_CODES, as_batch, call, pointer


class MergeArgs(ctypes.Structure):
    """`MergeArgs` of `csrc/cpu/rows.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dst", "src", "index", "dst_weight", "src_weight", "merged", "weight")),
        *((name, ctypes.c_int64) for name in ("batch", "targets", "sources", "columns")),
        *((name, ctypes.c_int64) for name in ("dst_batch", "dst_row", "src_batch", "src_row", "threads")),
    ]


@torch.no_grad()
def merge_rows(
    dst: torch.Tensor,
    src: torch.Tensor,
    index: torch.Tensor,
    dst_weight: torch.Tensor | None,
    src_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.merge_rows`."""
    if dst.is_cuda:
        from mminfer_kernels.merge_rows.cuda_kernel import merge_rows as on_gpu

        return on_gpu(dst, src, index, dst_weight, src_weight)
    if src.dtype != dst.dtype:
        merged, weight = merge_rows(dst.float(), src.float(), index, dst_weight, src_weight)
        return merged.to(dst.dtype), weight
    merged = torch.empty_like(dst, memory_format=torch.contiguous_format)
    weight = torch.empty(dst.shape[:-1], dtype=torch.float32)
    if merged.numel() == 0:
        return reference.merge_rows(dst, src, index, dst_weight, src_weight)
    into, rows = as_batch(dst), as_batch(src)
    index = index.contiguous()
    weights = [None if w is None else w.to(torch.float32).contiguous() for w in (dst_weight, src_weight)]
    args = MergeArgs(
        pointer(into), pointer(rows), pointer(index), *map(pointer, weights), pointer(merged), pointer(weight),
        into.shape[0], into.shape[1], rows.shape[1], into.shape[2], *into.stride()[:2], *rows.stride()[:2],
        torch.get_num_threads(),
    )  # fmt: skip
    call("merge_rows", ctypes.byref(args), DTYPE_CODES[into.dtype])
    return merged, weight
