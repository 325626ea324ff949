"""All that a machine with a GPU is to be asked, most valuable first.

    PYTHONPATH=.:kernels python -m benchmarks.gpu --out DIR --minutes 8
    PYTHONPATH=.:kernels python -m benchmarks.gpu --out DIR --part engine
    python -m benchmarks.gpu --out DIR --device cpu --tiny      # the same code, tried without a GPU

Each part is a process of its own with its share of the time; a part that fails stops no other. Rows are on disk as soon
as they are known: DIR/engine.csv, parity.csv, tests.csv, ops.csv, and what each part came to in parts.csv.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from benchmarks.gpu.writing import Rows, part_parser

PARTS = {"engine": 0.4, "parity": 0.25, "tests": 0.15, "ops": 0.2}  # in their order, with the share of the time of each
GRACE_S = 60.0  # a part may go on with what it has begun


def run_part(part: str, args: argparse.Namespace, seconds: float) -> dict[str, str | float]:
    """What became of a part: its exit status, "stopped" where it took too long, and its seconds."""
    command = [sys.executable, "-m", f"benchmarks.gpu.{part}", "--out", str(args.out), "--device", args.device]
    command += ["--seconds", f"{seconds:.0f}", *(["--tiny"] if args.tiny else [])]
    start = time.monotonic()
    try:
        status = str(subprocess.run(command, timeout=seconds + GRACE_S, check=False).returncode)
    except subprocess.TimeoutExpired:
        status = "stopped"
    return {"part": part, "status": status, "s": round(time.monotonic() - start, 1)}


def main() -> None:
    parser = part_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together")
    parser.add_argument("--part", default="all", choices=("all", *PARTS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out / "parts.csv", ("part", "status", "s"), args.device)
    for part in PARTS if args.part == "all" else (args.part,):
        share = PARTS[part] if args.part == "all" else 1.0
        rows.add(run_part(part, args, 60 * args.minutes * share))


if __name__ == "__main__":
    main()
