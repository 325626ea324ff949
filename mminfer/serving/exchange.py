"""One request and its response: whole or as a stream of events, and ended when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from mminfer.serving.answering import Piece
from mminfer.serving.bodies import Completion, event
from mminfer.serving.budget import Share
from mminfer.serving.errors import RequestError
from mminfer.serving.figures import Figures
from mminfer.serving.schema import ChatRequest
from mminfer.serving.service import Answering

GONE = 499  # what servers note of a client that went away


class Exchange:
    """One request and its response.

    Args:
        asked: the request.
        answering: its place with the scheduler.
        pieces: of its answers.
        figures: take note of it.
        begun: `time.perf_counter()` when it came, and what of all memory it holds.
    """

    def __init__(
        self,
        asked: ChatRequest,
        answering: Answering,
        pieces: AsyncIterator[Piece],
        figures: Figures,
        begun: tuple[float, Share],
    ) -> None:
        self._asked, self._answering, self._pieces = asked, answering, pieces
        self._figures, (self._start, self._share) = figures, begun
        self._completion = Completion(asked.model, asked.n)
        self._gone: asyncio.Task[None] | None = None

    async def begin(self, request: Request) -> None:
        """Waits for the first piece: what is wrong with a prompt is known by then, and has a status of its own.

        Raises:
            ClientDisconnect: the client has gone.
            RequestError: there will be no answer.
        """
        self._gone = asyncio.create_task(_until_gone(request))
        self._gone.add_done_callback(lambda _: self._answering.ticket.cancel())
        try:
            self._first = await anext(self._pieces)
        except RequestError:
            self._check_there()
            raise

    async def whole(self) -> dict[str, Any]:
        """The body of a response that does not stream; raises as `begin` does."""
        try:
            async for piece in self._all_pieces():
                self._completion.take(piece)
        except RequestError:
            self._check_there()
            raise
        self.end()
        return self._completion.whole(self._noted_usage(), self._asked.logprobs)

    async def events(self) -> AsyncIterator[str]:
        """The events of a response that streams. An error behind its head is an event of its own."""
        status, options = GONE, self._asked.stream_options
        try:
            for index in range(self._asked.n):
                yield event(self._completion.first(index))
            async for piece in self._all_pieces():
                yield event(self._completion.chunk(piece, self._asked.logprobs))
            usage = self._noted_usage(status=None)
            if options is not None and options.include_usage:
                yield event(self._completion.last(usage))
            status = 200
            yield event("[DONE]")
        except RequestError as error:
            if not self._is_gone:
                status = error.status
                yield event(error.body)
        finally:
            self.end()
            self._figures.note(status)

    def end(self) -> None:
        """Nobody waits for more."""
        self._answering.ticket.cancel()
        self._share.release()
        if self._gone is not None:
            self._gone.cancel()

    @property
    def _is_gone(self) -> bool:
        return self._gone is not None and self._gone.done()

    def _check_there(self) -> None:
        if self._is_gone:
            raise ClientDisconnect

    async def _all_pieces(self) -> AsyncIterator[Piece]:
        yield self._first
        async for piece in self._pieces:
            yield piece

    def _noted_usage(self, status: int | None = 200) -> dict[str, Any]:
        usage = self._answering.usage(self._start)
        self._figures.note_usage(usage)
        if status is not None:
            self._figures.note(status)
        return usage


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
