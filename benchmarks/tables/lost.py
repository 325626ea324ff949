"""Where a compressed cache loses what it loses, by layer and by head."""

from __future__ import annotations

from benchmarks.common import RESULTS, read_rows
from benchmarks.tables.markdown import markdown, origin

Row = dict[str, str]


def lost() -> str:
    """Of each layer, and of the heads of those that lose most: what its entries cost, and what they are."""
    rows = read_rows("lost") if (RESULTS / "lost.csv").exists() else []
    if not rows:
        return "No rows of what is lost where yet: `python -m benchmarks.quality.lost` makes them."
    whole = next(row for row in rows if row["what"] == "all compressed")
    alone = {row["layer"]: row for row in rows if row["what"] == "layer alone compressed"}
    table = [_line("all", whole, whole, whole)]
    for row in rows:
        if row["what"] == "layer restored":
            table.append(_line(row["layer"], row, whole, alone[row["layer"]]))
            heads = (r for r in rows if r["what"] == "head restored" and r["layer"] == row["layer"])
            table += [_line(f"{head['layer']}, head {head['head']}", head, whole, None) for head in heads]
    header = ["layer", "of an even share", "KL restored", "brought back", "answers back", "KL alone compressed"]
    missing = int(whole["full_right"]) - int(whole["stayed"])
    about = (
        f"{whole['setting']}, by {whole['model']}, next-turn, {whole['books']} books. Restored: all layers are "
        "compressed but that this one, or this head, has all its entries; brought back: of the KL of the first line. "
        f"Answers: of the {missing} of {whole['full_right']} that all compressed loses. Of an even share: how many "
        "entries it has of the shared budget, 100 % were it shared evenly"
    )
    return f"{markdown(header, table)}\n\n{about}. {origin(rows)}."


def _line(name: str, row: Row, whole: Row, alone: Row | None) -> list[str]:
    before, now = float(whole["kl"]), float(row["kl"])
    back = [f"{now:.4f}", f"{100 * (before - now) / before:.0f} %", f"{int(row['stayed']) - int(whole['stayed']):+d}"]
    if row is whole:
        back = [f"{before:.4f}", "", ""]
    return [name, f"{row['of_even_share']} %", *back, "" if alone in (None, whole) else f"{float(alone['kl']):.4f}"]
