"""Bodies of answers as OpenAI writes them."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from mminfer.serving.answering import Piece


class Completion:
    """The bodies of one request's answers.

    Args:
        model_id: that the request named.
        answers: how many there are.
    """

    def __init__(self, model_id: str, answers: int) -> None:
        self._facts = {"id": f"chatcmpl-{secrets.token_hex(16)}", "created": int(time.time()), "model": model_id}
        self._texts = ["" for _ in range(answers)]
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(answers)]
        self._reasons: list[str | None] = [None] * answers

    def take(self, piece: Piece) -> None:
        """Adds a piece to the whole."""
        self._texts[piece.index] += piece.text
        self._logprobs[piece.index] += piece.logprobs
        self._reasons[piece.index] = piece.reason or self._reasons[piece.index]

    def whole(self, usage: dict[str, Any], logprobs: bool) -> dict[str, Any]:
        """The body of a request that does not stream."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": {"content": self._logprobs[index], "refusal": None} if logprobs else None,
                "finish_reason": self._reasons[index],
            }
            for index, text in enumerate(self._texts)
        ]
        return {**self._facts, "object": "chat.completion", "choices": choices, "usage": usage}

    def first(self, index: int) -> dict[str, Any]:
        """What begins an answer that streams."""
        return self._chunk([self._choice(index, {"role": "assistant", "content": ""})])

    def chunk(self, piece: Piece, logprobs: bool) -> dict[str, Any]:
        """A piece of an answer that streams."""
        told = {"content": piece.logprobs, "refusal": None} if logprobs else None
        delta = {"content": piece.text} if piece.text else {}
        return self._chunk([self._choice(piece.index, delta, told, piece.reason)])

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """What tells the usage of answers that streamed."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._facts, "object": "chat.completion.chunk", "choices": choices}

    @staticmethod
    def _choice(
        index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def event(body: dict[str, Any] | str) -> str:
    """A server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n"
