"""A conversation that keeps its compressed cache: each turn runs only what is new."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mminfer.chat_files import ChatIdentity, read_chat, write_chat
from mminfer.errors import InputError
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.native_build import prepare_kernels
from mminfer.inputs.content import MEDIA_OPTIONS, MediaOptions
from mminfer.inputs.parts import TextPart
from mminfer.inputs.reader import RequestReader
from mminfer.inputs.reading import Reading
from mminfer.inputs.transcript import Transcript
from mminfer.output import GenerationOutput
from mminfer.running import Runner, RunOptions

MAX_NEW_TOKENS = 64
ONE_ANSWER = "a chat goes on from one answer; use generate()"
OF_ALL_TURNS = (*MEDIA_OPTIONS, "prefill_chunk_size", "progress")


@dataclass(frozen=True)
class CallOptions:
    """The options of a call, by who takes them.

    Args:
        media: how media are taken.
        run: how prompts go in.
        generation: the host's.
    """

    media: MediaOptions
    run: RunOptions
    generation: dict[str, Any]


class Chat:
    """Turns of one conversation over one cache; `engine.chat()` makes it.

    The template is rendered with marks in place of answers, and a turn is whatever the new rendering adds to the old
    one: nothing that is in the cache is ever tokenised or computed again.

    Attributes:
        cache: the compressed cache of all turns so far.

    Args:
        reader: turns content into model inputs.
        runner: runs them.
        identity: what the file of a saved chat says of both.
        options: of all turns.
        system: what the system says before the first turn; None: nothing.

    Raises:
        InputError: the system's prompt is no string, or holds a placeholder of media.
    """

    def __init__(
        self,
        reader: RequestReader,
        runner: Runner,
        identity: ChatIdentity,
        options: CallOptions,
        system: str | None = None,
    ) -> None:
        self._reader, self._runner = reader, runner
        self._identity, self._options = identity, options
        self.cache = CompressedCache()
        self._transcript = Transcript()
        if system is not None:
            self._transcript = Transcript((_system_message(reader, system),))

    def read(self, content: Any, **options: Any) -> None:
        """Takes content in and compresses it without answering; the user's turn stays open for more.

        With `prefill_chunk_size` the content may come from an iterator and is loaded, encoded and compressed piece by
        piece.

        Args:
            content: a string, or text, image and video parts from a list or any iterable.
            options: none; `engine.chat` takes those of all turns.

        Raises:
            InputError: the content is wrong, or there are options; the chat is as it was.
        """
        _refuse_options_of_all_turns("read", options)
        if options:
            raise InputError(f"read() knows no argument {', '.join(options)}: leave it out, or give it to send()")
        reading = self._reading(content, closes=False)
        prepare_kernels(self._reader.device)
        with self._kept_on_errors():
            self._runner.read([reading], [self.cache], self._options.run)
        self._transcript = reading.transcript

    def send(self, content: Any, max_new_tokens: int | None = None, **generation_kwargs: Any) -> GenerationOutput:
        """Ends the user's turn with this content and answers.

        Args:
            content: a string, or text, image and video parts from a list or any iterable; "" to answer what was read.
            max_new_tokens: tokens to generate at most; None: as many as the chat was made for, which are 64 unless
                `engine.chat(max_new_tokens=...)` says otherwise.
            generation_kwargs: the host's, on top of those the chat was made with.

        Raises:
            InputError: the content or an argument is wrong; the chat is as it was.
        """
        start = time.perf_counter()
        _refuse_options_of_all_turns("send", generation_kwargs)
        kwargs = {"max_new_tokens": MAX_NEW_TOKENS, **self._options.generation, **generation_kwargs}
        if max_new_tokens is not None:
            kwargs["max_new_tokens"] = max_new_tokens
        self._runner.check_arguments(kwargs, one_answer_for=ONE_ANSWER)
        reading = self._reading(content, closes=True)
        start += prepare_kernels(self._reader.device)
        with self._kept_on_errors():
            (output,) = self._runner.answer([reading], [self.cache], start, self._options.run, **kwargs)
        self._transcript = reading.transcript.answered(output.token_ids)
        return output

    def fork(self) -> Chat:
        """An independent copy: several questions can be asked of what was read once."""
        other = copy.copy(self)
        other.cache = self.cache.clone()
        return other

    def save(self, path: str | Path) -> None:
        """Writes the chat to a safetensors file: cache, turns so far, and what made them. Pixels are not kept.

        The file is written whole or not at all: an error or a killed process leaves there what was there before.

        Raises:
            InputError: the file cannot be written.
        """
        write_chat(path, self.cache, self._transcript, self._identity)

    def restore(self, path: str | Path) -> Chat:
        """Takes up a saved chat in place of this one's turns; `engine.load_chat(path)` is the usual way in.

        Raises:
            InputError: there is no such file, it holds no chat, it was damaged or changed, or another model or config
                made it; this chat is as it was.
        """
        self.cache, self._transcript = read_chat(path, self._identity, self._reader.device)
        return self

    def _reading(self, content: Any, *, closes: bool) -> Reading:
        size = self._options.run.chunk_size
        return self._reader.turn(self._transcript, content, self._options.media, closes=closes, size=size)

    @contextmanager
    def _kept_on_errors(self) -> Iterator[None]:
        """If anything raises, what came in is gone and the cache is as it was."""
        restore = self.cache.snapshot()
        try:
            yield
        except BaseException:
            restore()
            raise


def _refuse_options_of_all_turns(method: str, given: dict[str, Any]) -> None:
    names = [name for name in given if name in (*OF_ALL_TURNS, "system")]
    if names:
        found = ", ".join(names)
        raise InputError(f"{found}: {method}() takes it not, for it holds for all turns: give it to engine.chat(...)")


def _system_message(reader: RequestReader, text: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise InputError(f"the system prompt is {type(text).__name__}: wanted a string")
    part = TextPart(text)
    reader.markers.check_placeholders([part])
    return {"role": "system", "content": [reader.markers.template_part(part)]}
