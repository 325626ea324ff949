"""The native kernels are built before any clock starts, and a terminal shows how far that is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mminfer_kernels
import torch
from mminfer_kernels.build import Progress, UnsafeCacheError, native_isa
from tqdm import tqdm

from mminfer.errors import InputError


def prepare_kernels(device: torch.device | str) -> float:
    """Builds the native kernels for a device if need be, and gives the seconds that took.

    Whoever measures calls it before the clock starts, or moves the start by what it gives.

    Raises:
        InputError: the environment asks for what this processor does not run, or others may write to the kernel cache.
    """
    start = time.perf_counter()
    check_native_isa()
    try:
        with _build_bar() as on_progress:
            mminfer_kernels.prepare(device, on_progress)
    except UnsafeCacheError as error:
        raise InputError(str(error)) from error
    return time.perf_counter() - start


def check_native_isa() -> None:
    """Raises `InputError` if the environment asks for an instruction set that this processor does not run."""
    try:
        native_isa()
    except ValueError as error:
        raise InputError(str(error)) from error


@contextmanager
def _build_bar() -> Iterator[Progress]:
    """A bar of compiled files on a terminal, which is there from the first report on; nowhere else."""
    bar: tqdm[Any] | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc="building native kernels", unit="file", dynamic_ncols=True, disable=None)
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()
