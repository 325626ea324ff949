"""What every row of a prompt is: `TokenLayout`, and what it is made of."""

from mminfer.layout.columns import Modality, RowCounts, SideBySide
from mminfer.layout.given import GIVEN_ROWS, GivenRows
from mminfer.layout.tokens import TokenLayout, places_of

__all__ = ["GIVEN_ROWS", "GivenRows", "Modality", "RowCounts", "SideBySide", "TokenLayout", "places_of"]
