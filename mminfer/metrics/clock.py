"""The clock of all durations that are told."""

from __future__ import annotations

import time

import torch


def done_at(device: torch.device) -> float:
    """`time.perf_counter()` when a device has done what it was given: a GPU is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
