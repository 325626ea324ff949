"""What this machine can do at most, measured, and how near a call comes to it.

The roofline: a call that does F operations and must move B bytes takes at least the larger of F / peak FLOPs and
B / peak bytes; which of the two is larger says what bounds it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PRODUCT_SIZE = 4096
COPIED_BYTES = 2**29  # beyond any last-level cache that one machine has to itself
QUICK_PRODUCT_SIZE, QUICK_COPIED_BYTES = 512, 2**24


@dataclass(frozen=True)
class Peak:
    """The highest rates that were measured.

    Args:
        flops_a_s: of a large square matrix product.
        bytes_a_s: of a copy, bytes read and written both counted.
    """

    flops_a_s: float
    bytes_a_s: float

    @property
    def columns(self) -> dict[str, float]:
        """As columns of a row."""
        return {
            "peak_gflops_a_s": round(self.flops_a_s / 1e9, 1),
            "peak_gb_a_s": round(self.bytes_a_s / 1e9, 2),
        }

    def least_seconds(self, flops: float, moved: float) -> float:
        """What nothing on this machine undercuts; except from cache, which is faster than a copy through memory."""
        return max(flops / self.flops_a_s, moved / self.bytes_a_s)

    def bound(self, flops: float, moved: float) -> str:
        """ "compute" or "memory"."""
        return "compute" if flops / self.flops_a_s > moved / self.bytes_a_s else "memory"


def measured_peak(
    device: str = "cpu", dtype: torch.dtype = torch.float32, quick: bool = False, repeats: int = 5
) -> Peak:
    """Measures both peaks with all the threads that torch uses; takes seconds.

    Args:
        device: "cpu" or "cuda".
        dtype: of the product's operands; float32 is multiplied as float32.
        quick: small operands, for trying: what comes out is of a cache.
        repeats: the fastest counts.
    """
    size, copied = (QUICK_PRODUCT_SIZE, QUICK_COPIED_BYTES) if quick else (PRODUCT_SIZE, COPIED_BYTES)
    a, b, product = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(3))
    product_s = min(_seconds(lambda: torch.mm(a, b, out=product), device) for _ in range(repeats + 1))
    source, target = (torch.ones(copied, dtype=torch.uint8, device=device) for _ in range(2))
    copy_s = min(_seconds(lambda: target.copy_(source), device) for _ in range(repeats + 1))
    return Peak(2 * size**3 / product_s, 2 * copied / copy_s)


def rates(flops: float, moved: float, seconds: float, peak: Peak) -> dict[str, Any]:
    """What a call of this length reaches.

    Args:
        flops: of one call.
        moved: bytes that one call must move, at least.
        seconds: one call's.
        peak: the machine's.

    Returns:
        gflops_a_s (empty without FLOPs), gb_a_s, of_peak (1: at the roofline; above: from cache) and bound.
    """
    return {
        "gflops_a_s": round(flops / seconds / 1e9, 1) if flops else "",
        "gb_a_s": round(moved / seconds / 1e9, 2),
        "of_peak": round(peak.least_seconds(flops, moved) / seconds, 3),
        "bound": peak.bound(flops, moved),
    }


def _seconds(run: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
