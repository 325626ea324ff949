"""Peak memory of a stretch of code, and bytes of a full cache."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


class Peak:
    """`bytes`: the highest memory in use while the block ran; on a GPU what torch allocated, else resident memory."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measures the block's own peak where the system can start a peak afresh (CUDA, Linux), else the process's."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    try:
        yield peak
    finally:
        peak.bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_peak()


def bytes_in_use(device: torch.device) -> int:
    """Memory in use now: on a GPU what torch allocated, else resident memory of the process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def give_back_freed() -> None:
    """Hands freed memory of this process to the system where that is possible (glibc), so that a peak is its own."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # TypeError: Windows opens no nameless library
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Memory of the process that is in use now, where the system tells (Linux); else the highest so far."""
    return _of_status("VmRSS:") or _resident_peak()


def _of_status(name: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
    return 0


def _resident_peak() -> int:
    peak = _of_status("VmHWM:")
    if peak:
        return peak
    try:
        import resource
    except ImportError:
        return _windows_peak()
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else 1024 * usage


def _windows_peak() -> int:
    """The highest working set of the process, by psutil, which accelerate brings; elsewhere the present one."""
    import psutil

    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def full_cache_bytes(spec: ModelSpec, tokens: Sequence[int], element_size: int) -> int:
    """Keys and values of all tokens in all layers; of a window, what a next token sees."""
    full = spec.num_layers - len(spec.sliding_layers)
    entries = full * sum(tokens)
    if spec.sliding_window is not None:
        entries += len(spec.sliding_layers) * sum(min(n, spec.sliding_window - 1) for n in tokens)
    return 2 * entries * spec.num_key_value_heads * spec.head_dim * element_size


def show_bytes(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
