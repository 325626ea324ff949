"""Published counts beside ours."""

from benchmarks.common import read_rows
from benchmarks.tables.markdown import commits, markdown


def paper() -> str:
    """Every count with what papers print; of FastV's shares of its own baseline the absolute ones alone."""
    rows = [r for r in read_rows("paper") if not r["quantity"].startswith("FLOPs kept")]
    reasons = list(dict.fromkeys(r["how"] for r in rows))
    header = ["paper, table", "model", "setting", "what is counted", "unit", "published", "ours", "off by", "how"]
    table = [
        [
            f"{r['paper'].split(' (')[0]}, {r['table']}",
            *(r[name] for name in ("model", "setting", "quantity", "unit", "published", "ours")),
            f"{float(r['deviation_percent']):+.1f} %",
            f"({reasons.index(r['how']) + 1})",
        ]
        for r in rows
    ]
    notes = "\n".join(f"{n}. {reason}" for n, reason in enumerate(reasons, 1))
    sources = ", ".join(dict.fromkeys(r["paper"] for r in rows))
    told = f"Counted, not timed; published figures from {sources}; {commits(rows)}."
    return f"{markdown(header, table)}\n\n{notes}\n\n{told}"
