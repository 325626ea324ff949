"""Rotation in C++ (`csrc/cpu/rotary.cpp`)."""

import ctypes

import torch

from mminfer_kernels.native import DTYPE_CODES, Rows3, call, pointer
from mminfer_kernels.rotary import reference


class RotaryArgs(ctypes.Structure):
    """`RotaryArgs` of `csrc/cpu/rotary.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("position", "inv_freq", "axes", "q", "k", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "tokens", "half")),
        ("q_stride", Rows3),
        ("k_stride", Rows3),
        ("threads", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    ]


class ApplyArgs(ctypes.Structure):
    """`ApplyArgs` of `csrc/cpu/rotary.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "out")),
        *((name, ctypes.c_int64) for name in ("leading", "heads", "tokens", "half")),
        *((name, ctypes.c_int64) for name in ("x_leading", "x_head", "x_row", "table_leading", "threads")),
    ]


@torch.no_grad()
def rotary_table(
    position: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float,
    axes: list[int] | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.rotary_table`; `axes` names the position axis of each frequency."""
    if dtype not in DTYPE_CODES:
        return reference.rotary_table(position, inv_freq, attention_scaling, axes, dtype)
    leading = position.shape if axes is None else position.shape[1:]
    cos = torch.empty(*leading, 2 * inv_freq.shape[0], dtype=dtype)
    sin = torch.empty_like(cos)
    if cos.numel():
        args = _args(position, inv_freq, attention_scaling, axes, leading.numel())
        args.cos, args.sin = pointer(cos), pointer(sin)
        call("rotary_table", ctypes.byref(args), DTYPE_CODES[dtype])
    return cos, sin


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
    if q.dtype != k.dtype or q.stride(-1) != 1 or k.stride(-1) != 1:
        reference.rotary(q, k, position, inv_freq, attention_scaling, axes)
    elif q.shape[0] and q.shape[2]:
        args = _args(position, inv_freq, attention_scaling, axes, q.shape[2])
        args.batch, args.heads, args.groups = q.shape[0], q.shape[1], k.shape[1]
        args.q, args.k, args.q_stride, args.k_stride = pointer(q), pointer(k), Rows3.of(q), Rows3.of(k)
        call("rotary", ctypes.byref(args), DTYPE_CODES[q.dtype])


@torch.no_grad()
def apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.apply_rotary`; the arithmetic is float32, rounded once."""
    return _apply(q, cos, sin), _apply(k, cos, sin)


def _apply(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows = x[None] if x.dim() == 3 else x if x.dim() == 4 else x.reshape(-1, *x.shape[-3:])
    table = cos.shape[-2:]
    if cos.dim() > 2:
        cos, sin = (y.expand(*x.shape[:-3], *table) for y in (cos, sin))
    cos, sin = (y.reshape(-1, *table).contiguous() for y in (cos, sin))
    args = ApplyArgs(
        pointer(rows), pointer(cos), pointer(sin), pointer(out), rows.shape[0], rows.shape[1], rows.shape[2],
        rows.shape[3] // 2, *rows.stride()[:3], table.numel() if cos.shape[0] > 1 else 0, torch.get_num_threads(),
    )  # fmt: skip
    call("apply_rotary", ctypes.byref(args), DTYPE_CODES[x.dtype], DTYPE_CODES[cos.dtype])
    return out


def _args(
    position: torch.Tensor, inv_freq: torch.Tensor, scaling: float, axes: list[int] | None, tokens: int
) -> RotaryArgs:
    """For one batch row of `tokens`; the tensors must live until the call is over."""
    position, inv_freq = position.contiguous(), inv_freq.float().contiguous()
    axis = None if axes is None else torch.tensor(axes)
    args = RotaryArgs(
        position=pointer(position), inv_freq=pointer(inv_freq), axes=pointer(axis), batch=1, tokens=tokens,
        half=inv_freq.shape[0], threads=torch.get_num_threads(), scaling=scaling,
    )  # fmt: skip
    args.tensors = (position, inv_freq, axis)
    return args
