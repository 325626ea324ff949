"""Rows of a machine with a GPU: each is on disk as soon as it is known, with the card and the versions behind it."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import provenance


def card(device: str) -> dict[str, Any]:
    """What the rows were made on: commit, card, versions."""
    told = provenance()
    if device == "cuda":
        own = torch.cuda.get_device_properties(0)
        told |= {"device": own.name, "arch": f"sm_{own.major}{own.minor}", "memory_gib": own.total_memory >> 30}
    else:
        told |= {"arch": "", "memory_gib": ""}
    try:
        import triton

        told["triton"] = triton.__version__
    except ImportError:
        told["triton"] = ""
    return told


class Rows:
    """A CSV file that grows row by row.

    Args:
        path: of the file; what was there is replaced.
        columns: beside those of `card`.
        device: "cuda" or "cpu".
    """

    def __init__(self, path: Path, columns: Sequence[str], device: str) -> None:
        self._origin = card(device)
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, [*columns, *self._origin], lineterminator="\n", restval="")
        self._writer.writeheader()

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes one row, and shows it."""
        print({k: v for k, v in row.items() if v != ""}, flush=True)
        self._writer.writerow({**row, **self._origin})
        self._file.flush()
        os.fsync(self._file.fileno())


def part_parser(description: str | None, seconds: float | None = None) -> argparse.ArgumentParser:
    """What every part is told; seconds: for a part alone, after which it begins nothing more. None: it is all parts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows; what lies there is replaced")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, for trying")
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help="after which nothing more is begun")
    return parser


def in_words(error: BaseException) -> str:
    """An error as a cell: its type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
