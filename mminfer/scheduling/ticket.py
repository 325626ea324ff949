"""What a scheduler takes on, a request's place with it, and why one is not answered."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from mminfer.config import InferenceConfig
from mminfer.errors import ConfigError, MminferError
from mminfer.scheduling.answer import Answer, AnswerRequest
from mminfer.scheduling.prompt import Prompt
from mminfer.technique import is_whole


class Busy(MminferError):
    """So many requests wait that another one would wait too long."""


class Closed(MminferError):
    """The scheduler has ended, or is about to."""


class Cancelled(MminferError):
    """Whoever asked has gone."""


@dataclass(frozen=True)
class Limits:
    """What a scheduler takes on.

    Args:
        running: answers that are decoded together at most.
        waiting: requests that wait for their prompt to be read at most.
        chunk_size: tokens of a prompt that go through the layers at a time; None: as many as come. Techniques that need
            a whole prompt get it whole.
        prompt_tokens: of a prompt at most; None: any number.
        gap_s: how long answers wait for their next token while prompts are read, up to what one layer of a prompt, or
            the encoding of one piece's media, takes beyond it.

    Raises:
        ConfigError: one is out of range.
    """

    running: int = 16
    waiting: int = 64
    chunk_size: int | None = 1024
    prompt_tokens: int | None = None
    gap_s: float = 0.05

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            optional = name in ("chunk_size", "prompt_tokens")
            if name != "gap_s" and not (is_whole(value, least=1) or (optional and value is None)):
                raise ConfigError(f"{name}={value!r}: wanted a whole number from 1" + " or None" * optional)
        if not 0 <= self.gap_s < float("inf"):
            raise ConfigError(f"gap_s={self.gap_s!r}: wanted a number of seconds from 0")


class Ticket:
    """A request's place; `cancel` gives it back."""

    def __init__(self, prompt: Prompt, config: InferenceConfig, requests: Sequence[AnswerRequest]) -> None:
        self.prompt, self.config, self.requests = prompt, config, requests
        self.answers: list[Answer] = []
        self.is_cancelled = self._failed = False

    @property
    def text_left(self) -> int | None:
        """As of the prompt; None also where it fails to tell."""
        with suppress(Exception):
            return self.prompt.text_left
        return None

    def cancel(self) -> None:
        """Ends the request within a step, or within a layer of its prompt. It may be called from any thread."""
        self.is_cancelled = True

    def check(self) -> None:
        """Raises `Cancelled` if it was."""
        if self.is_cancelled:
            raise Cancelled("the request was cancelled")

    @property
    def is_over(self) -> bool:
        """Whether all its answers are done, or there will be none."""
        return self._failed or (bool(self.answers) and all(answer.is_done for answer in self.answers))

    def fail(self, error: BaseException) -> None:
        """Ends what is not done yet; once is enough."""
        if self._failed:
            return
        self._failed = True
        if not self.answers:
            for request in self.requests:
                with suppress(Exception):  # nobody may be there any more to be told
                    request.listener.fail(error)
        for answer in self.answers:
            answer.fail(error)
