"""The project's own tests with their tensors on the GPU: how many of each folder pass, and which fail.

    PYTHONPATH=.:kernels python -m benchmarks.gpu.tests --out DIR

Each folder is a process of its own, over several workers where pytest's xdist is there. A test that fails is a row as
soon as it is known; a folder is one when it is through or the time is up.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.writing import Rows, part_parser

COLUMNS = ("folder", "status", "passed", "failed", "skipped", "test", "s")
FOLDERS = ("kernels", "tokens", "cache", "positions", "operators", "forward")
TINY = ("operators/test_skip.py",)
WORKERS = 8  # at most: they share one GPU
ENDED = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
TEST = re.compile(r"tests/\S+::.*?(?=\s+(?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)|\s*$)")
KINDS = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}


def command_of(folder: str, device: str) -> list[str]:
    """Of pytest, a line for each test that ends."""
    found = [sys.executable, "-m", "pytest", f"tests/{folder}", "--device", device, "-v", "--tb=no", "-m", "not slow"]
    workers = min(WORKERS, (os.cpu_count() or 1) // 2)
    several = device == "cuda" and workers > 1 and importlib.util.find_spec("xdist") is not None
    return [*found, "-n", str(workers)] if several else found


def ended(line: str) -> tuple[str, str] | None:
    """The kind and the name of the test that a line of pytest says has ended; None: it says none."""
    kind, name = ENDED.search(line), TEST.search(line)
    if kind is None or name is None or line.startswith(("FAILED", "ERROR", "SKIPPED")):  # of the summary
        return None
    return KINDS.get(kind[1], "passed"), name[0].strip()


def folder_rows(folder: str, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each test that fails, and one of the whole folder, which is stopped when its time is up."""
    start, counts = time.monotonic(), Counter[str]()
    root = Path(__file__).parents[2]
    with subprocess.Popen(command_of(folder, device), cwd=root, stdout=subprocess.PIPE, text=True) as process:
        alarm = threading.Timer(seconds, process.kill)
        alarm.start()
        assert process.stdout is not None
        for line in process.stdout:
            found = ended(line)
            if found is not None:
                counts[found[0]] += 1
                if found[0] == "failed":
                    yield {"folder": folder, "status": "failed", "test": found[1]}
        alarm.cancel()
    took = round(time.monotonic() - start, 1)
    status = "stopped" if took >= seconds else str(process.returncode)
    kinds = {kind: counts[kind] for kind in ("passed", "failed", "skipped")}
    yield {"folder": folder, "status": status, **kinds, "s": took}


def main() -> None:
    args = part_parser(__doc__, seconds=90).parse_args()
    out, until = Rows(args.out / "tests.csv", COLUMNS, args.device), time.monotonic() + args.seconds
    for folder in TINY if args.tiny else FOLDERS:
        left = until - time.monotonic()
        if left <= 0:
            return
        for row in folder_rows(folder, args.device, left):
            out.add(row)


if __name__ == "__main__":
    main()
