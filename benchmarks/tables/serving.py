"""What a server gives: load, known documents, gaps."""

from benchmarks.common import RESULTS, read_rows
from benchmarks.tables.markdown import markdown, origin

MIB = 2**20
WORKLOADS = {"new": "pictures nobody has sent", "known": "questions over known pictures"}


def load() -> str:
    """Requests a second and times by requests in flight, or a sentence that nobody has measured them."""
    rows = [r for r in _rows() if r["measure"] == "load"]
    if not rows:
        return "No rows of servers under load yet: `python -m benchmarks.serving.load` makes them."
    header = ["asked", "setting", "in flight", "requests/s", "CPU, ms a request", "TTFT, ms, p50 (p95)"]
    header += ["TPOT, ms, p50 (p95)", "answers as alone"]
    table = []
    for r in sorted(rows, key=lambda r: (list(WORKLOADS).index(r["workload"]), r["setting"], int(r["in_flight"]))):
        spans = [f"{float(r[f'{x}_ms_p50']):,.1f} ({float(r[f'{x}_ms_p95']):,.1f})" for x in ("ttft", "tpot")]
        same = f"{100 * float(r['same_answers']):.0f} %" if r["same_answers"] else ""
        rates = [f"{float(r['requests_a_s']):,.1f}", f"{float(r['cpu_ms']):,.0f}"]
        table.append([WORKLOADS[r["workload"]], f"`{r['setting']}`", r["in_flight"], *rates, *spans, same])
    pictures = " or ".join(dict.fromkeys(r["pages"] for r in rows))
    told = f"nano, {pictures} pictures a request, 16 tokens an answer, clients in a process of their own. CPU time is "
    told += "the server's, requests a second go by the clock."
    return f"{markdown(header, table)}\n\n{told} {origin(rows)}."


def documents() -> str:
    """A long document: new, known, in memory, and beside an answer under way."""
    rows = [r for r in _rows() if r["measure"] != "load"]
    if not rows:
        return "No rows of long documents yet: `python -m benchmarks.serving.load` makes them."
    header = ["setting", "pages", "TTFT, new, ms", "TTFT, known, ms", "share", "MiB kept", "so in 4 GiB"]
    header += ["longest gap beside it, ms"]
    table = []
    for setting in dict.fromkeys(r["setting"] for r in rows):
        own = {r["measure"]: r for r in rows if r["setting"] == setting}
        new, known = float(own["document"]["ttft_ms_p50"]), float(own["document"]["second_ttft_ms"])
        facts = [
            f"{new:,.0f}",
            f"{known:,.0f}",
            f"{known / new:.3f}",
            f"{int(own['warm']['document_bytes']) / MIB:,.2f}",
        ]
        kept = [f"{int(own['warm']['warm']):,}", f"{float(own['gap']['gap_ms']):,.0f}"]
        table.append([f"`{setting}`", own["document"]["pages"], *facts, *kept])
    told = (
        "One document each. Kept: the document, and the chat with one question and its answer, which is as large again."
    )
    return f"{markdown(header, table)}\n\n{told} {origin(rows)}."


def _rows() -> list[dict[str, str]]:
    return read_rows("serving") if (RESULTS / "serving.csv").exists() else []
