"""Errors as OpenAI's clients understand them. They name what is wrong and where, and never quote what was sent."""

from __future__ import annotations

from typing import Any

from mminfer.errors import InputError
from mminfer.scheduling import Busy, Cancelled, Closed


class RequestError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: for people.
        kind: what OpenAI calls the type.
        param: the field at fault, if one is.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def request_error(error: BaseException) -> RequestError:
    """What a client is told of an error of the engine's, whose own words may quote the request."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, Busy):
        return RequestError(429, "too many requests wait: ask again later", "rate_limit_error", code="queue_full")
    if isinstance(error, (Closed, Cancelled)):
        return RequestError(503, "the server is going down", "server_error", code="closing")
    if isinstance(error, InputError):
        return RequestError(
            400,
            "the model does not take this prompt: a text holds a mark that stands for an image, an image does not fit, "
            "or it is too long",
            param="messages",
            code="prompt_refused",
        )
    return RequestError(500, "the request could not be answered", "server_error", code="internal_error")
