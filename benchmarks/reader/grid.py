"""A page as the reader sees it: 8 x 8 cells, in each of which one token of the language model is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROWS = COLUMNS = 8
BLANK, TEXT, HEADLINE, AREA = "blank", "text", "headline", "area"


@dataclass(frozen=True)
class Area:
    """A rectangle of one colour.

    Args:
        row: of its upper left cell.
        column: of that cell.
        rows: cells high.
        columns: cells wide.
        colour: a word.
    """

    row: int
    column: int
    rows: int
    columns: int
    colour: str


@dataclass(frozen=True)
class Headline:
    """A token two cells high.

    Args:
        row: of its upper cell.
        column: of both.
        token: its id.
    """

    row: int
    column: int
    token: int


class Page:
    """Cells that are filled from the top: text flows from cell to cell.

    Attributes:
        tokens: [8][8] ids, of what stands in the cells.
        kinds: [8][8], what is drawn there.
        headlines: the tall tokens.
        areas: the coloured rectangles.

    Args:
        tokenizer: the language model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._blank = tokens_of(tokenizer, " ")[0]
        self.tokens = [[self._blank] * COLUMNS for _ in range(ROWS)]
        self.kinds = [[BLANK] * COLUMNS for _ in range(ROWS)]
        self.headlines: list[Headline] = []
        self.areas: list[Area] = []
        self._next = 0  # cells in use, counted through the page

    def write(self, text: str, *, line: bool = False) -> bool:
        """Writes a text behind what stands there, if it fits; gives whether it did.

        Args:
            text: without the space in front.
            line: begin a new line.
        """
        ids = tokens_of(self._tokenizer, f" {text}")
        first = self._next + (-self._next % COLUMNS if line else 0)
        if first + len(ids) > ROWS * COLUMNS:
            return False
        for place, token in enumerate(ids, first):
            self._set(place // COLUMNS, place % COLUMNS, token, TEXT)
        self._next = first + len(ids)
        return True

    def leave_line(self) -> None:
        """Leaves the rest of this line and the next one blank."""
        self._next = min(ROWS * COLUMNS, self._next + -self._next % COLUMNS + COLUMNS)

    def write_headline(self, text: str) -> None:
        """Writes tall words into the first two lines of an empty page."""
        for column, token in enumerate(tokens_of(self._tokenizer, f" {text}")[:COLUMNS]):
            self.headlines.append(Headline(0, column, token))
            for row in (0, 1):
                self._set(row, column, token, HEADLINE)
        self._next = 2 * COLUMNS

    def paint(self, rows: int, colour: str) -> None:
        """Paints an area from behind what was written to the end of the line, so many lines high.

        Its cells read as the colour's word.
        """
        row, column = divmod(self._next, COLUMNS)
        if row + rows > ROWS:
            raise ValueError(f"an area of {rows} lines from line {row} of {ROWS} on")
        self.areas.append(Area(row, column, rows, COLUMNS - column, colour))
        token = tokens_of(self._tokenizer, f" {colour}")[0]
        for r in range(row, row + rows):
            for c in range(column, COLUMNS):
                self._set(r, c, token, AREA)
        self._next = (row + rows) * COLUMNS

    @property
    def ids(self) -> list[int]:
        """The 64 tokens, line by line."""
        return [token for line in self.tokens for token in line]

    def _set(self, row: int, column: int, token: int, kind: str) -> None:
        self.tokens[row][column], self.kinds[row][column] = token, kind


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without marks of beginning and end."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
