"""Peers beside us, on the same weights and prompts."""

from benchmarks.common import read_rows
from benchmarks.tables.markdown import markdown, origin
from benchmarks.tables.smol import NOTHING

Row = dict[str, str]
FIDELITY = ("quality", "kept")  # measures that are no times


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
    told = f"next-turn; questions: {asked} pictures. The peer: {versions}, in its own "
    told += f"environment; with nothing evicted its logits differ from ours by {worst:.1g} at most."
    return f"{markdown(header, table)}\n\n{told} {origin(rows)}. {NOTHING}"


def kept() -> str:
    """Of what is answered right uncompressed, how much stays right under Replay and under kvpress's KVzip."""
    rows = [r for r in read_rows("peers") if r["measure"] == "kept" and r["status"] == "measured"]
    if not rows:
        return "None was measured."
    header = ["model", "pictures", "protocol", "system", "setting", "entries read", "entries held", "stays right"]
    header += ["95 %", "of", "KL", "compressing"]
    table = [
        [
            *(r[name] for name in ("model", "images", "protocol", "system")),
            f"`{r['setting']}`",
            f"{float(r['attended']):.1f} %",
            _kept(r),
            r["kept"],
            f"{r['kept_low']} to {r['kept_high']}",
            f"{r['full_right']} of {r['questions']}",
            r["kl"],
            r["compress"],
        ]
        for r in rows
    ]
    versions = next((r["versions"] for r in rows if r["versions"]), "not installed")
    worst = max((float(r["logits_differ"]) for r in rows if r["logits_differ"]), default=0.0)
    told = "Percent of the questions that the same side answers right uncompressed; KL in nats over forced answers; "
    told += (
        "compressing: its processor time as a share of the side's own prompt pass, median over contexts. kvpress masks "
    )
    told += "what a head loses and holds it. Streamed, its KVzip goes behind each chunk through all that came so far, "
    told += "and what it masked stays masked. "
    told += f"The peer: {versions}, in its own environment; its whole cache's logits differ from ours by {worst:.1g} "
    told += "at most."
    return f"{markdown(header, table)}\n\n{told} {origin(rows)}."


def times() -> str:
    """What was timed beside peers, and what could not be run."""
    rows = [r for r in read_rows("peers") if r["measure"] not in FIDELITY or r["status"] != "measured"]
    header = ["peer", "model", "system", "setting", "tokens", "entries kept", "TTFT, ms", "TPOT, ms", "status"]
    table = []
    for r in rows:
        line = [r["against"], r["model"], r["system"], f"`{r['setting']}`", r["tokens"], _kept(r), *_milliseconds(r)]
        told = ", ".join(filter(None, [r["status"], r["note"]]))
        table.append([*line, told.replace("\n", " ").replace("|", "/")])
    told = "Turns of both processes alternate in one run; 20th to 80th percentile."
    return f"{markdown(header, table)}\n\n{told} {origin(rows)}."


def _milliseconds(row: Row) -> list[str]:
    """To the first token, and for one more; empty where they were not measured."""
    ttft = f"{float(row['ttft_ms']):,.1f}" if row["ttft_ms"] else ""
    if not row["median_ms"]:
        return [ttft, ""]
    low, middle, high = (float(row[name]) for name in ("p20_ms", "median_ms", "p80_ms"))
    return [ttft, f"{middle:,.2f} ({low:,.2f} to {high:,.2f})"]


def _kept(row: Row) -> str:
    return f"{float(row['cache_kept']):.1f} %" if row["cache_kept"] else ""
