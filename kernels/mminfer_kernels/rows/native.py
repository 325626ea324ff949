"""Rows in C++ (`csrc/cpu/rows.cpp`)."""

import ctypes

import torch

from mminfer_kernels.native import DTYPE_CODES, as_batch, call, pointer
from mminfer_kernels.rows import reference


class RowsArgs(ctypes.Structure):
    """`RowsArgs` of `csrc/cpu/rows.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "other", "index", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "rows", "picked", "columns", "x_batch", "x_row")),
        *((name, ctypes.c_int64) for name in ("other_batch", "other_row", "index_batch", "threads")),
        ("eps", ctypes.c_float),
    ]


@torch.no_grad()
def add_rows(x: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Write into `x`; see `mminfer_kernels.add_rows`."""
    into = x[None] if x.dim() == 2 else x if x.dim() == 3 else x.flatten(0, -3) if x.is_contiguous() else None
    if into is None or into.stride(-1) != 1:
        reference.add_rows(x, index, rows)
    elif rows.numel():
        args = _args(into, index)
        added = as_batch(rows)
        args.other, args.out, args.other_batch, args.other_row = pointer(added), args.x, *added.stride()[:2]
        call("add_rows", ctypes.byref(args), DTYPE_CODES[x.dtype])


@torch.no_grad()
def gather_rms_norm(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `mminfer_kernels.gather_rms_norm`."""
    out = x.new_empty(*x.shape[:-2], index.shape[-1], x.shape[-1])
    if out.numel():
        weight, source = weight.contiguous(), as_batch(x)
        args = _args(source, index)
        args.other, args.out, args.eps = pointer(weight), pointer(out), eps
        call("gather_rms_norm", ctypes.byref(args), DTYPE_CODES[x.dtype])
    return out


@torch.no_grad()
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `mminfer_kernels.swiglu`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    count, threads = ctypes.c_int64(gate.numel()), ctypes.c_int64(torch.get_num_threads())
    call("swiglu", pointer(gate), pointer(up), pointer(out), count, threads, DTYPE_CODES[gate.dtype])
    return out


def _args(x: torch.Tensor, index: torch.Tensor) -> RowsArgs:
    """For `x` [B, N, C]; the tensors must live until the call is over."""
    index = index.contiguous()
    args = RowsArgs(
        x=pointer(x), index=pointer(index), batch=x.shape[0], rows=x.shape[1], picked=index.shape[-1],
        columns=x.shape[2], x_batch=x.stride(0), x_row=x.stride(1),
        index_batch=0 if index.dim() == 1 else index.shape[-1], threads=torch.get_num_threads(),
    )  # fmt: skip
    args.tensors = (x, index)
    return args
