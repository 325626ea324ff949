"""What every binding to the C++ library needs: dtypes by number, pointers, strides, and a call that checks."""

import ctypes
from typing import Any

import torch

from mminfer_kernels.backends import FLOATS
from mminfer_kernels.build import library
from mminfer_kernels.dispatch import BackendError

DTYPE_CODES = {dtype: code for code, dtype in enumerate(FLOATS)}


class Rows3(ctypes.Structure):
    """Strides of [B, heads, rows, D] in elements."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]

    @classmethod
    def of(cls, x: torch.Tensor) -> "Rows3":
        return cls(*x.stride()[:3])


def call(name: str, *arguments: Any) -> None:
    """Runs `mminfer_<name>` of the library.

    Raises:
        BackendError: there is no library.
        MemoryError: it found no memory for its scratch.
    """
    loaded = library()
    if loaded is None:
        raise BackendError(f"{name}: there are no native CPU kernels on this machine")
    if getattr(loaded, f"mminfer_{name}")(*arguments):
        raise MemoryError(f"{name}: no memory for the kernel's scratch")


def pointer(x: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's first element; null for None.

    Raises:
        BackendError: the tensor has no memory of its own, or elements that lie across words.
    """
    if x is None:
        return ctypes.c_void_p(None)
    address = x.data_ptr()
    if address % x.element_size() or (not address and x.numel()):
        raise BackendError(f"native: {x.dtype} {list(x.shape)} at address {address}, wanted memory of whole words")
    return ctypes.c_void_p(address)


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def as_batch(x: torch.Tensor) -> torch.Tensor:
    """[..., N, C] as [B, N, C] with contiguous rows; a view wherever one exists."""
    x = rows_contiguous(x)
    return x[None] if x.dim() == 2 else x if x.dim() == 3 else x.flatten(0, -3)
