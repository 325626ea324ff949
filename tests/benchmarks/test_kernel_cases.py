"""The table of kernel benchmarks: all ops are in it, results agree at small sizes, and the roofline is right."""

import csv
import sys
import time
from pathlib import Path

import mminfer_kernels
import pytest
import torch
from mminfer_kernels import best_match, swiglu
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.kernels import compiled, ops
from benchmarks.kernels.call import Call
from benchmarks.kernels.cases import CASES, case_named
from benchmarks.machine import Peak, measured_peak, rates
from benchmarks.tables import kernels

NAMES = [case.name(quick=True) for case in CASES]
PEAK = Peak(flops_a_s=100e9, bytes_a_s=10e9)


@pytest.fixture(params=NAMES)
def call(request):
    return case_named(request.param, quick=True).build(quick=True)


def test_every_op_has_a_case():
    assert {case.op for case in CASES} == set(mminfer_kernels.OPS)
    for quick in (False, True):
        assert len({case.name(quick) for case in CASES}) == len(CASES)


def test_backends_and_bare_references_agree(call):
    """The bare reference is what gets compiled: the same arguments as the public op's."""
    assert call.difference(call.plain(call.reference)) == ""
    for backend in mminfer_kernels.available_backends(call.op):
        if not call.why_not(backend):
            assert call.difference(call.run(backend)) == ""


def test_calls_leave_their_inputs_as_they_were(call):
    held = [x.clone() for x in call._tensors]
    call.run("reference")()  # timing writes, checking puts back
    assert call.difference(call.run("reference")) == ""
    assert all(torch.equal(a, b) for a, b in zip(call._tensors, held, strict=True))


def test_runs_beside_it_run(call):
    for run in call.beside.values():
        run()


def test_bytes_are_those_of_inputs_and_results(call):
    assert call.flops > 0 or call.op in ("gather_rows", "top_places")
    if call.mutates:
        return
    everything = sum(x.nbytes for x in (*call._tensors, *tree_leaves(call.run("reference")())))
    if call.op in ("gather_rows", "gather_rms_norm", "decode_attention"):  # these leave rows unread
        assert 0 < call.moved < everything
    else:
        assert call.moved == everything


def test_flops_are_the_counters(call):
    """Where the op has a formula; what differs on purpose is named."""
    with FlopCounterMode(display=False) as counter:
        call.run("auto")()
    more = call.op in ("prompt_attention_mass", "decode_attention", "decode_step")  # repeats, rows that start late
    if counter.get_total_flops() and not more:
        assert call.flops == counter.get_total_flops()


def test_a_wrong_result_is_seen():
    x, y = torch.randn(2, 8, 16)
    right = Call("swiglu", swiglu, (x, y), 1, 1)
    assert right.difference(lambda: swiglu(x, y)) == ""
    assert "values" in right.difference(lambda: swiglu(x, y) * 1.01)
    assert "values" in right.difference(lambda: swiglu(x, y) * torch.nan)
    assert "float64" in right.difference(lambda: swiglu(x, y).double())
    similarity, index = best_match(x, y)
    match = Call("best_match", best_match, (x, y), 1, 1)
    assert "result 1" in match.difference(lambda: (similarity, (index + 1) % 8))


def test_a_backend_that_is_not_there_says_why():
    gather = case_named(NAMES[[c.op for c in CASES].index("gather_rows")], quick=True).build(quick=True)
    assert "no native kernel" in gather.why_not("native")
    assert "GPU" in gather.why_not("triton")
    assert gather.why_not("reference") == ""


def test_the_roofline():
    half = rates(flops=50e9, moved=1e9, seconds=1, peak=PEAK)
    assert half == {"gflops_a_s": 50.0, "gb_a_s": 1.0, "of_peak": 0.5, "bound": "compute"}
    moving = rates(flops=0, moved=8e9, seconds=1, peak=PEAK)
    assert moving == {"gflops_a_s": "", "gb_a_s": 8.0, "of_peak": 0.8, "bound": "memory"}
    assert rates(flops=1e9, moved=1e9, seconds=0.1, peak=PEAK)["of_peak"] == 1


def test_peaks_are_measured():
    peak = measured_peak(quick=True, repeats=1)
    assert 1e8 < peak.flops_a_s < 1e15 and 1e7 < peak.bytes_a_s < 1e14


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Puts a shell script in the place of the process that compiles."""

    def put(script):
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


@pytest.mark.slow
def test_a_compilation_is_given_up_after_its_limit(compiler, tmp_path):
    """With what it started."""
    compiler(f"sleep 600 & echo $! > {tmp_path}/pid; wait")
    given_up = compiled.try_compiling(NAMES[0], limit_s=2)
    assert not given_up.runs and given_up.status == "not compiled within 2 s"
    left, until = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat"), time.monotonic() + 60
    while left.exists() and left.read_text().split()[2] != "Z":  # it is killed, and dies when it is its turn
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_a_compilation_tells(compiler):
    compiler("echo a warning; echo broken >&2; exit 1")
    failed = compiled.try_compiling(NAMES[0], limit_s=60)
    assert not failed.runs and failed.status == "failed: broken"
    compiler("""echo '{"status": "1 graph", "seconds": 2.5, "extra_mib": 0.5}'""")
    assert compiled.try_compiling(NAMES[0], limit_s=60) == compiled.Compilation("1 graph", 2.5, 0.5)
    assert compiled._status(1, 0) == "1 graph" and compiled._status(0, 2) == "0 graphs, 2 breaks"


def test_an_unknown_case_is_told():
    with pytest.raises(ValueError, match="no case is called 'x'; there are prompt_attention, 2,048 tokens"):
        case_named("x")


@pytest.mark.parametrize("compilation", [compiled.Compilation("1 graph", 3.0, 1.0), compiled.Compilation("no")])
def test_rows_tell_what_was_not_timed(monkeypatch, tmp_path, compilation):
    """The script's rows, stored and shown, with a compiler's answer made up."""
    monkeypatch.setattr(ops, "try_compiling", lambda *args: compilation)
    monkeypatch.setattr(ops, "compiled", lambda call: call.plain(lambda gate, up: 2 * gate))
    monkeypatch.setattr(ops, "memory_of", lambda *args: 1.5)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    (case,) = (case for case in CASES if case.op == "swiglu")
    rows = ops.measure(case, PEAK, ops.parser().parse_args(["--quick", "--repeats", "1"]))
    assert [r["run"] for r in rows][:2] == ["reference", ops.COMPILED]
    assert rows[0]["of_peak"] > 0 and rows[0]["bound"] == "memory" and rows[0]["status"] == ""
    assert rows[1]["median_ms"] == "" and rows[1]["status"].startswith("wrong: " if compilation.runs else "no")
    with common.write_rows("kernels", rows, key=("op", "run")).open() as file:
        assert next(csv.DictReader(file))["peak_gb_a_s"] == "10.0"
    shown = kernels.kernels()
    assert f"{ops.COMPILED}: {rows[1]['status']}" in shown and "of peak" in shown and " %, memory" in shown
