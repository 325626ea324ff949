"""Every op's native kernel against its reference and the reference compiled, on the CPU, interleaved in one run.

    python -m benchmarks.kernels.ops --repeats 5
    python -m benchmarks.kernels.ops --only decode_attention
    python -m benchmarks.kernels.ops --quick          # small sizes, nothing stored

A run is timed only if its result is the reference's. Extra memory is the rise of resident memory during one call,
measured in a process of its own. `of_peak` is the fraction of the machine's roofline, whose two rates, of a matrix
product and of a copy, are measured first; more than 1 means that the data came from a cache. `torch.compile` is tried
in a process of its own and given up after `--compile-limit` seconds; `status` says what came of it.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from mminfer_kernels import available_backends, best_match

from benchmarks.common import interleaved, write_rows
from benchmarks.kernels.call import Call, Runs
from benchmarks.kernels.cases import CASES, Case, case_named
from benchmarks.kernels.compiled import Compilation, compiled, extra_mib, fresh_cache, try_compiling
from benchmarks.machine import Peak, measured_peak, rates

COMPILED = "reference, compiled"
BACKENDS = ("reference", "native")
TIMES = ("warmup_ms", "p20_ms", "median_ms", "p80_ms", "of_first")
RATES = ("gflops_a_s", "gb_a_s", "of_peak", "bound")


def memory_of(case: str, run: str, quick: bool) -> float:
    """Extra MiB of a run, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.kernels.ops", "--memory-of", case, run]
    command += ["--quick"] if quick else []
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_memory(case: str, run: str, quick: bool) -> None:
    call = case_named(case, quick).build(quick)
    for backend in BACKENDS:  # loads what a process loads once
        best_match(torch.randn(2, 4), torch.randn(2, 4), backend=backend)
    print(extra_mib(_eager(call)[run]))


def _eager(call: Call) -> Runs:
    return {backend: call.run(backend) for backend in BACKENDS if not call.why_not(backend)} | call.beside


def measure(case: Case, peak: Peak, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a run, those that could not be timed among them."""
    name, call = case.name(args.quick), case.build(args.quick)
    compilation = try_compiling(name, args.compile_limit, args.quick)
    runs = _eager(call)
    if compilation.runs:
        runs = {"reference": runs.pop("reference"), COMPILED: compiled(call), **runs}
    told = {run: _wrong(call, function) for run, function in runs.items() if run not in call.beside}
    if "native" in available_backends(call.op) and "native" not in runs:
        told["native"] = call.why_not("native")
    times = interleaved({run: function for run, function in runs.items() if not told.get(run)}, args.repeats)
    rows = []
    for run in dict.fromkeys(("reference", COMPILED, *told, *runs)):
        row = dict.fromkeys(("op", "run", *TIMES, *RATES, "extra_mib", "compile_s", "status"), "")
        row |= {"op": name, "run": run, "status": told.get(run, ""), **peak.columns, "repeats": args.repeats}
        if run in times:
            row |= _timed(call, run, times, peak)
            row["extra_mib"] = compilation.extra_mib if run == COMPILED else round(memory_of(name, run, args.quick), 1)
        if run == COMPILED:
            row |= _of_compilation(compilation, row["status"])
        rows.append(row)
        print(row, flush=True)
    return rows


def _wrong(call: Call, run: Callable[[], Any]) -> str:
    difference = call.difference(run)
    return f"wrong: {difference}" if difference else ""


def _timed(call: Call, run: str, times: dict[str, dict[str, float]], peak: Peak) -> dict[str, Any]:
    of_run, first = times[run], times["reference"]["median_ms"]
    row = {**{k: round(v, 3) for k, v in of_run.items()}, "of_first": round(of_run["median_ms"] / first, 3)}
    if run not in call.beside:
        row |= rates(call.flops, call.moved, of_run["median_ms"] / 1e3, peak)
    return row


def _of_compilation(compilation: Compilation, wrong: str) -> dict[str, Any]:
    seconds = "" if compilation.seconds is None else compilation.seconds
    return {"compile_s": seconds, "status": wrong or compilation.status}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--only", default="", help="ops whose name holds this")
    options.add_argument("--quick", action="store_true", help="small sizes, for trying; stores nothing")
    options.add_argument("--compile-limit", type=float, default=120, help="seconds for compiling one reference")
    options.add_argument("--memory-of", nargs=2, metavar=("CASE", "RUN"), help="print the extra MiB of one call")
    options.add_argument("--out", default="kernels", help="name of the CSV in benchmarks/results; '-' for none")
    return options


def main() -> None:
    args = parser().parse_args()
    torch.manual_seed(0)
    if args.memory_of:
        measure_memory(*args.memory_of, args.quick)
        return
    peak = measured_peak(quick=args.quick)
    print(peak.columns, flush=True)
    with fresh_cache():
        chosen = [case for case in CASES if args.only in case.name(args.quick)]
        rows = [row for case in chosen for row in measure(case, peak, args)]
    if args.out != "-" and not args.quick:
        print(write_rows(args.out, rows, key=("op", "run")))


if __name__ == "__main__":
    main()
