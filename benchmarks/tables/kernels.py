"""What each op reaches."""

from benchmarks.common import read_rows
from benchmarks.tables.markdown import markdown, origin


def kernels() -> str:
    """Every op's native kernel beside what it is compared with."""
    rows = read_rows("kernels")
    measured = "of_peak" in rows[0]  # rows of before have no peak
    header = ["op", "run", "ms (p20 to p80)", "of the first", "GFLOP/s", "GB/s", *(["of peak"] if measured else [])]
    table, before = [], ""
    for r in rows:
        name, before = "" if r["op"] == before else r["op"], r["op"]
        line = [name, _run_of(r), *_times_of(r), r["gflops_a_s"], r["gb_a_s"]]
        if measured:
            line.append(f"{100 * float(r['of_peak']):.0f} %, {r['bound']}" if r["of_peak"] else "")
        table.append([*line, r["extra_mib"]])
    told = f"{markdown([*header, 'extra MiB'], table)}\n\n{origin(rows)}; medians of runs interleaved in one process."
    return told + _peaks(rows) if measured else told


def _run_of(row: dict[str, str]) -> str:
    """A kernel run's name, with what came of compiling where that is not all of it."""
    status = row.get("status", "")
    return row["run"] if status in ("", "1 graph") else f"{row['run']}: {status}"


def _times_of(row: dict[str, str]) -> list[str]:
    """Milliseconds and ratio of a kernel run; empty where it could not be timed."""
    if not row["median_ms"]:
        return ["", ""]
    span = f"{float(row['median_ms']):,.1f} ({float(row['p20_ms']):,.1f} to {float(row['p80_ms']):,.1f})"
    return [span, f"{float(row['of_first']):.2f}"]


def _peaks(rows: list[dict[str, str]]) -> str:
    """What `of peak` is of, and what compiling took."""
    spans = []
    for name in ("peak_gflops_a_s", "peak_gb_a_s", "compile_s"):
        values = [float(r[name]) for r in rows if r[name]] or [0.0]
        least, most = f"{min(values):,.0f}", f"{max(values):,.0f}"
        spans.append(least if least == most else f"{least} to {most}")
    return (
        f" Peak: a float32 matrix product at {spans[0]} GFLOP/s, a copy at {spans[1]} GB/s, measured in the same run; "
        f"above 100 % data came from a cache. Compiling a reference took {spans[2]} s, apart from these times."
    )
