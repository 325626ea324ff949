"""Merging by regions beside AIM's, down-sampling and chance, at as many tokens: pages, pictures, films, time."""

from __future__ import annotations

from benchmarks.common import RESULTS, read_rows
from benchmarks.quality.settings import GROUPS, OFF
from benchmarks.quality.smol_cells import ALL, PIXELS
from benchmarks.quality.smol_settings import REGIONS
from benchmarks.tables import smol
from benchmarks.tables.markdown import markdown, origin
from mminfer.bench.protocols import Protocol

Row = dict[str, str]
READER = "smol_regions"  # file of the rows on pages: those of `smol` are of another run


def _rows(name: str) -> list[Row]:
    return read_rows(name) if (RESULTS / f"{name}.csv").exists() else []


def reader() -> str:
    """What stays right on the real model's pages, by kind of page, with what is left of the tokens; next-turn."""
    own = {
        key: cell for key, cell in smol.cells(READER).items() if key[0] == PIXELS and key[2] == str(Protocol.NEXT_TURN)
    }
    names = [name for name in REGIONS if any(key[1] == name for key in own)]
    if len(names) < 2:
        return (
            "No rows of regions on pages yet: `python -m benchmarks.quality.smol --rules regions --out smol_regions`."
        )
    pages = [p for p in dict.fromkeys(key[3] for key in own if key[1] == "regions") if p != ALL]
    table, shown = [], []
    for name in names:
        whole = next(cell for key, cell in own.items() if (key[1], *key[3:]) == (name, ALL, ALL))
        of_kind = [
            tuple(row for key, cell in own.items() if (key[1], key[3]) == (name, p) for row in cell.rows) for p in pages
        ]
        kinds = [smol.Cell(rows) for rows in of_kind if rows]
        shown += whole.rows
        left = [f"{whole.mean('cache_kept'):.1f} %", *(f"{cell.mean('cache_kept'):.0f} %" for cell in kinds)]
        kept = [whole.kept_within, *(cell.kept for cell in kinds)]
        table.append([f"`{name}`", *(x for pair in zip(kept, left, strict=True) for x in pair)])
    header = ["setting", *(f"{what}, {p}" for p in (ALL, *pages) for what in ("kept", "entries"))]
    about = "Next-turn, by pixels: of the answers that are right uncompressed, percent that stay right, and entries "
    about += (
        "left, text included. Of the cells of a page of dense text 3 % are blank, of mixed ones 37, of sparse text "
    )
    about += "68, of pictures 74. Down-sampling goes by whole lines and columns: 7 x 7 or 6 x 7 of 8 x 8."
    return f"{markdown(header, table)}\n\n{about} {origin(shown)}."


def nano() -> str:
    """Right answers of the bundled model over pictures, at shares of their tokens."""
    rows = _rows("regions")
    if not rows:
        return (
            "No rows of regions on pictures yet: `python -m benchmarks.quality.needle --groups regions --out regions`."
        )
    names = [name for name in (*OFF, *GROUPS["regions"]) if any(row["setting"] == name for row in rows)]
    table = [line for name in names for line in (_line([r for r in rows if r["setting"] == name], "protocol"))]
    header = ["setting", "protocol", "entries kept", "right", "Q1 labels", "Q2 contents", "Q3 facts", "KL"]
    asked = " or ".join(dict.fromkeys(f"{row['questions']} over {row['images']}" for row in rows))
    return f"{markdown(header, table)}\n\nnano, questions: {asked} pictures; KL over continuations. {origin(rows)}."


def film() -> str:
    """Right answers of the bundled model over films whose frames change little, within and over frames."""
    rows = _rows("film")
    if not rows:
        return "No rows of films yet: `python -m benchmarks.quality.film` makes them."
    table = [line for row in rows for line in _line([row], "frames")]
    header = ["setting", "frames", "entries kept", "right", "Q1 labels", "Q2 contents", "Q3 facts", "KL"]
    asked = " or ".join(dict.fromkeys(f"{row['questions']} over {row['images']}" for row in rows))
    about = f"nano, next-turn, questions: {asked} labelled films. Frames of a film stand in a row, as in Qwen2-VL and "
    about += "LLaVA-OneVision; where text stands between them, as InternVL writes it, nothing joins over time."
    return f"{markdown(header, table)}\n\n{about} {origin(rows)}."


def _line(rows: list[Row], told: str) -> list[list[str]]:
    figures = ("accuracy", "Q1", "Q2", "Q3", "kl_long")
    return [
        [f"`{r['setting']}`", r[told], f"{float(r['cache_kept']):.1f} %", *(r[name] for name in figures)] for r in rows
    ]


def stage() -> str:
    """What merging takes a picture, beside AIM's."""
    rows = _rows("merge_stage")
    if not rows:
        return "No rows of the merging stage yet: `python -m benchmarks.models.merge_stage` makes them."
    table = []
    for r in rows:
        facts = [r["pictures_are"], f"{int(r['tokens']):,}", r["pictures"], f"`{r['setting']}`"]
        table.append(
            [*facts, f"{float(r['left']):.0f} %", f"{float(r['cpu_ms_median']):.2f}", f"{float(r['of_aim']):.2f}"]
        )
    header = ["pictures", "tokens a picture", "at once", "setting", "left", "CPU ms a picture", "of AIM's"]
    rounds = " or ".join(dict.fromkeys(r["repeats"] for r in rows))
    about = "The merging alone, 896 channels: medians, and medians of the quotients within a round."
    return f"{markdown(header, table)}\n\n{about} {origin(rows)}; {rounds} rounds, interleaved in one process."
