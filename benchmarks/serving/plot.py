"""Draws throughput by requests in flight; `python -m benchmarks.report` calls it."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common import RESULTS, read_rows
from benchmarks.tables.serving import WORKLOADS


def throughput() -> Path | None:
    """Requests that one CPU second answers, and those of a second, a curve for each setting; None without rows."""
    if not (RESULTS / "serving.csv").exists():
        return None
    rows = [r for r in read_rows("serving") if r["measure"] == "load"]
    found = {workload: told for workload, told in WORKLOADS.items() if any(r["workload"] == workload for r in rows)}
    figure, panels = plt.subplots(2, len(found), figsize=(4.6 * len(found), 6.4), sharex=True, squeeze=False)
    for column, (workload, told) in enumerate(found.items()):
        for setting in dict.fromkeys(r["setting"] for r in rows):
            own = [r for r in rows if (r["workload"], r["setting"]) == (workload, setting)]
            flights = [int(r["in_flight"]) for r in own]
            panels[0][column].plot(flights, [float(r["requests_a_s"]) for r in own], marker="o", ms=3, label=setting)
            panels[1][column].plot(flights, [1e3 / float(r["cpu_ms"]) for r in own], marker="o", ms=3, label=setting)
        panels[0][column].set_title(told, fontsize=10)
        panels[1][column].set_xlabel("requests in flight", fontsize=9)
    ticks = sorted({int(r["in_flight"]) for r in rows})
    for line, told in zip(panels, ("requests a second", "requests a CPU second"), strict=True):
        line[0].set_ylabel(told, fontsize=9)
        for panel in line:
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [str(n) for n in ticks])
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    path = RESULTS / "serving.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
