"""Weighted mean of rows and all the rows mapped to them."""

import torch

from mminfer_kernels.backends import native_takes, on_cuda, triton_takes
from mminfer_kernels.checks import check_floats, check_places, check_tensors
from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.merge_rows import reference
from mminfer_kernels.tracing import traceable

__all__ = ["merge_rows"]

register("merge_rows", "reference", reference.merge_rows)
register("merge_rows", "triton", "mminfer_kernels.merge_rows.triton_kernel:merge_rows", triton_takes, on_cuda)
register("merge_rows", "native", "mminfer_kernels.merge_rows.native:merge_rows", native_takes)


def _fake(dst: torch.Tensor, src: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(torch.promote_types(dst.dtype, src.dtype), torch.float32)
    return torch.empty_like(dst, memory_format=torch.contiguous_format), dst.new_empty(dst.shape[:-1], dtype=dtype)


@traceable(_fake)
def merge_rows(
    dst: torch.Tensor,
    src: torch.Tensor,
    index: torch.Tensor,
    dst_weight: torch.Tensor | None = None,
    src_weight: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean of each destination and all the sources mapped to it.

    `(dst * dst_weight + sum of src * src_weight) / (dst_weight + sum of src_weight)`

    Args:
        dst: [..., T, C], the rows merged into.
        src: [..., S, C], the rows merged.
        index: [..., S] int64: the place in T of each source.
        dst_weight: [..., T] positive; None means 1.
        src_weight: [..., S], 0 leaves a source out; None means 1.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        merged [..., T, C] in `dst`'s dtype, accumulated in float32 or better; weight [..., T], the
        denominators. On CPU the sums are always taken in the order of `src`, so the result is deterministic;
        on CUDA the reference is only under `torch.use_deterministic_algorithms(True)`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: an explicit backend that is not there.

    Reference:
        AIM (arXiv 2412.03248), token merging; LOOK-M (arXiv 2406.18139), key and value merging.
    """
    check_tensors({"dst": dst, "src": src, "index": index}, {"dst_weight": dst_weight, "src_weight": src_weight})
    if dst.dim() < 2 or src.dim() != dst.dim() or (*dst.shape[:-2], dst.shape[-1]) != (*src.shape[:-2], src.shape[-1]):
        raise ValueError(f"dst is {list(dst.shape)} and src {list(src.shape)}, wanted [..., T, C] and [..., S, C]")
    if index.shape != src.shape[:-1] or index.dtype != torch.int64:
        raise ValueError(f"index is {index.dtype} {list(index.shape)}, wanted int64 {list(src.shape[:-1])}")
    for name, weight, rows in (("dst_weight", dst_weight, dst), ("src_weight", src_weight, src)):
        check_floats(**{name: rows})
        if weight is not None and (weight.shape != rows.shape[:-1] or weight.is_complex()):
            raise ValueError(f"{name} has shape {list(weight.shape)}, wanted {list(rows.shape[:-1])}")
    check_places(index, dst.shape[-2])
    _, run = resolve("merge_rows", backend, dst, src)
    return run(dst, src, index, dst_weight, src_weight)
