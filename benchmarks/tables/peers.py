"""Peers beside us, on the same weights and prompts."""

from benchmarks.common import read_rows
from benchmarks.tables.markdown import markdown, origin

Row = dict[str, str]


def quality() -> str:
    """Right answers and KL of kvpress's presses and of our settings; next-turn."""
    rows = [r for r in read_rows("peers") if r["measure"] == "quality" and r["status"] == "measured"]
    lengths = sorted({r["images"] for r in rows}, key=int)
    cells = {(r["system"], r["setting"], r["images"]): r for r in rows}
    header = ["system", "setting"]
    header += [f"{what}, {n} pictures" for n in lengths for what in ("entries kept", "right", "KL, answer")]
    table = []
    for system, setting in dict.fromkeys(key[:2] for key in cells):
        own = [cells.get((system, setting, n)) for n in lengths]
        figures = [x for r in own for x in (["", "", ""] if r is None else [_kept(r), r["accuracy"], r["kl"]])]
        table.append([system, f"`{setting}`", *figures])
    asked = ", ".join(f"{next(r for r in rows if r['images'] == n)['questions']} over {n}" for n in lengths)
    versions = next((r["versions"] for r in rows if r["versions"]), "")
    worst = max((float(r["logits_differ"]) for r in rows if r["logits_differ"]), default=0.0)
    told = (
        f"next-turn; questions: {asked} pictures, seed {rows[0]['seed']}. The peer: {versions}, in its own environment;"
    )
    told += f" with nothing evicted its logits differ from ours by {worst:.1g} at most."
    return f"{markdown(header, table)}\n\n{told} {origin(rows)}."


def times() -> str:
    """What was timed beside peers, and what could not be run."""
    rows = [r for r in read_rows("peers") if r["measure"] != "quality" or r["status"] != "measured"]
    header = [
        "peer",
        "model",
        "system",
        "setting",
        "tokens",
        "entries kept",
        "TTFT, ms",
        "ms a token (p20 to p80)",
        "status",
    ]
    table = []
    for r in rows:
        span = (
            f"{float(r['median_ms']):,.2f} ({float(r['p20_ms']):,.2f} to {float(r['p80_ms']):,.2f})"
            if r["median_ms"]
            else ""
        )
        ttft = f"{float(r['ttft_ms']):,.1f}" if r["ttft_ms"] else ""
        note = ", ".join(filter(None, [r["status"], r["note"]]))
        line = [r["against"], r["model"], r["system"], f"`{r['setting']}`", r["tokens"], _kept(r), ttft, span]
        table.append([*line, note.replace("\n", " ").replace("|", "/")])
    return f"{markdown(header, table)}\n\nTurns of both processes alternate in one run. {origin(rows)}."


def _kept(row: Row) -> str:
    return f"{float(row['cache_kept']):.1f} %" if row["cache_kept"] else ""
