"""Compile every GPU kernel for several GPUs without having one: `python -m mminfer_kernels.aot`.

Each op is called with the shapes of `cases`; its launches are recorded and compiled with the very arguments, types,
divisibilities and default configuration of a real call. One row a kernel says what it takes of the GPU and how much it
moves and computes against the least (`counts`). The exit status is 1 if a kernel spills registers on an NVIDIA GPU,
does not fit a multiprocessor, or moves more than `MOST_BYTES_RATIO` times the least.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from mminfer_kernels import cuda
from mminfer_kernels.backends import interpreted
from mminfer_kernels.cases import HEAD_SIZES, Case, cases
from mminfer_kernels.counts import COUNTS
from mminfer_kernels.decode_attention import cuda_kernel as decoding
from mminfer_kernels.dispatch import registered_ops
from mminfer_kernels.launching import Configured, Launch
from mminfer_kernels.merge_rows import cuda_kernel as merging
from mminfer_kernels.resources import CHIPS, amd_resources, occupancy, resources

MOST_BYTES_RATIO = 1.15


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one GPU."""

    op: str
    kernel: str
    case: str
    dtype: str
    size: int | None
    target: str
    config: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float
    bytes_ratio: float | None
    asked_bytes_ratio: float | None
    flops_ratio: float | None
    compile_seconds: float

    @property
    def faults(self) -> list[str]:
        """What makes the exit status 1."""
        found = []
        if self.spill_bytes and self.target.startswith("sm_"):
            found.append(f"spills {self.spill_bytes} bytes a thread")
        if not self.occupancy:
            found.append("does not fit a multiprocessor")
        if self.bytes_ratio is not None and self.bytes_ratio > MOST_BYTES_RATIO:
            found.append(f"moves {self.bytes_ratio:.2f} times the least bytes")
        return found


class OfflineDriver(DriverBase):
    """Stands for a GPU that is not there, so that Triton specialises and compiles for it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> Any:
        return self.target.arch  # Triton keeps its kernels by device

    def set_current_device(self, device: Any) -> None:
        pass

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed without a GPU")

    def get_device_interface(self) -> Any:
        return None


def go_offline(target: str) -> None:
    """From now on this process compiles for `target`, and every kernel afresh, so that the seconds are true."""
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    triton.runtime.driver.set_active(OfflineDriver(gpu))
    triton.knobs.compilation.always_compile = True


def configurations(launch: Launch) -> list[dict[str, int]]:
    """Blocks, warps and stages in which this launch may run, the default first; without a choice Triton's own."""
    chosen = {"num_warps": launch.arguments.get("num_warps", 4), "num_stages": launch.arguments.get("num_stages", 3)}
    if not isinstance(launch.kernel, Configured):
        return [chosen]
    fitting = launch.kernel.fitting(launch.arguments)
    return [x.kwargs | {"num_warps": x.num_warps, "num_stages": x.num_stages} for x in fitting]


def kernel_row(case: Case, launch: Launch, config: dict[str, int], target: str) -> Row:
    """Compile a launch in one of its configurations."""
    arguments = launch.arguments | config
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    start = time.perf_counter()
    binary = jitted(launch).warmup(grid=(1,), **arguments, **options)
    seconds = time.perf_counter() - start
    amd = target.startswith("gfx")
    taken = amd_resources(binary.asm["amdgcn"]) if amd else resources(binary.asm["cubin"])
    count = COUNTS[jitted(launch).__name__](arguments)
    blocks = "x".join(str(size) for name, size in arguments.items() if name.startswith("BLOCK_"))
    return Row(
        op=case.op,
        kernel=jitted(launch).__name__,
        case=case.label,
        dtype=str(case.dtype).removeprefix("torch."),
        size=case.size,
        target=target,
        config=f"{blocks} w{options['num_warps']} s{options['num_stages']}",
        registers=taken.registers,
        spill_bytes=taken.spill_bytes,
        shared_bytes=binary.metadata.shared,
        occupancy=occupancy(target, taken.registers, binary.metadata.shared, options["num_warps"]),
        bytes_ratio=count.moved_bytes / count.least_bytes,
        asked_bytes_ratio=count.asked_bytes / count.least_bytes,
        flops_ratio=count.flops / count.least_flops if count.least_flops else None,
        compile_seconds=seconds,
    )


def jitted(launch: Launch) -> Any:
    """The kernel without its configs."""
    return launch.kernel.fn if isinstance(launch.kernel, Configured) else launch.kernel


def identity(launch: Launch) -> tuple[str, ...]:
    """The same for launches that one compiled kernel serves."""
    constants = {x.name for x in jitted(launch).params if x.is_constexpr}
    kinds = {name: x.dtype if isinstance(x, torch.Tensor) else x is None for name, x in launch.arguments.items()}
    kinds |= {name: x for name, x in launch.arguments.items() if name in constants}
    return jitted(launch).__name__, *sorted(f"{name} {kind}" for name, kind in kinds.items())


def triton_rows(found: Iterator[Case], targets: tuple[str, ...], tried: int | None = 1) -> Iterator[Row]:
    """Compile every kernel that these cases launch in its first `tried` configurations; what launches share, once."""
    seen = set()
    for case in found:
        for launch in case.launches:
            if identity(launch) in seen:
                continue
            seen.add(identity(launch))
            for target in targets:
                go_offline(target)
                for config in configurations(launch)[:tried]:
                    yield kernel_row(case, launch, config, target)


def cuda_rows(ops: tuple[str, ...] | None, targets: tuple[str, ...]) -> Iterator[Row]:
    """The hand-written CUDA kernels; their bytes are those of a whole call, so a part of one has none."""
    for target in (x for x in targets if x.startswith("sm_")):
        start = time.perf_counter()
        kernels = [x for x in cuda.compile_kernels(int(target.removeprefix("sm_"))) if ops is None or x.op in ops]
        seconds = time.perf_counter() - start
        for kernel in kernels:
            taken, warps = resources(kernel.cubin), -(-kernel.threads // 32)
            shared = max(kernel.shared_bytes, taken.shared_bytes)
            ratio = cuda_bytes_ratio(kernel)
            yield Row(
                op=kernel.op,
                kernel=kernel.kernel,
                case="CUDA C++",
                dtype=kernel.dtype,
                size=kernel.size,
                target=target,
                config=f"{kernel.threads} threads",
                registers=taken.registers,
                spill_bytes=taken.spill_bytes,
                shared_bytes=shared,
                occupancy=occupancy(target, taken.registers, shared, warps),
                bytes_ratio=ratio,
                asked_bytes_ratio=ratio,
                flops_ratio=None,
                compile_seconds=seconds / len(kernels),
            )


def cuda_bytes_ratio(kernel: cuda.CompiledKernel) -> float | None:
    """Bytes that a call moves over the least: 32,768 keys in 8 groups of 4 heads, or 3,136 rows of 3,584 merged."""
    dtype = getattr(torch, kernel.dtype)
    if kernel.op == "merge_rows":
        x = torch.empty(3136, 3584, dtype=dtype, device="meta")
        traffic = merging.traffic(x, x)
    elif kernel.size is not None:
        q = torch.empty(4, 32, 1, kernel.size, dtype=dtype, device="meta")
        traffic = decoding.traffic(q, torch.empty(4, 8, 32_768, kernel.size, dtype=dtype, device="meta"))
    else:
        return None
    return traffic.moved_bytes / traffic.least_bytes


HEADINGS = {
    "op": "op",
    "kernel": "kernel",
    "case": "case",
    "dtype": "dtype",
    "size": "size",
    "target": "target",
    "config": "blocks",
    "registers": "regs",
    "spill_bytes": "spill B",
    "shared_bytes": "shared B",
    "occupancy": "occup.",
    "bytes_ratio": "DRAM/min",
    "asked_bytes_ratio": "L2/min",
    "flops_ratio": "FLOP/min",
    "compile_seconds": "s",
}


def table(rows: list[Row]) -> str:
    """Aligned columns, one line a row."""
    lines = [list(HEADINGS.values()), *([_cell(getattr(row, name)) for name in HEADINGS] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(x, widths, strict=True)).rstrip() for x in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mminfer_kernels.aot", description=__doc__)
    parser.add_argument("--op", action="append", choices=registered_ops(), help="only this op; may be given again")
    parser.add_argument("--target", action="append", choices=CHIPS, help="only this GPU; may be given again")
    parser.add_argument("--dtype", action="append", choices=[str(x).removeprefix("torch.") for x in HEAD_SIZES])
    parser.add_argument("--size", action="append", type=int, help="only this head size, or number of columns")
    parser.add_argument("--every-config", action="store_true", help="all that it may run in, not only the default")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print the report; 0 if no kernel has a fault."""
    chosen = arguments_of(argv)
    if interpreted():
        print("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it", file=sys.stderr)
        return 2
    ops, targets = tuple(chosen.op) if chosen.op else None, tuple(chosen.target or CHIPS)
    wanted = cases(ops, tuple(chosen.dtype or ()), tuple(chosen.size or ()))
    rows = [*triton_rows(wanted, targets, None if chosen.every_config else 1), *cuda_rows(ops, targets)]
    print(json.dumps([vars(row) | {"faults": row.faults} for row in rows], indent=1) if chosen.json else table(rows))
    faults = [f"{row.kernel} {row.case} {row.dtype} {row.size} {row.target}: {x}" for row in rows for x in row.faults]
    for fault in faults:
        print(fault, file=sys.stderr)
    if not rows:
        print("no kernel matches", file=sys.stderr)
    return 1 if faults or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
