"""One answer on its way from the scheduler's thread to whoever sends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mminfer.forward.kv_cache import CompressedCache
from mminfer.serving.texts import BROKEN, Detokenizer, StopWords


@dataclass(frozen=True)
class Piece:
    """The next text of an answer; of one that is over, also why.

    Args:
        index: of the answer.
        text: it may be empty.
        logprobs: of the tokens since the last piece, as OpenAI writes them.
        reason: "stop" or "length" at the end; else None.
        error: what was raised instead of an end.
    """

    index: int
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class AnswerOptions:
    """What is told of an answer.

    Args:
        stops: words before which it ends.
        end_ids: tokens that end a turn.
        logprobs: how many of the likeliest tokens are told beside each token; None: nothing is.
        least_tokens: before which no stop word ends it.
    """

    stops: Sequence[str]
    end_ids: Collection[int]
    logprobs: int | None = None
    least_tokens: int = 0


class TextListener:
    """Turns tokens into pieces of text.

    Attributes:
        token_ids: generated so far.
        text: told so far.
        first_at: `time.perf_counter()` of the first token; 0.0 before.
        last_at: of the last one.

    Args:
        index: of the answer.
        tokenizer: the model's.
        options: what is told.
        emit: takes pieces, from the scheduler's thread.
        finished: told of the cache and the answer's row in it when it is whole.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Any,
        options: AnswerOptions,
        emit: Callable[[Piece], object],
        finished: Callable[[TextListener, CompressedCache, int], object],
    ) -> None:
        self._index, self._tokenizer, self._options = index, tokenizer, options
        self._emit, self._finished = emit, finished
        self._detokenizer, self._words = Detokenizer(tokenizer), StopWords(options.stops)
        self._logprobs: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.text, self.first_at, self.last_at = "", 0.0, 0.0

    @property
    def end_ids(self) -> Collection[int]:
        """Tokens that end a turn."""
        return self._options.end_ids

    def take(self, token_id: int, logits: Tensor) -> bool:
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at
        self.token_ids.append(token_id)
        if self._options.logprobs is not None:
            self._logprobs.append(self._logprob(token_id, logits, self._options.logprobs))
        may_end = len(self.token_ids) >= self._options.least_tokens
        text = self._words.add(self._detokenizer.add(token_id), may_end)
        if text:
            self._tell(text)
        return self._words.found

    def end(self, cache: CompressedCache, row: int) -> None:
        rest = "" if self._words.found else self._words.add(self._detokenizer.flush()) + self._words.rest()
        ended = self._words.found or self.token_ids[-1] in self._options.end_ids
        self.text += rest
        self._finished(self, cache, row)
        self._emit(Piece(self._index, rest, self._logprobs, "stop" if ended else "length"))

    def fail(self, error: BaseException) -> None:
        self._emit(Piece(self._index, error=error))

    def _tell(self, text: str) -> None:
        self.text += text
        self._emit(Piece(self._index, text, self._logprobs))
        self._logprobs = []

    def _logprob(self, token_id: int, logits: Tensor, most: int) -> dict[str, Any]:
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(most)
        likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return {
            **self._spelt(token_id, float(logprobs[token_id])),
            "top_logprobs": [self._spelt(other, value) for other, value in likeliest],
        }

    def _spelt(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = str(self._tokenizer.decode([token_id]))
        return {
            "token": token,
            "logprob": max(logprob, -9999.0),
            "bytes": None if BROKEN in token else list(token.encode()),
        }
