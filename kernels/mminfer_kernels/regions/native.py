"""Regions and products of pairs of rows in C++ (`csrc/cpu/regions.cpp`)."""

import ctypes
import math

import torch

from mminfer_kernels.native import DTYPE_CODES, call, pointer, rows_contiguous
from mminfer_kernels.regions.reference import COSINE_ROUNDING


class DotsArgs(ctypes.Structure):
    """`DotsArgs` of `csrc/cpu/regions.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "first", "second", "out")),
        *((name, ctypes.c_int64) for name in ("pairs", "columns", "row", "threads")),
    ]


class GrowArgs(ctypes.Structure):
    """`GrowArgs` of `csrc/cpu/regions.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "sizes", "pairs", "group", "spare", "block", "owner")),
        *((name, ctypes.c_int64) for name in ("count", "columns", "edges", "groups", "threads")),
        *((name, ctypes.c_float) for name in ("threshold", "largest", "least_cost")),
    ]


@torch.no_grad()
def row_dots(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """See `mminfer_kernels.row_dots`."""
    x, first, second = rows_contiguous(x), first.contiguous(), second.contiguous()
    out = torch.empty(len(first), dtype=torch.float32)
    if out.numel():
        args = DotsArgs(
            *map(pointer, (x, first, second, out)), len(first), x.shape[1], x.stride(0), torch.get_num_threads()
        )
        call("row_dots", ctypes.byref(args), DTYPE_CODES[x.dtype])
    return out


@torch.no_grad()
def grow_regions(
    x: torch.Tensor,
    sizes: torch.Tensor,
    pairs: torch.Tensor,
    threshold: float | None,
    largest: int | None,
    group: torch.Tensor | None,
    spare: torch.Tensor | None,
    block: torch.Tensor | None,
) -> torch.Tensor:
    """See `mminfer_kernels.grow_regions`."""
    rows, weights, pairs = x.float().contiguous(), sizes.float().contiguous(), pairs.contiguous()
    of_regions = [None if column is None else column.contiguous() for column in (group, spare, block)]
    owner = torch.empty(len(x), dtype=torch.int64)
    args = GrowArgs(
        *map(pointer, (rows, weights, pairs, *of_regions, owner)),
        *(*rows.shape, pairs.shape[1], 1 if spare is None else len(spare), torch.get_num_threads()),
        math.nan if threshold is None else threshold - COSINE_ROUNDING,
        math.inf if largest is None else largest,
        COSINE_ROUNDING,
    )
    call("grow_regions", ctypes.byref(args))
    return owner
