"""Requests whose prompts nobody has begun to read, and which of them are next."""

from __future__ import annotations

from collections.abc import Iterator

from mminfer.scheduling.ticket import Cancelled, Ticket

MOST_TOGETHER = 16  # prompts of one pass
MOST_TEXT = 4096  # characters of them all: what one pass should take no longer for than for a chunk


class WaitingLine:
    """Requests in the order in which they came. Whoever calls holds the scheduler's lock."""

    def __init__(self) -> None:
        self._tickets: list[Ticket] = []

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets)

    def add(self, ticket: Ticket) -> None:
        self._tickets.append(ticket)

    def clear(self) -> None:
        self._tickets = []

    def forget_cancelled(self) -> None:
        """They take nobody's place any more."""
        gone = [ticket for ticket in self._tickets if ticket.is_cancelled]
        self._tickets = [ticket for ticket in self._tickets if not ticket.is_cancelled]
        for ticket in gone:
            ticket.fail(Cancelled("the request was cancelled"))

    def first(self, room: int) -> Ticket | None:
        """Takes the first one out, if there is room for its answers."""
        if not self._tickets or len(self._tickets[0].requests) > room:
            return None
        return self._tickets.pop(0)

    def brief(self, room: int) -> list[Ticket]:
        """Takes those out that only a little text is left to read of, which one pass can do together.

        They may overtake prompts that take long, but nobody who waits for room.

        Args:
            room: for answers.
        """
        found, text = list[Ticket](), 0
        for ticket in self._tickets:
            room -= len(ticket.requests)
            if room < 0 or len(found) == MOST_TOGETHER:
                break
            left = ticket.text_left
            if left is not None and text + left <= MOST_TEXT:
                found.append(ticket)
                text += left
        self._tickets = [ticket for ticket in self._tickets if ticket not in found]
        return found
