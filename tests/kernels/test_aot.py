"""The ahead-of-time compiler, in a process that does not interpret kernels; what it counts, in this one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mminfer_kernels import aot, cuda, dispatch
from mminfer_kernels.cases import cases
from mminfer_kernels.column_mass import triton_kernel as column_kernel
from mminfer_kernels.counts import COUNTS, bytes_of
from mminfer_kernels.launching import recorded_launches, tile_fits
from mminfer_kernels.prompt_attention import triton_kernel as prompt_kernel
from mminfer_kernels.resources import Resources, amd_resources, occupancy

KERNELS = Path(__file__).parents[2] / "kernels"
SUBSETS = {
    "every kernel": ["--dtype", "bfloat16", "--size", "128", "--size", "3584", "--target", "sm_90"],
    "large heads": ["--op", "prompt_attention", "--dtype", "bfloat16", "--size", "256", "--target", "sm_80"],
    "float32": ["--op", "column_mass", "--dtype", "float32", "--size", "64", "--target", "sm_80"],
    "AMD": ["--op", "decode_attention", "--dtype", "float32", "--size", "64", "--target", "gfx942"],
}


def compile_in_a_process(*arguments, **env):
    """The rows that it prints as JSON, and the exit status."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", "mminfer_kernels.aot", "--json", *arguments],
        env=kept | {"PYTHONPATH": str(KERNELS)} | env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    return (json.loads(process.stdout) if process.stdout else []), process


@pytest.mark.slow
@pytest.mark.parametrize("subset", SUBSETS)
def test_nothing_spills_and_little_is_moved_twice(subset):
    rows, process = compile_in_a_process(*SUBSETS[subset])
    assert process.returncode == 0, process.stderr
    assert len(rows) >= 3
    for row in rows:
        assert row["spill_bytes"] == 0 or row["target"] == "gfx942", row
        if row["kernel"].startswith("decode_attention_combine"):
            assert row["bytes_ratio"] is None  # its bytes are in those of the call that it is a part of
        else:
            assert 1 <= row["bytes_ratio"] <= 1.15 and row["asked_bytes_ratio"] >= row["bytes_ratio"], row
        assert row["registers"] > 0 and 0 < row["occupancy"] <= 1 and row["compile_seconds"] > 0, (
            row
        )  # CUDA binaries are cached
        assert row["flops_ratio"] is None or row["flops_ratio"] >= 1, row
        assert row["faults"] == []
    if subset == "every kernel":
        assert {row["kernel"] for row in rows if row["case"] != "CUDA C++"} == set(COUNTS)
        assert {row["op"] for row in rows} <= set(dispatch.registered_ops())


def test_every_op_is_compiled():
    """Some launches of an op are those of an earlier one, so that not all have a row of their own."""
    sizes = {case.op: len(case.launches) for case in cases(dtypes=("float16",))}
    assert set(sizes) == {op for op in dispatch.registered_ops() if "triton" in dispatch.available_backends(op)}
    assert all(sizes.values())


@pytest.mark.slow
def test_interpreted_kernels_cannot_be_compiled():
    rows, process = compile_in_a_process(TRITON_INTERPRET="1")
    assert (rows, process.returncode) == ([], 2) and "unset it" in process.stderr


ROW = aot.Row("op", "kernel", "", "bfloat16", 64, "sm_80", "64x64 w4 s2", 100, 0, 1024, 0.5, 1.1, 2.0, 1.0, 0.5)


def test_faults():
    assert ROW.faults == []
    assert replace(ROW, spill_bytes=8).faults == ["spills 8 bytes a thread"]
    assert replace(ROW, spill_bytes=8, target="gfx942").faults == []
    assert replace(ROW, occupancy=0.0).faults == ["does not fit a multiprocessor"]
    assert replace(ROW, bytes_ratio=1.16).faults == ["moves 1.16 times the least bytes"]
    assert replace(ROW, bytes_ratio=None).faults == []


@pytest.mark.parametrize(("change", "status"), [({}, 0), ({"spill_bytes": 4}, 1), ({"bytes_ratio": 1.2}, 1)])
def test_the_exit_status_tells_of_faults(monkeypatch, capsys, change, status):
    monkeypatch.setattr(aot, "interpreted", lambda: False)
    monkeypatch.setattr(aot, "triton_rows", lambda found, targets, tried: iter([replace(ROW, **change)]))
    monkeypatch.setattr(aot, "cuda_rows", lambda ops, targets: iter([]))
    assert aot.main([]) == status
    printed = capsys.readouterr()
    heading, line = printed.out.splitlines()
    assert heading.split()[:2] == ["op", "kernel"] and line.index("64x64 w4 s2") == heading.index("blocks")
    assert bool(printed.err) == bool(status)


def test_cuda_kernels_are_rows_too(monkeypatch):
    def compile_kernels(arch):
        kernel = cuda.CompiledKernel("merge_rows", "merge", b"x", 96, 2048, "bfloat16", None)
        others = [kernel._replace(op="decode_attention", size=128), kernel._replace(op="decode_attention")]
        return [kernel, *others] if arch == 90 else [kernel]

    monkeypatch.setattr(cuda, "compile_kernels", compile_kernels)
    monkeypatch.setattr(aot, "resources", lambda cubin: Resources(64, 0, 512))
    rows = list(aot.cuda_rows(None, ("sm_80", "sm_90", "gfx942")))
    assert [(row.op, row.target) for row in rows] == [
        ("merge_rows", "sm_80"),
        ("merge_rows", "sm_90"),
        ("decode_attention", "sm_90"),
        ("decode_attention", "sm_90"),
    ]
    assert 1 < rows[0].bytes_ratio < 1.15 and 1 < rows[2].bytes_ratio < 1.15
    assert rows[3].bytes_ratio is None  # a part of a call, without a head size
    assert rows[0].shared_bytes == 2048 and rows[0].registers == 64
    assert [row.op for row in aot.cuda_rows(("merge_rows",), ("sm_90",))] == ["merge_rows"]


def test_occupancy():
    assert occupancy("sm_80", 32, 0, 4) == 1.0
    assert occupancy("sm_80", 128, 0, 4) == 16 / 64  # 65536 registers: four blocks of 128 threads with 128 each
    assert occupancy("sm_80", 33, 0, 4) == 48 / 64  # handed out by eight
    assert occupancy("sm_90", 32, 100 * 1024, 4) == 8 / 64
    assert occupancy("sm_80", 32, 200 * 1024, 4) == 0.0
    assert occupancy("gfx942", 128, 0, 4) == 16 / 32


def test_resources_of_amd():
    text = ".vgpr_count:     77\n.private_segment_fixed_size: 16\n.group_segment_fixed_size: 4096\n"
    assert amd_resources(text) == Resources(77, 16, 4096)


def pairs_of_a_mask(queries, keys, index, window):
    places = torch.arange(keys - queries, keys) if index is None else index
    seen = torch.arange(keys) <= places[:, None]
    return int((seen & (torch.arange(keys) > places[:, None] - (window or keys))).sum())


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("chosen", [True, False])
def test_pairs_are_those_of_the_mask(chosen, window):
    q, k = torch.randn(1, 4, 33, 24), torch.randn(1, 2, 90, 24)
    index = torch.randperm(90)[:33].sort().values if chosen else None
    with recorded_launches() as launches:
        prompt_kernel.prompt_attention(q, k, k, 1.0, index, window)
    count = COUNTS["prompt_attention_fwd_kernel"](launches[0].arguments | {"BLOCK_S": 16, "BLOCK_N": 16})
    assert count.least_flops == 4 * 4 * 24 * pairs_of_a_mask(33, 90, index, window)
    assert count.flops % (4 * 4 * 16 * 16 * 32) == 0 and count.flops > count.least_flops
    assert count.least_bytes == bytes_of(q, k, k, q) <= count.moved_bytes < count.asked_bytes


@pytest.mark.parametrize("causal", [True, False])
def test_rows_and_columns_count_the_same_pairs(causal):
    q, k, ends = torch.randn(1, 4, 60, 24), torch.randn(1, 2, 60, 24), torch.tensor([0, 5, 40, 60])
    with recorded_launches() as launches:
        column_kernel.column_mass(q, k, None, 1.0, causal, None, ends)
    blocks = {"BLOCK_S": 16, "BLOCK_N": 16}
    by_rows = COUNTS["row_lse_fwd_kernel"](launches[0].arguments | blocks)
    by_columns = COUNTS["column_mass_fwd_kernel"](launches[1].arguments | blocks)
    lengths = ends.diff()
    pairs = int((lengths * (lengths + 1) // 2 if causal else lengths.square()).sum())
    assert by_rows.least_flops == 2 * 4 * 24 * pairs and by_columns.least_flops == 2 * 4 * 25 * pairs


def test_what_outgrows_the_cache_is_moved_again():
    q, k = torch.empty(1, 4, 2**16, 128), torch.empty(1, 1, 2**16, 128)
    with recorded_launches() as launches:
        prompt_kernel.prompt_attention(q, k, k, 1.0, None, None)
    count = COUNTS["prompt_attention_fwd_kernel"](launches[0].arguments | {"BLOCK_S": 64, "BLOCK_N": 64})
    assert count.moved_bytes == count.asked_bytes > 100 * count.least_bytes


def test_tiles_by_dtype_and_memory():
    arguments = {"backend": "cuda", "num_stages": 2}
    half, single = torch.empty(1, dtype=torch.float16), torch.empty(1)
    assert tile_fits(arguments, half, 128, 128, 128) and not tile_fits(arguments, half, 16, 64, 128)
    assert not tile_fits(arguments, half, 128, 256, 256)
    assert tile_fits(arguments, single, 16, 16, 256) and not tile_fits(arguments, single, 32, 32, 256)
    assert not tile_fits({"backend": "hip", "num_stages": 4}, half, 128, 128, 128)
