"""The app: who may ask, how much may come in, and the routes."""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from mminfer.serving.budget import Share
from mminfer.serving.errors import RequestError, request_error
from mminfer.serving.exchange import GONE, Exchange
from mminfer.serving.figures import Figures
from mminfer.serving.limits import ServerSettings
from mminfer.serving.schema import parse_request
from mminfer.serving.service import Prepared, Service, pieces_of


def make_app(service: Service) -> FastAPI:
    """The app of a service. It has no pages of documentation, whose assets would come from elsewhere, and no CORS."""
    server, figures = service.server, Figures(service.scheduler, service.store, service.budget)
    app = FastAPI(title="mminfer", docs_url=None, redoc_url=None, openapi_url=None)
    if server.api_key is None:  # else a page of any site could ask by a name that leads here
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(server.hosts))
    app.add_exception_handler(RequestError, _told)
    app.add_exception_handler(HTTPException, _told_of_route)
    created = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        check_key(request, server)
        return Response(figures.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request, server)
        own = {"id": server.model_id, "object": "model", "created": created, "owned_by": "mminfer"}
        return {"object": "list", "data": [{**own, "mminfer": {"presets": list(server.settings)}}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        try:
            check_key(request, server)
            return await _answered(service, figures, request)
        except ClientDisconnect:  # nobody reads it
            figures.note(GONE)
            return Response(status_code=GONE)
        except Exception as error:
            found = request_error(error)
            figures.note(found.status)
            raise found from None

    return app


def check_key(request: Request, server: ServerSettings) -> None:
    """Raises `RequestError` unless the request brings the key, if there is one."""
    if server.api_key is None:
        return
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {server.api_key}".encode()):
        raise RequestError(401, "wanted the header 'Authorization: Bearer <key>'", code="invalid_api_key")


async def body_of(request: Request, server: ServerSettings, share: Share) -> bytes:
    """The body of a request; share: what it holds of all memory.

    Raises:
        RequestError: it is no JSON by its type, too large, or takes too long to come.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page of another site cannot send without being allowed to
        raise RequestError(415, "wanted the header 'Content-Type: application/json'", code="unsupported_media_type")
    most, body = server.limits.body_bytes, bytearray()
    too_large = RequestError(413, f"the body is too large: wanted {most} bytes at most", code="body_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise too_large
    try:
        async with asyncio.timeout(server.limits.body_s):
            async for chunk in request.stream():
                share.take(2 * len(chunk))  # the text of its fields is as long again
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise RequestError(408, "the body took too long to come", code="body_timeout") from None
    return bytes(body)


async def _answered(service: Service, figures: Figures, request: Request) -> Response:
    start, deadline = time.perf_counter(), time.monotonic() + service.server.limits.request_s
    share = service.budget.share()
    try:
        prepared = await _prepared(service, request, share)
        answering, pieces = pieces_of(service, prepared, deadline)
    except BaseException:
        share.release()
        raise
    exchange = Exchange(prepared.request, answering, pieces, figures, (start, share))
    try:
        await exchange.begin(request)
        return Events(exchange) if prepared.request.stream else JSONResponse(await exchange.whole())
    except BaseException:
        exchange.end()
        raise


async def _prepared(service: Service, request: Request, share: Share) -> Prepared:
    body = await body_of(request, service.server, share)
    return await asyncio.to_thread(lambda: service.prepare(parse_request(body), share))


class Events(StreamingResponse):
    """A response that streams; whatever becomes of it, its request is over then.

    Args:
        exchange: whose events it sends.
    """

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange.events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.end()


async def _told(request: Request, error: Exception) -> Response:
    found = request_error(error)
    return JSONResponse(found.body, found.status)


async def _told_of_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = "there is no such route" if status == 404 else "this route does not take that"
    return JSONResponse(RequestError(status, message).body, status)
