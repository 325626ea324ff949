"""Connections of clients that neither ask nor read: they are closed, so that they take nobody's place."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE_S = 15.0  # between two looks; what has not moved at the second is closed


class WatchedConnection(H11Protocol):
    """uvicorn's connection, which is closed when nothing moves: no request comes whole, or nothing sent is read."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._seen: tuple[Any, int] | None = None
        self._watch: asyncio.TimerHandle = self.loop.call_later(PATIENCE_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        cycle, unread = self.cycle, self.transport.get_write_buffer_size()
        waits = cycle is None or cycle.response_complete
        if self._seen == (cycle, unread) and (waits or unread):
            self.transport.abort()
            return
        self._seen = cycle, unread
        self._watch = self.loop.call_later(PATIENCE_S, self._look)
