"""Measures every config of every kernel on the GPU at hand, and adds the fastest to the table in the package.

    python -m mminfer_kernels.tune --seconds 300
    python -m mminfer_kernels.tune --only decode_attention --out configs.json

Launches are those of `mminfer_kernels.cases`, at several lengths. A config counts as faster by 3 % or more: the order
in which the configs stand says what is to be preferred where nothing tells them apart.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mminfer_kernels import cases
from mminfer_kernels.launching import Configured, Launch
from mminfer_kernels.tuned import TABLE, Table, architecture, merged, named

LENGTHS = (1024, 8192, 32_768)
FASTER = 0.97  # of the time of one that stands before it
REPEATS = 5

Clock = Callable[[Callable[[], Any]], float]


def on_device(launch: Launch, device: str) -> dict[str, Any]:
    """The arguments of a launch that was recorded with empty tensors, filled and on a device.

    Floating tensors are random; whole numbers are what the case says, as they are places and lengths.
    """
    moved: dict[str, Any] = {}
    for name, x in launch.arguments.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
            flat = torch.randn(size, device=device).to(x.dtype)
            moved[name] = flat.as_strided(x.shape, x.stride())
        else:
            moved[name] = x.to(device) if isinstance(x, torch.Tensor) else x
    return moved


def fastest(kernel: Configured, grid: Any, arguments: dict[str, Any], clock: Clock, backend: str | None = None) -> int:
    """The place of the fastest config among the kernel's; of those that are about as fast, the first."""
    best, least = None, float("inf")
    for config in kernel.fitting(arguments, backend):
        try:
            took = clock(partial(kernel.fn[grid], **arguments, **config.all_kwargs()))
        except Exception as error:  # one that this card cannot run is none to take
            print(f"    {config}: {type(error).__name__}: {str(error)[:120]}")
            continue
        if took < FASTER * least:
            best, least = config, took
    return kernel.configs.index(kernel.configs[0] if best is None else best)


def seconds_on_gpu(run: Callable[[], Any]) -> float:
    """The least of a few, by the device's own clock; the first compiles."""
    run()
    found = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1e3)
    return min(found)


def launches(only: str) -> Iterator[tuple[str, Launch]]:
    """Every launch of a kernel with several configs, at every length, with a word for it."""
    for tokens in LENGTHS:
        cases.TOKENS, before = tokens, cases.TOKENS
        try:
            found = [case for case in cases.cases() if only in case.op]
        finally:
            cases.TOKENS = before
        for case in found:
            for launch in case.launches:
                if isinstance(launch.kernel, Configured):
                    yield f"{case.op} {case.label} {case.dtype} {case.size} {tokens}", launch


def measured(device: str, clock: Clock, only: str, seconds: float) -> Table:
    """The places of the fastest configs, until the time is up."""
    found: dict[str, dict[str, int]] = {}
    until = time.monotonic() + seconds
    for word, launch in launches(only):
        if time.monotonic() > until:
            print("the time is up")
            break
        kernel, arguments = launch.kernel, on_device(launch, device)
        key = named(list(kernel.kind(arguments))[1:])
        own = found.setdefault(kernel.__name__, {})
        if key not in own:
            own[key] = fastest(kernel, launch.grid, arguments, clock)
            print(f"{word}: {kernel.__name__} {kernel.configs[own[key]]}", flush=True)
    return {architecture(None): found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="after which nothing more is begun")
    parser.add_argument("--only", default="", help="ops whose name holds this")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table to add to")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; without one every kernel takes the first config that fits")
    old: Table = json.loads(args.out.read_text()) if args.out.is_file() else {}
    new = merged(old, measured("cuda", seconds_on_gpu, args.only, args.seconds))
    args.out.write_text(json.dumps(new, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
