"""Compaction of tensors by rows: gather some, add to some."""

import torch

from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.rows import reference

__all__ = ["add_rows", "gather_rows"]

register("gather_rows", "reference", reference.gather_rows)
register("add_rows", "reference", reference.add_rows)


def gather_rows(x: torch.Tensor, index: torch.Tensor, dim: int = -2, backend: str = "auto") -> torch.Tensor:
    """Rows of `x` at `index`.

    Args:
        x: any tensor; [..., N, C] for a batched index.
        index: [K] int64, the same rows everywhere, or [..., K] with `x`'s leading sizes, rows of its own for
            each.
        dim: the dimension the rows are on; a batched index takes only the last but one.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        A new tensor like `x` with K rows along `dim`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: an explicit backend that is not there.
    """
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim is {dim}, wanted a dimension of x {list(x.shape)}")
    if index.dim() != 1 and dim % x.dim() != x.dim() - 2:
        raise ValueError(f"dim is {dim}, wanted -2 of x {list(x.shape)} for a batched index {list(index.shape)}")
    _check_index(x, index)
    _, run = resolve("gather_rows", backend, x)
    return run(x, index, dim)


def add_rows(
    x: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, inplace: bool = False, backend: str = "auto"
) -> torch.Tensor:
    """`x` with `rows` added to its rows at `index`; rows for one place add up.

    Args:
        x: [..., N, C].
        index: [K] int64, the same places everywhere, or [..., K] with `x`'s leading sizes.
        rows: [..., K, C] in `x`'s dtype.
        inplace: write into `x` instead of a copy of it.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [..., N, C]: `x` itself if `inplace`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: an explicit backend that is not there.
    """
    _check_index(x, index)
    wanted = (*x.shape[:-2], index.shape[-1], x.shape[-1])
    if tuple(rows.shape) != wanted or rows.dtype != x.dtype:
        raise ValueError(f"rows is {rows.dtype} {list(rows.shape)}, wanted {x.dtype} {list(wanted)}")
    _, run = resolve("add_rows", backend, x, rows)
    return run(x if inplace else x.clone(), index, rows)


def _check_index(x: torch.Tensor, index: torch.Tensor) -> None:
    if index.dtype != torch.int64 or index.dim() == 0:
        raise ValueError(f"index is {index.dtype} {list(index.shape)}, wanted int64 [K] or [..., K]")
    if index.dim() != 1 and index.shape[:-1] != x.shape[:-2]:
        raise ValueError(f"index is {list(index.shape)}, wanted [K] or {[*x.shape[:-2], 'K']} for x {list(x.shape)}")
