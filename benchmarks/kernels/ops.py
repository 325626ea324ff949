"""Every op's native kernel against its reference, at the sizes of long prompts, interleaved in one run.

    python -m benchmarks.kernels.ops --repeats 5
    python -m benchmarks.kernels.ops --only decode_attention

Extra memory is the rise of resident memory during one call, measured in a process of its own. Bytes are the least
that must move; their rate stands beside the machine's copy rate, which counts bytes read and written.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mminfer_kernels as ops
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import interleaved, write_rows
from mminfer.metrics.memory import peak_memory, resident_bytes

Runs = dict[str, Callable[[], Any]]


@dataclass
class Case:
    """One op at one size.

    Args:
        runs: by name; the first is what the others are compared with.
        flops: of one call; of the attention alone where runs do more.
        moved: bytes that must move, at least.
        copied: bytes that a run named "copy" reads and writes.
    """

    runs: Runs
    flops: float = 0
    moved: float = 0
    copied: float = 0


def attention(tokens: int, heads: int = 14, groups: int = 2, size: int = 64) -> Case:
    """A prompt's attention, alone and with the scores of cache compression and pruning."""
    q, k, v = (torch.randn(1, h, tokens, size) for h in (heads, groups, groups))
    strided = torch.arange(tokens - 1, -1, -8).flip(0)

    def with_strided() -> None:
        ops.prompt_attention(q, k, v)
        ops.column_mass(q[:, :, strided], k, query_index=strided)

    return Case(
        {
            "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            "native": lambda: ops.prompt_attention(q, k, v, backend="native"),
            "native with exact scores": lambda: ops.prompt_attention_mass(q, k, v, backend="native"),
            "native with strided scores": with_strided,
            "importance, native": lambda: ops.power_iterate(q, k, backend="native"),
            "importance, reference": lambda: ops.power_iterate(q, k, backend="reference"),
        },
        flops=2 * heads * size * tokens * (tokens + 1),
    )


def column_mass(tokens: int, heads: int = 14, groups: int = 2, size: int = 64) -> Case:
    q, k = torch.randn(1, heads, tokens, size), torch.randn(1, groups, tokens, size)
    return Case(_both(lambda backend: ops.column_mass(q, k, backend=backend)), heads * size * tokens * (tokens + 1))


def best_match(rows: int = 6272, columns: int = 3584) -> Case:
    """All of the rows against as many others."""
    src, dst = torch.randn(rows, columns), torch.randn(rows, columns)
    return Case(_both(lambda backend: ops.best_match(src, dst, backend=backend)), 2 * rows * rows * columns)


def merge_rows(rows: int = 3136, columns: int = 3584) -> Case:
    dst, src = torch.randn(rows, columns), torch.randn(rows, columns)
    index, size = torch.randint(0, rows, (rows,)), torch.rand(rows) + 1
    moved = 4 * 3 * rows * columns
    return Case(_both(lambda backend: ops.merge_rows(dst, src, index, size, size, backend=backend)), moved=moved)


def rows(tokens: int = 6272, columns: int = 896) -> Case:
    """Every fourth row, normalised: what a skipped FFN leaves to compute."""
    x, weight, index = torch.randn(tokens, columns), torch.rand(columns), torch.arange(0, tokens, 4)
    moved = 4 * 2 * len(index) * columns
    return Case(_both(lambda backend: ops.gather_rms_norm(x, index, weight, backend=backend)), moved=moved)


def add_rows(tokens: int = 6272, columns: int = 896) -> Case:
    x, index = torch.randn(tokens, columns), torch.arange(0, tokens, 4)
    added = torch.randn(len(index), columns)
    moved = 4 * 3 * len(index) * columns
    return Case(_both(lambda backend: ops.add_rows(x, index, added, inplace=True, backend=backend)), moved=moved)


def swiglu(tokens: int = 1568, columns: int = 4864) -> Case:
    gate, up = torch.randn(tokens, columns), torch.randn(tokens, columns)
    return Case(_both(lambda backend: ops.swiglu(gate, up, backend=backend)), moved=4 * 3 * gate.numel())


def rotary(tokens: int = 6372, heads: int = 14, groups: int = 2, size: int = 64) -> Case:
    q, k = torch.randn(1, heads, tokens, size), torch.randn(1, groups, tokens, size)
    position, inv_freq = torch.arange(tokens)[None].double() / 16, 1e6 ** -(torch.arange(0, size, 2) / size)
    moved = 4 * 2 * (q.numel() + k.numel())
    return Case(_both(lambda backend: ops.rotary_(q, k, position, inv_freq, backend=backend)), moved=moved)


def decode_attention(keys: int = 32_768, batch: int = 4, heads: int = 16, groups: int = 16, size: int = 64) -> Case:
    """One query a sequence; the sequences fill all, seven eighths, three quarters and half of the cache."""
    q, k, v = (torch.randn(batch, h, n, size) for h, n in ((heads, 1), (groups, keys), (groups, keys)))
    starts = torch.tensor([0, keys // 8, keys // 4, keys // 2])[:batch]
    moved = 4 * 2 * groups * size * int((keys - starts).sum())
    runs = _both(lambda backend: ops.decode_attention(q, k, v, starts, backend=backend))
    copy = torch.empty_like(k)
    return Case({**runs, "copy": lambda: copy.copy_(k)}, moved=moved, copied=4 * 2 * k.numel())


def _both(call: Callable[[str], Any]) -> Runs:
    return {backend: lambda backend=backend: call(backend) for backend in ("reference", "native")}


CASES: dict[str, Callable[[], Case]] = {
    "attention, 2,048 tokens": lambda: attention(2048),
    "attention, 16,384 tokens": lambda: attention(16_384),
    "column_mass, 16,384 tokens": lambda: column_mass(16_384),
    "best_match, 6,272 x 3,584": best_match,
    "merge_rows, 3,136 x 3,584": merge_rows,
    "gather_rms_norm, 1,568 of 6,272 x 896": rows,
    "add_rows, 1,568 to 6,272 x 896": add_rows,
    "swiglu, 1,568 x 4,864": swiglu,
    "rotary, 6,372 tokens": rotary,
    "decode_attention, 32,768 keys, 16 groups": decode_attention,
    "decode_attention, 32,768 keys, 2 groups": lambda: decode_attention(heads=14, groups=2),
}


def extra_mib(case: str, run: str) -> float:
    """Rise of resident memory during the second call of a run, its result included."""
    command = [sys.executable, "-m", "benchmarks.kernels.ops", "--memory-of", case, run]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_memory(case: str, run: str) -> None:
    call = CASES[case]().runs[run]
    for backend in ("reference", "native"):  # loads what a process loads once
        ops.best_match(torch.randn(2, 4), torch.randn(2, 4), backend=backend)
    before = resident_bytes()
    with peak_memory(torch.device("cpu")) as peak:
        call()
    print((peak.bytes - before) / 2**20)


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """One row a run."""
    case = CASES[name]()
    times = interleaved(case.runs, repeats)
    first = next(iter(case.runs))
    rows = []
    for run, t in times.items():
        seconds = t["median_ms"] / 1e3
        moved = case.copied if run == "copy" else case.moved
        rows.append({
            "op": name, "run": run, **{k: round(v, 3) for k, v in t.items()},
            "of_first": round(t["median_ms"] / times[first]["median_ms"], 3),
            "gflops_a_s": round(case.flops / seconds / 1e9, 1) if case.flops and "importance" not in run else "",
            "gb_a_s": round(moved / seconds / 1e9, 2) if moved else "",
            "extra_mib": "" if run == "copy" else round(extra_mib(name, run), 1), "repeats": repeats,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="ops whose name holds this")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "RUN"), help="print the extra MiB of one call")
    parser.add_argument("--out", default="kernels", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.memory_of:
        measure_memory(*args.memory_of)
        return
    rows = [row for name in CASES if args.only in name for row in measure(name, args.repeats)]
    if args.out != "-":
        print(write_rows(args.out, rows, key=("op", "run")))


if __name__ == "__main__":
    main()
