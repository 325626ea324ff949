"""One published figure beside ours."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A number of a paper, and what geometry alone gives.

    Args:
        paper: name and arXiv number.
        table: where it stands.
        model: whose geometry.
        setting: the paper's.
        quantity: what is counted, and by which rule.
        unit: of both.
        published: the paper's number.
        ours: ours.
        how: what the rule is, what had to be inferred, or why the two differ.
    """

    paper: str
    table: str
    model: str
    setting: str
    quantity: str
    unit: str
    published: float
    ours: float
    how: str

    @property
    def deviation_percent(self) -> float:
        """Of ours from the published."""
        return 100 * (self.ours / self.published - 1)

    def row(self) -> dict[str, Any]:
        """A row of the results."""
        facts = asdict(self) | {"ours": float(f"{self.ours:.5g}")}
        how = facts.pop("how")
        return {**facts, "deviation_percent": round(self.deviation_percent, 2), "how": how}
