"""What each op will run with on this machine, and why not with something faster."""

from typing import NamedTuple

import torch

from mminfer_kernels import build
from mminfer_kernels.backends import has_triton, interpreted
from mminfer_kernels.dispatch import available_backends, backend_for


class Choice(NamedTuple):
    """An op's backend for float32 tensors on one kind of device."""

    op: str
    device: str
    backend: str
    why: str


def choices(op: str) -> list[Choice]:
    """What "auto" takes for an op: on the CPU, and on the GPU where there is one.

    Builds nothing: what waits for the C++ library to be built counts as native.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    for device in devices:
        assumed = "native" if device == "cpu" and build.is_pending() else None
        backend = backend_for(op, torch.empty(1, device=device), assumed=assumed)
        found.append(Choice(op, device, backend, _why(op, device, backend)))
    return found


def _why(op: str, device: str, backend: str) -> str:
    if backend == "native":
        if device == "cuda":
            return "CUDA kernels, compiled by NVRTC when first run"
        return f"C++ for {build.native_isa()}{', not built yet' if build.is_pending() else ''}"
    if backend == "triton":
        return "Triton, compiled when first run"
    if device == "cuda":
        return "Triton is not installed" if not has_triton() else "no kernel for this device"
    missed = "native" in available_backends(op) and not build.is_pending() and build.library() is None
    return build.status() if missed else "torch's own is as fast"


def triton_status() -> str:
    """Whether Triton kernels can run here."""
    if not has_triton():
        return "not installed"
    if torch.cuda.is_available():
        return "installed"
    return "interpreted, for tests" if interpreted() else "installed, but there is no GPU"
