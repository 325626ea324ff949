"""Which backends this machine has, and which tensors each can take."""

import functools
import importlib.util
import os

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def on_cuda(*tensors: torch.Tensor) -> bool:
    """Whether all tensors are on a GPU: where "auto" takes Triton."""
    return all(x.is_cuda for x in tensors)


def triton_takes(*tensors: torch.Tensor) -> bool:
    """Whether Triton kernels can run on these tensors: on a GPU, or on the CPU under Triton's interpreter."""
    if not has_triton() or not _floats(tensors):
        return False
    return on_cuda(*tensors) or (interpreted() and _on_cpu(tensors))


def cpu_takes(*tensors: torch.Tensor) -> bool:
    """Whether the C++ library can run on these tensors; builds it if it is not there yet."""
    if not _on_cpu(tensors) or not all(x.dtype in FLOATS and x.data_ptr() % x.element_size() == 0 for x in tensors):
        return False
    from mminfer_kernels.build import library

    return library() is not None


def native_takes(*tensors: torch.Tensor) -> bool:
    """Whether C++ on the CPU or CUDA can run on these tensors, for the ops that have both."""
    if not on_cuda(*tensors):
        return cpu_takes(*tensors)
    from mminfer_kernels.cuda import available

    return _floats(tensors) and available()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; nothing is imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels of this process are interpreted, which shows on the CPU and is slow."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def _floats(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Integer and boolean tensors may stand beside them."""
    return all(x.dtype in FLOATS or not x.is_floating_point() for x in tensors)


def _on_cpu(tensors: tuple[torch.Tensor, ...]) -> bool:
    return all(x.device.type == "cpu" for x in tensors)
