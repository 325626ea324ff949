"""Published counts and ours, from geometry alone: `python -m benchmarks.paper.counts`."""

import argparse

from rich.console import Console
from rich.table import Table

from benchmarks.common import write_rows
from benchmarks.paper import aim, fastv, lookm
from benchmarks.paper.figure import Figure


def figures() -> list[Figure]:
    """Every figure of every paper."""
    return [*aim.figures(), *fastv.figures(), *lookm.figures()]


def table_of(found: list[Figure]) -> Table:
    """One line a figure."""
    table = Table(title="published and counted from geometry", title_justify="left")
    for column, justify in (("paper", "left"), ("model", "left"), ("setting", "left"), ("quantity", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("published", "ours", "deviation"):
        table.add_column(column, justify="right")
    for x in found:
        numbers = f"{x.published:g} {x.unit}", f"{x.ours:.4g}", f"{x.deviation_percent:+.2f} %"
        table.add_row(x.paper.split(" (")[0], x.model, x.setting, x.quantity, *numbers)
    return table


def main() -> None:
    """Prints the table and stores the rows."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    found = figures()
    Console(width=170).print(table_of(found))
    path = write_rows("paper", [x.row() for x in found])
    print(f"{len(found)} figures in {path}")


if __name__ == "__main__":
    main()
