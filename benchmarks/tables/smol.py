"""What the yardstick says: tables of the real model, and its column in the tables of the bundled one.

Seeds are pooled. Kept: of the questions that the uncompressed model answers right, the percentage that stay right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from benchmarks.common import RESULTS, read_rows
from benchmarks.quality.smol_cells import ALL, EMBEDDINGS, MODELS, PIXELS
from benchmarks.quality.smol_settings import BUDGETS, known_settings
from benchmarks.tables.markdown import commits, markdown, origin
from mminfer.bench.protocols import Protocol
from mminfer.needle.scores import wilson
from mminfer.technique import CACHE_SHARES

Row = dict[str, str]
FIGURES = ("kept", "of", "same answer", "KL", "entries kept")
Key = tuple[str, str, str, str, str]  # model, setting, protocol, kind of pages, kind of question
SHARES = sorted({*BUDGETS, *CACHE_SHARES}, reverse=True)  # percent of all entries, side by side
NOTHING = "There is no column of the real model: it was not measured in this way."
NO_ROWS = "No rows of the real model yet: `python -m benchmarks.quality.smol` makes them."


@dataclass(frozen=True)
class Cell:
    """Rows of all seeds as one.

    Args:
        rows: of one key.
    """

    rows: tuple[Row, ...]

    def total(self, column: str) -> int:
        return sum(int(row[column]) for row in self.rows)

    def mean(self, column: str) -> float:
        """By the number of questions."""
        return sum(float(row[column]) * int(row["questions"]) for row in self.rows) / self.total("questions")

    @property
    def kept(self) -> str:
        """Percent; "" where the full model was never right."""
        full = self.total("full_right")
        return f"{100 * self.total('stayed') / full:.1f}" if full else ""

    @property
    def kept_within(self) -> str:
        """With its 95 % interval."""
        if not self.kept:
            return ""
        low, high = wilson(self.total("stayed"), self.total("full_right"))
        return f"{self.kept} ({100 * low:.0f} to {100 * high:.0f})"

    @property
    def right(self) -> str:
        return f"{100 * self.total('right') / self.total('questions'):.1f}"


def cells(file: str = "smol") -> dict[Key, Cell]:
    """All cells that were measured; none where there is no file."""
    path = RESULTS / f"{file}.csv"
    return _cells(file, str(path), path.stat().st_mtime_ns) if path.exists() else {}


@lru_cache(maxsize=2)
def _cells(file: str, path: str, changed: int) -> dict[Key, Cell]:
    """Those of a file as it was changed then: every table asks for them."""
    found: dict[Key, list[Row]] = {}
    for row in read_rows(file):
        key = row["model"], row["setting"], row["protocol"], row["pages"], row["kind"]
        found.setdefault(key, []).append(row)
    return {key: Cell(tuple(rows)) for key, rows in found.items()}


def cell_of(setting: str, protocol: str, model: str = PIXELS, file: str = "smol") -> Cell | None:
    """All questions under a setting, or under another name of what it sets; None: it was not measured."""
    found = (cells(file).get((model, name, protocol, ALL, ALL)) for name in _names_of(setting))
    return next((cell for cell in found if cell is not None), None)


@cache
def _names_of(setting: str) -> tuple[str, ...]:
    """A setting's names, its own first: one that a table calls by its rule may be a preset."""
    known = known_settings(SHARES)
    if setting not in known:
        return (setting,)
    return (setting, *(name for name, other in known.items() if other.config == known[setting].config))


def kept(setting: str, protocol: str, model: str = PIXELS) -> str:
    """Percent of the right answers that stay right; "" where it was not measured."""
    cell = cell_of(setting, protocol, model)
    return "" if cell is None else cell.kept


def beside(
    header: list[str], table: list[list[str]], settings: Mapping[str, Sequence[str]], protocol: str
) -> tuple[list[str], list[list[str]], str]:
    """A table of the bundled model with columns of the real one at its right end.

    Args:
        header: of the table.
        table: its lines.
        settings: by the new column's name, the setting of each line.
        protocol: of the table.

    Returns:
        Header, lines, and a sentence that says what the columns are, or that there are none.
    """
    columns = {name: [kept(setting, protocol) for setting in own] for name, own in settings.items()}
    columns = {name: own for name, own in columns.items() if any(own)}
    if not columns:
        return header, table, NOTHING
    lines = [[*line, *own] for line, *own in zip(table, *columns.values(), strict=True)]
    shown = {"off", *(setting for own in settings.values() for setting in own)}
    found = (cell_of(setting, protocol) for setting in sorted(shown))
    rows = [row for cell in found if cell is not None for row in cell.rows]
    asked = cells()[PIXELS, "off", str(protocol), ALL, ALL]
    told = f"Real model: percent of {asked.total('full_right')} right answers that stay right, by pixels, of its own "
    told += f"table, {commits(rows)}."
    return [*header, *columns], lines, told


def abilities() -> str:
    """What the uncompressed model gets right, by kind of page and question; next-turn."""
    found = {key: cell for key, cell in cells().items() if key[1:3] == ("off", str(Protocol.NEXT_TURN))}
    if not found:
        return NO_ROWS
    models = [model for model in MODELS if any(key[0] == model for key in found)]
    header = ["pages", "question", *(f"{what}, {model}" for model in models for what in ("asked", "right"))]
    table = []
    for pages, kind in dict.fromkeys(key[3:] for key in found):
        own = [found.get((model, "off", str(Protocol.NEXT_TURN), pages, kind)) for model in models]
        figures = [
            x for cell in own for x in (["", ""] if cell is None else [str(cell.total("questions")), cell.right])
        ]
        table.append([pages, kind, *figures])
    return f"{markdown(header, table)}\n\nPercent right, nothing compressed, next-turn. {_origin(found)}."


def rules(protocol: Protocol) -> str:
    """What every setting keeps."""
    own = {key: cell for key, cell in cells().items() if key[2] == str(protocol) and key[3:] == (ALL, ALL)}
    if not own:
        return f"{protocol}: {NO_ROWS}"
    models = [model for model in MODELS if any(key[0] == model for key in own)]
    header = ["setting", *(f"{what}, {m}" for m in models for what in FIGURES)]
    table = []
    for setting in dict.fromkeys(key[1] for key in own):
        line = [f"`{setting}`"]
        for model in models:
            cell = own.get((model, setting, str(protocol), ALL, ALL))
            line += [""] * len(FIGURES) if cell is None else _figures(cell)
        table.append(line)
    asked = ", ".join(_asked(own[model, "off", str(protocol), ALL, ALL], model) for model in models)
    return f"{markdown(header, table)}\n\n{protocol}: {asked}. {_origin(own)}."


def by_kind(protocol: Protocol, model: str = PIXELS) -> str:
    """What every setting keeps on each kind of page, and of each kind of question."""
    own = {key[1:2] + key[3:]: cell for key, cell in cells().items() if key[0] == model and key[2] == str(protocol)}
    if not own:
        return f"{model}, {protocol}: {NO_ROWS}"
    pages, kinds = (list(dict.fromkeys(key[n] for key in own if key[n] != ALL)) for n in (1, 2))
    table = []
    for setting in dict.fromkeys(key[0] for key in own):
        mine = {key[1:]: cell for key, cell in own.items() if key[0] == setting and key[1:] != (ALL, ALL)}
        sums = [_pooled(cell for key, cell in mine.items() if name in key).kept for name in (*pages, *kinds)]
        table.append([f"`{setting}`", *sums])
    return (
        f"{markdown(['setting', *pages, *kinds], table)}\n\nKept, by kind of page and of question; {model}, {protocol}."
        f" {_origin(own)}."
    )


def _pooled(parts: Iterable[Cell]) -> Cell:
    return Cell(tuple(row for cell in parts for row in cell.rows))


def _figures(cell: Cell) -> list[str]:
    of = str(cell.total("full_right"))
    return [
        cell.kept_within,
        of,
        f"{cell.mean('same'):.1f}",
        f"{cell.mean('kl'):.3f}",
        f"{cell.mean('cache_kept'):.0f} %",
    ]


def _asked(cell: Cell, model: str) -> str:
    how = "by pixels" if model != EMBEDDINGS else "by embeddings"
    return f"{cell.total('questions')} questions, of which the full model gets {cell.total('full_right')} {how}"


def _origin(found: Mapping[Any, Cell]) -> str:
    return origin([row for cell in found.values() for row in cell.rows])
