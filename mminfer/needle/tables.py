"""The tables that `mminfer bench needle` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from mminfer.metrics.memory import show_bytes
from mminfer.needle.scores import Row


def accuracy_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Percent right above its 95 % interval, a table for each number of images: settings down, depths across."""
    for images in dict.fromkeys(row.images for row in rows):
        yield _accuracy_table(images, [row for row in rows if row.images == images])


def cost_table(rows: Sequence[Row]) -> Table:
    """What answers took, by setting and number of images."""
    table = _table("what an answer took", "images", "setting", "ms", "ms to read", "cache", "full cache", "peak memory")
    seen: dict[tuple[int, str], Row] = {}
    for row in rows:
        if row.depth is None:
            seen.setdefault((row.images, row.setting), row)
    for (images, setting), row in seen.items():
        read = "" if row.read_ms is None else f"{row.read_ms:,.0f}"
        memory = [show_bytes(count) for count in (row.cache_bytes, row.full_cache_bytes, row.peak_bytes)]
        table.add_row(str(images), setting, f"{row.ms:,.0f}", read, *memory)
    return table


def _accuracy_table(images: int, rows: Sequence[Row]) -> Table:
    depths = sorted({row.depth for row in rows if row.depth is not None})
    columns = [f"depth {depth:g}" for depth in depths]
    title = f"{images} images: percent right, its 95 % interval, n answers"
    table = _table(title, "metric", "setting", "all", "n", *columns, "chance", "no answer")
    cells = {(row.metric, row.setting, row.depth): row for row in rows}
    metrics = list(dict.fromkeys(row.metric for row in rows))
    for whole in sorted((row for row in rows if row.depth is None), key=lambda row: metrics.index(row.metric)):
        line = [cells.get((whole.metric, whole.setting, depth)) for depth in depths]
        each = {row.samples for row in line if row is not None}
        count = f"{whole.samples}" + (f"\n{min(each)} each" if len(each) == 1 and len(depths) > 1 else "")
        shown = ["" if row is None else _cell(row) for row in line]
        chance = f"{100 * whole.chance:.3g}"
        table.add_row(whole.metric, whole.setting, _cell(whole), count, *shown, chance, str(whole.unparsable))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("metric", "setting") else "right", overflow="fold")
    return table


def _cell(row: Row) -> str:
    return f"{100 * row.accuracy:.1f}\n{100 * row.low:.0f}-{100 * row.high:.0f}"
