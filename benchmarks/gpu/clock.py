"""Time on a GPU: by its own events, by the wall, and what a profiler counted on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LONG_S = 0.5  # a run that takes longer is repeated less often


@dataclass(frozen=True)
class Timing:
    """What one run takes.

    Args:
        ms: the median.
        first_ms: of the first call, which compiles and tunes.
    """

    ms: float
    first_ms: float

    @property
    def columns(self) -> dict[str, float]:
        """As columns of a row."""
        return {"ms": round(self.ms, 4), "first_ms": round(self.first_ms, 2)}


@dataclass(frozen=True)
class Counted:
    """What one run asks of the GPU.

    Args:
        gpu_ms: time in which it was busy.
        launches: of kernels.
        waits: calls in which the host waited for the device.
        to_host: copies from the device to the host.
    """

    gpu_ms: float
    launches: int
    waits: int
    to_host: int

    @property
    def columns(self) -> dict[str, float]:
        """As columns of a row."""
        return {
            "gpu_ms": round(self.gpu_ms, 3),
            "launches": self.launches,
            "waits": self.waits,
            "to_host": self.to_host,
        }


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def wall(run: Callable[[], Any], device: str, repeats: int) -> Timing:
    """The clock on the wall around a run that is waited for."""
    first, *times = (_wall_ms(run, device) for _ in range(repeats + 1))
    return Timing(median(times), first)


def busy(run: Callable[[], Any], device: str, repeats: int) -> Timing:
    """Between two events of the device; of many runs in a row where each is short, so that launches do not count."""
    if device != "cuda":
        return wall(run, device, repeats)
    first = _wall_ms(run, device)
    second = _wall_ms(run, device)
    inner = max(1, min(20, int(20 / max(second, 1e-3))))
    times = []
    for _ in range(repeats if second < 1e3 * LONG_S else 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / inner)
    return Timing(median(times), first)


def counted(run: Callable[[], Any], device: str) -> Counted:
    """One run under torch's profiler; of the CPU nothing is counted."""
    if device != "cuda":
        run()
        return Counted(0.0, 0, 0, 0)
    wait(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        wait(device)
    events = found.events() or []
    on_device = [e for e in events if str(e.device_type).endswith("CUDA")]
    named = [e.name for e in events]
    return Counted(
        sum(e.time_range.elapsed_us() for e in on_device) / 1e3,
        sum(name in LAUNCHES for name in named),
        sum(name in WAITS for name in named) - 1,  # the one of ours
        sum(e.name.startswith("Memcpy DtoH") for e in on_device),
    )


def _wall_ms(run: Callable[[], Any], device: str) -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return 1e3 * (time.perf_counter() - start)
