"""Compaction of tensors by rows: gather some, add to some."""

import torch

from mminfer_kernels.backends import cpu_takes, on_cuda, triton_takes
from mminfer_kernels.checks import (
    check_flag,
    check_floats,
    check_index,
    check_number,
    check_tensors,
    check_writable,
    described,
    share_memory,
)
from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.rows import reference
from mminfer_kernels.tracing import traceable

__all__ = ["add_rows", "gather_rms_norm", "gather_rows", "swiglu"]


def _never(*tensors: torch.Tensor) -> bool:
    """On the CPU torch's own gathers and adds whole rows as fast as memory allows."""
    return False


_ROOM = "mminfer_kernels.rows"
for _op in ("gather_rows", "add_rows", "gather_rms_norm", "swiglu"):
    register(_op, "reference", getattr(reference, _op))
    register(_op, "triton", f"{_ROOM}.triton_kernel:{_op}", triton_takes, on_cuda)
    if _op != "gather_rows":
        register(_op, "native", f"{_ROOM}.native:{_op}", cpu_takes, _never if _op == "add_rows" else None)


def _fake_gather(x: torch.Tensor, index: torch.Tensor, dim: int = -2, *args: object, **kwargs: object) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] = index.shape[-1]
    return x.new_empty(shape)


def _fake_norm(
    x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, *args: object, **kwargs: object
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-2], index.shape[-1], x.shape[-1])


def _fake_like(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@traceable(_fake_gather)
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
        ValueError: shapes or dtypes that do not fit, or places that are not there (`PlaceError`).
        BackendError: an explicit backend that is not there.
    """
    check_tensors({"x": x, "index": index})
    if type(dim) is not int or not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim is {described(dim)}, wanted a dimension of x {list(x.shape)}")
    if index.dim() != 1 and dim % x.dim() != x.dim() - 2:
        raise ValueError(f"dim is {dim}, wanted -2 of x {list(x.shape)} for a batched index {list(index.shape)}")
    check_index(x, index, x.shape[dim])
    _, run = resolve("gather_rows", backend, x)
    return run(x, index, dim)


@traceable(_fake_norm)
def gather_rms_norm(
    x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, backend: str = "auto"
) -> torch.Tensor:
    """RMSNorm of the rows of `x` at `index`, without the gathered rows in memory: `x / sqrt(mean(x^2) + eps) * weight`.

    Args:
        x: [..., N, C].
        index: [K] int64, the same rows everywhere, or [..., K] with `x`'s leading sizes.
        weight: [C], in `x`'s dtype.
        eps: added to the mean square.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [..., K, C] in `x`'s dtype; the norm is float32 or better.

    Raises:
        ValueError: shapes or dtypes that do not fit, or places that are not there (`PlaceError`).
        BackendError: an explicit backend that is not there.
    """
    check_tensors({"x": x, "index": index, "weight": weight})
    if x.dim() < 2 or weight.shape != x.shape[-1:]:
        raise ValueError(f"x is {list(x.shape)}, weight is {list(weight.shape)}, wanted [..., N, C] and [C]")
    check_floats(x=x, weight=weight)
    eps = check_number("eps", eps, least=0)
    check_index(x, index)
    _, run = resolve("gather_rms_norm", backend, x, weight)
    return run(x, index, weight, eps)


@traceable(_fake_like)
def swiglu(gate: torch.Tensor, up: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """`silu(gate) * up` in one pass: what stands between a gated FFN's two products.

    Args:
        gate, up: [..., C], of one shape and dtype.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [..., C] in their dtype; the arithmetic is float32 or better.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: an explicit backend that is not there.
    """
    check_tensors({"gate": gate, "up": up})
    check_floats(gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"gate is {list(gate.shape)} and up {list(up.shape)}, wanted the same")
    _, run = resolve("swiglu", backend, gate, up)
    return run(gate, up)


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
    if not torch.compiler.is_compiling():  # there the op below checks
        check_flag("inplace", inplace)
        check_tensors({"x": x, "index": index, "rows": rows})
    out = x if inplace else x.clone(memory_format=torch.contiguous_format)
    _add_rows_(out, index, rows, backend)
    return out


@traceable(lambda *args, **kwargs: None, mutates=("x",))
def _add_rows_(x: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, backend: str) -> None:
    check_tensors({"x": x, "index": index, "rows": rows})
    check_writable(x=x)
    if x.dim() < 2 or rows.dtype != x.dtype:
        raise ValueError(
            f"x is {list(x.shape)}, rows is {described(rows)}, wanted {x.dtype} [..., N, C] and [..., K, C]"
        )
    check_index(x, index)
    wanted = (*x.shape[:-2], index.shape[-1], x.shape[-1])
    if tuple(rows.shape) != wanted:
        raise ValueError(f"rows is {rows.dtype} {list(rows.shape)}, wanted {x.dtype} {list(wanted)}")
    _, run = resolve("add_rows", backend, x, rows)
    run(x, index, rows.clone() if share_memory(x, rows) else rows)
