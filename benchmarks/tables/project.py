"""What the library supports and is set to; no rows behind it."""

from benchmarks.tables.markdown import markdown
from mminfer.inspection.support import YES, support_table
from mminfer.models.registry import supported_families


def families() -> str:
    """The supported host families."""
    return ", ".join(f"`{name}`" for name in supported_families())


def support() -> str:
    """What each family takes, and why not where it does not."""
    table = support_table()
    reasons = list(dict.fromkeys(cell for row in table.values() for cell in row.values() if cell != YES))
    techniques = list(next(iter(table.values())))
    rows = [
        [f"`{family}`", *(cell if cell == YES else f"no ({reasons.index(cell) + 1})" for cell in row.values())]
        for family, row in table.items()
    ]
    notes = "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))
    grid = markdown(["family", *techniques], rows).replace("---:", "---")
    return (
        f"{grid}\n\n{notes}\n\nAsked of each family's default configuration; a checkpoint whose language model slides "
        "refuses cache compression whatever its family."
    )
