"""torch.compile of the references: what the native kernels have to beat.

A reference that goes through its rows by blocks is unrolled, block by block, and may take longer to compile than
anybody waits. So each is compiled in a process of its own first, which can be stopped with the compilers it started;
the process that times then finds the generated code in the cache.

    python -m benchmarks.kernels.compiled --case "swiglu, 1,568 x 4,864"
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.kernels.call import Call
from benchmarks.kernels.cases import case_named
from mminfer.metrics.memory import peak_memory, resident_bytes

WHOLE = "1 graph"
SHARED = "import torch; torch.compile(lambda x: x + 1)(torch.ones(8))"


@dataclass(frozen=True)
class Compilation:
    """What compiling a reference gave.

    Args:
        status: "1 graph" where all of it was compiled; else graphs and breaks, or why there is nothing to run.
        seconds: until the first result; None where there is nothing to run.
        extra_mib: rise of resident memory during the second call.
    """

    status: str
    seconds: float | None = None
    extra_mib: float | None = None

    @property
    def runs(self) -> bool:
        return self.seconds is not None


@contextmanager
def fresh_cache() -> Iterator[None]:
    """A new folder for generated code, so that seconds of compiling are those of a first use.

    It holds what all generated code shares, precompiled headers, which can take longer than everything else.
    """
    name, before = "TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            subprocess.run([sys.executable, "-c", SHARED], capture_output=True, check=False)  # failures show later
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def compiled(call: Call) -> Callable[[], Any]:
    """The reference under torch.compile, for exactly these shapes."""
    torch.compiler.reset()
    return call.plain(torch.compile(call.reference, dynamic=False))


def try_compiling(
    name: str, limit_s: float, quick: bool = False, device: str = "cpu", dtype: str = "float32"
) -> Compilation:
    """Compiles a case's reference in a process of its own.

    Args:
        name: the case's.
        limit_s: the process is stopped after so many seconds.
        quick: the case's small size.
        device: where its tensors are.
        dtype: of its tensors.
    """
    command = [sys.executable, "-m", "benchmarks.kernels.compiled", "--case", name, "--device", device]
    command += ["--dtype", dtype, "--threads", str(torch.get_num_threads()), "--limit", str(limit_s)]
    command += ["--quick"] if quick else []
    path = os.pathsep.join(entry for entry in sys.path if entry)  # pytest's own entries among them
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        told, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Compilation(f"not compiled within {limit_s:g} s")
    finally:
        _stop(process)
    if process.returncode:
        return Compilation(f"failed: {(errors.strip().splitlines() or ['no message'])[-1][:200]}")
    return Compilation(**json.loads(told.splitlines()[-1]))


def _stop(process: subprocess.Popen) -> None:
    """With the compilers that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def compile_here(call: Call) -> Compilation:
    """Compiles and runs twice, in this process."""
    from torch._dynamo.utils import counters  # loads the compiler, which takes seconds

    run = compiled(call)
    counters.clear()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    status = _status(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    return Compilation(status, round(seconds, 1), round(extra_mib(run), 1))


def _status(graphs: int, breaks: int) -> str:
    told = WHOLE if graphs == 1 else f"{graphs} graphs"
    return f"{told}, {breaks} break{'s' if breaks > 1 else ''}" if breaks else told


def extra_mib(run: Callable[[], Any]) -> float:
    """Rise of resident memory during a call, its result included."""
    before = resident_bytes()
    with peak_memory(torch.device("cpu")) as peak:
        run()
    return (peak.bytes - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True)
    parser.add_argument("--quick", action="store_true", help="the case's small size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=0, help="seconds until it ends itself, should nobody end it")
    args = parser.parse_args()
    signal.setitimer(signal.ITIMER_REAL, args.limit)
    torch.set_num_threads(args.threads)
    case = case_named(args.case, args.quick)
    call = case.build(args.quick, args.device, getattr(torch, args.dtype))
    print(json.dumps(asdict(compile_here(call))))


if __name__ == "__main__":
    main()
