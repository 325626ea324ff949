"""Where a model is loaded to, and in which numbers."""

from __future__ import annotations

import torch

from mminfer.errors import InputError


def chosen_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; None: the GPU if there is one, else the CPU.

    Raises:
        InputError: this machine has none such.
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        found = str(error).partition("\n")[0]
        raise InputError(f"device {device!r}: {found}; pass one that this machine has, such as 'cpu'") from error
    return device


def chosen_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    """The dtype asked for; None: float32 on the CPU, else "auto", which is the checkpoint's own.

    Raises:
        InputError: there is none such, or it is not of floating-point numbers.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    named = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if named != "auto" and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise InputError(f"dtype {dtype!r}: wanted float32, bfloat16, float16 or auto")
    return named
