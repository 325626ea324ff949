"""Bars: of tokens while a long prompt is read, and how others look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

PROGRESS: dict[str, Any] = {"delay": 2.0, "leave": False, "disable": None}  # on terminals, for what takes its time


class ReadingBar:
    """Tokens read so far, tokens a second, and time left where it is known how much is to come.

    Args:
        bar: what shows it; None: nothing does.
    """

    def __init__(self, bar: tqdm[Any] | None) -> None:
        self._bar = bar
        self._before = 0  # tokens of the chats that are through

    def begin(self) -> None:
        """A chat's prompt begins."""
        if self._bar is not None:
            self._before = self._bar.n

    def advance(self, tokens: int) -> None:
        if self._bar is not None:
            self._bar.update(tokens)

    def expect(self, done: int, parts: int | None) -> None:
        """Takes the tokens read so far for those of `done` of `parts` parts; None: nobody knows how many there are."""
        if self._bar is not None and parts is not None and done > 0:
            self._bar.total = self._before + (self._bar.n - self._before) * max(parts, done) // done
            self._bar.refresh()


@contextmanager
def reading_bar(shown: bool) -> Iterator[ReadingBar]:
    """A bar on the standard error for the time of a `with` block."""
    if not shown:
        yield ReadingBar(None)
        return
    with tqdm(desc="reading", unit=" tokens", unit_scale=True, dynamic_ncols=True) as bar:
        yield ReadingBar(bar)
