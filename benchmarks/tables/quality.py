"""What compression costs in answers: lengths, chunks, scores."""

from benchmarks.common import read_rows
from benchmarks.tables.markdown import markdown, origin
from benchmarks.tables.smol import NOTHING


def length() -> str:
    """Accuracy by positions, cache and number of pictures."""
    rows = read_rows("length")
    cells = {(r["cache"], r["positions"], int(r["images"])): r for r in rows}
    lengths = sorted({n for *_, n in cells})
    table = []
    for cache in dict.fromkeys(r["cache"] for r in rows):
        names = {r["positions"] for r in rows if r["cache"] == cache}
        for positions in [p for p in dict.fromkeys(r["positions"] for r in rows) if p in names]:
            found = [cells.get((cache, positions, n)) for n in lengths]
            table.append([cache, positions, *("" if r is None else r["accuracy"] for r in found)])
    asked = {n: max(int(r["questions"]) for r in rows if int(r["images"]) == n) for n in lengths}
    told = ", ".join(f"{asked[n]} over {n:,}" for n in lengths)
    return (
        f"{markdown(['cache', 'positions', *(f'{n:,}' for n in lengths)], table)}\n\nPercent of right answers by "
        f"number of pictures; questions: {told} pictures. {origin(rows)}. {NOTHING}"
    )


def streamed() -> str:
    """What chunks cost over compressing once."""
    rows = read_rows("streamed")
    header = ["cache kept", "chunk", "right answers", "KL to the whole cache", "KL to compressing once", "same token"]
    table = [
        [f"{100 * float(r['share']):.0f} %", r["chunk"], r["accuracy"], r["kl_full"], r["kl_once"], r["agreement_once"]]
        for r in rows
    ]
    asked = rows[0]
    return (
        f"{markdown(header, table)}\n\nnano, {asked['images']} pictures ({int(asked['tokens']):,} tokens), "
        f"{asked['questions']} questions; KL in nats of the answer's first token; right answers and agreement in "
        f"percent. {origin(rows)}. {NOTHING}"
    )


def scores() -> str:
    """Overlap of what sampled scores keep with what exact ones keep."""
    rows = read_rows("scores")
    cells = {(r["queries"], r["images"], r["budget"], r["text_prior"]): r["overlap"] for r in rows}
    columns = list(dict.fromkeys(key[1:] for key in cells))
    header = ["queries"]
    header += [f"{n} pictures, {float(b):.0%}{'' if prior == 'True' else ', no text prior'}" for n, b, prior in columns]
    table = [[name, *(cells[name, *c] for c in columns)] for name in dict.fromkeys(key[0] for key in cells)]
    return f"{markdown(header, table)}\n\nOverlap on the bundled model. {origin(rows)}. {NOTHING}"
