"""What the vision tower takes."""

from benchmarks.common import RESULTS, read_rows
from benchmarks.tables.markdown import markdown, origin


def tower() -> str:
    """CPU time and FLOPs of the tower by kind of page, or a sentence that nobody has measured it."""
    if not (RESULTS / "tower.csv").exists():
        return "No rows of the vision tower yet: `python -m benchmarks.models.tower` makes them."
    rows = read_rows("tower")
    header = ["tower", "layers", "page", "pixels", "setting", "rows that repeat", "GFLOP", "CPU, ms", "at least"]
    header += ["times less", "of the fastest"]
    table = []
    for r in rows:
        facts = [r["model"], r["layers"], r["pages_are"], r["pixels"], f"`{r['setting']}`"]
        figures = [f"{float(r['repeated']):.1f} %", f"{float(r['gflop']):,.1f}"]
        figures += [f"{float(r[name]):,.0f}" for name in ("cpu_ms_median", "cpu_ms_min")]
        figures += [f"{float(r[name]):.2f}" for name in ("times_less", "times_less_of_min")]
        table.append([*facts, *figures])
    told = "Times less than `off` of the same round: median over rounds, and fastest by fastest. Rows that repeat are "
    told += "those that `PatchDedup(0)` finds; `kept encoded` is a page that was asked about before."
    rounds = " or ".join(dict.fromkeys(r["repeats"] for r in rows))
    return f"{markdown(header, table)}\n\n{told} {origin(rows)}; {rounds} rounds, interleaved in one process."
