"""What every benchmark needs: rows that say where they come from, and timing that a drifting machine cannot bend."""

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mminfer_kernels
import torch
import transformers

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WRITTEN = ("benchmarks/results", "benchmarks/REPORT.md", "README.md", "docs")  # what no row follows from
DIRTY = "-dirty"  # behind a commit: files differ from it
SEED = 0  # of inputs and random weights, where a row names no other


def provenance() -> dict[str, Any]:
    """Commit, machine and versions, for every row."""
    return {
        "commit": commit_of(ROOT),
        "device": f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def commit_of(root: Path) -> str:
    """The commit of a checkout, "-dirty" behind it where files differ; rows and pages made of them do not count."""
    commit = _git(root, "rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    others = (f":(top,exclude){path}" for path in WRITTEN)
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ":(top)", *others)
    return f"{commit}{DIRTY}" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    """What git says; "" where it fails."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


ORIGIN = provenance()  # of the code as it was loaded, whatever is committed during a long run


def write_rows(name: str, rows: Iterable[Mapping[str, Any]], key: Sequence[str] = ()) -> Path:
    """Puts rows into results/<name>.csv, provenance added, and notes their canaries beside them.

    Args:
        name: of the file.
        rows: one mapping a row, all with the same columns.
        key: columns that tell rows apart: rows of an earlier run that are not replaced stay, if they
            have the same columns. Without it none stays.
    """
    now = {**ORIGIN, "threads": torch.get_num_threads()}  # a script may have set another number
    complete = [{k: str(v) for k, v in {**row, "seed": row.get("seed", SEED), **now}.items()} for row in rows]
    written, path = complete, RESULTS / f"{name}.csv"
    if key and path.exists():
        new = {tuple(row[k] for k in key): row for row in complete}
        same = [row for row in read_rows(name) if row.keys() == complete[0].keys()]
        kept = [new.pop(tuple(row[k] for k in key), row) for row in same]
        complete = [*kept, *new.values()]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, complete[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(complete)
    from benchmarks.canaries import stored  # which runs what has imported this module

    stored.note(name, written)
    return path


def show_rows(name: str, rows: Sequence[Mapping[str, Any]], key: Sequence[str] = ()) -> None:
    """Prints rows and puts them into results/<name>.csv, as `write_rows` does; "-": only prints them."""
    for row in rows:
        print(row, flush=True)
    if name != "-":
        print(write_rows(name, rows, key=key), flush=True)


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of results/<name>.csv."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Times runs in turn, so that drift moves all of them; one warm-up each is told apart.

    Returns:
        For each run: warmup_ms, p20_ms, median_ms, p80_ms.
    """
    mminfer_kernels.prepare("cpu")
    warmup = {name: _time_ms(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_time_ms(run))
    return {name: {"warmup_ms": warmup[name], **quantiles(values)} for name, values in times.items()}


def _time_ms(run: Callable[[], Any]) -> float:
    start = done_at()
    run()
    return 1e3 * (done_at() - start)


def done_at() -> float:
    """`time.perf_counter()` when a GPU that is in use has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def quantiles(values: list[float]) -> dict[str, float]:
    """p20_ms, median_ms and p80_ms of times in milliseconds."""
    if len(values) == 1:
        return {"p20_ms": values[0], "median_ms": values[0], "p80_ms": values[0]}
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20_ms": p20, "median_ms": statistics.median(values), "p80_ms": p80}
