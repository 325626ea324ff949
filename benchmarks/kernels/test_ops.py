"""pytest-benchmark suite of the ops: every backend that runs here, the reference, and the reference compiled.

    python -m pytest benchmarks/kernels --benchmark-json out.json
    python -m pytest benchmarks/kernels --quick                        # small sizes, for trying
    python -m pytest benchmarks/kernels -k "swiglu and not compiled"
    python -m pytest benchmarks/kernels --dtype bfloat16 --device cuda

One group an op and size. `extra_info` holds bytes and flops of a call, gflops_a_s, gb_a_s, of_peak and bound at the
median, and the peaks that were measured in the same run (`benchmarks.machine`); of compiled runs also compile_s and
status. Results are compared with the reference's before anything is timed. A compilation that takes longer than
`--compile-limit` is given up; what cannot run is skipped with its reason (`-rs` prints them). The stored rows are those
of `benchmarks.kernels.ops`, which interleaves its runs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.kernels.call import Call
from benchmarks.kernels.compiled import Compilation, compiled
from benchmarks.machine import Peak, rates


def test_op(
    benchmark: BenchmarkFixture, case: str, run: str, call: Call, compilation: Compilation | None, peak: Peak
) -> None:
    benchmark.group = case
    benchmark.extra_info |= {"op": call.op, "run": run, "bytes": call.moved, "flops": call.flops, **peak.columns}
    function = _function(call, run, compilation)
    if compilation is not None:
        benchmark.extra_info |= {"compile_s": compilation.seconds, "status": compilation.status}
    assert call.difference(function) == ""
    benchmark(_finished(function, call.device))
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info |= rates(call.flops, call.moved, benchmark.stats.stats.median, peak)


def _function(call: Call, run: str, compilation: Compilation | None) -> Callable[[], Any]:
    """Skips what cannot run."""
    if compilation is not None:
        return compiled(call) if compilation.runs else pytest.skip(compilation.status)
    if reason := call.why_not(run):
        pytest.skip(reason)
    return call.run(run)


def _finished(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function, waiting for what it started on a GPU."""
    if device.type != "cuda":
        return function

    def run() -> Any:
        result = function()
        torch.cuda.synchronize()
        return result

    return run
