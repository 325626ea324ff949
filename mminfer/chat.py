"""A conversation that keeps its compressed cache: each turn runs only what is new."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mminfer.chat_files import ChatIdentity, read_chat, write_chat
from mminfer.errors import InputError
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.native_build import prepare_kernels
from mminfer.forward.turns import undone
from mminfer.inputs.content import MEDIA_OPTIONS, MediaOptions
from mminfer.inputs.parts import TextPart
from mminfer.inputs.reader import RequestReader
from mminfer.inputs.reading import Reading
from mminfer.inputs.transcript import Transcript
from mminfer.output import GenerationOutput
from mminfer.running import Runner, RunOptions, overridden

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

    One turn at a time: whatever else is asked of a chat meanwhile, from another thread or from content that is being
    read, is refused.

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
        self._busy: dict[str, _Turn] = {}  # holds the turn that is under way
        self._transcript = Transcript()
        if system is not None:
            self._transcript = Transcript((_system_message(reader, system),))

    def __repr__(self) -> str:
        return f"Chat({len(self._messages)} messages, {len(self._ids)} tokens read)"

    @property
    def _messages(self) -> tuple[dict[str, Any], ...]:
        return self._transcript.messages

    @property
    def _ids(self) -> tuple[int, ...]:
        return self._transcript.ids

    def read(self, content: Any, **options: Any) -> None:
        """Takes content in and compresses it without answering; the user's turn stays open for more.

        With `prefill_chunk_size` the content may come from an iterator and is loaded, encoded and compressed piece by
        piece.

        Args:
            content: a string, or text, image and video parts from a list or any iterable.
            options: none; `engine.chat` takes those of all turns.

        Raises:
            InputError: the content is wrong, there are options, or a turn is under way; the chat is as it was.
        """
        _refuse_options_of_all_turns("read", options)
        if options:
            raise InputError(f"read() knows no argument {', '.join(options)}: leave it out, or give it to send()")
        with self._turn("read"):
            reading = self._reading(content, closes=False)
            prepare_kernels(self._reader.device)
            self._runner.read([reading], [self.cache], self._options.run)
            self._transcript = reading.transcript

    def send(self, content: Any, max_new_tokens: int | None = None, **generation_kwargs: Any) -> GenerationOutput:
        """Ends the user's turn with this content and answers.

        Args:
            content: a string, or text, image and video parts from a list or any iterable; "" to answer what was read.
            max_new_tokens: tokens to generate at most; None: as `engine.chat(...)` says, else as for `generate`.
            generation_kwargs: the host's, on top of those the chat was made with.

        Raises:
            InputError: the content or an argument is wrong, or a turn is under way; the chat is as it was.
        """
        start = time.perf_counter()
        _refuse_options_of_all_turns("send", generation_kwargs)
        if max_new_tokens is not None:
            generation_kwargs["max_new_tokens"] = max_new_tokens
        kwargs = overridden(self._options.generation, generation_kwargs)
        settings = self._runner.settings(kwargs, one_answer_for=ONE_ANSWER)
        with self._turn("send"):
            reading = self._reading(content, closes=True)
            start += prepare_kernels(self._reader.device)
            (output,) = self._runner.answer([reading], [self.cache], start, self._options.run, settings)
            self._transcript = reading.transcript.answered(output.token_ids)
            self.cache.settle()
        return output

    def fork(self) -> Chat:
        """An independent copy: several questions can be asked of what was read once.

        Raises:
            InputError: a turn is under way.
        """
        with self._turn("fork"):
            other = object.__new__(type(self))
            vars(other).update(vars(self), cache=self.cache.clone(), _busy={})
        return other

    def __copy__(self) -> Chat:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Chat:
        return self.fork()  # the model stays the engine's

    def __reduce__(self) -> NoReturn:
        raise InputError("a chat cannot be pickled: save() it, and load_chat() it by the engine of the other process")

    def save(self, path: str | Path) -> None:
        """Writes the chat to a safetensors file: cache, turns so far, and what made them. Pixels are not kept.

        The file is written whole or not at all: an error or a killed process leaves there what was there before.

        Raises:
            InputError: the file cannot be written, or a turn is under way.
        """
        with self._turn("save"):
            write_chat(path, self.cache, self._transcript, self._identity)

    def restore(self, path: str | Path) -> Chat:
        """Takes up a saved chat in place of this one's turns; `engine.load_chat(path)` is the usual way in.

        Raises:
            InputError: there is no such file, it holds no chat, it was damaged or changed, another model or config made
                it, or a turn is under way; this chat is as it was.
        """
        cache, transcript = read_chat(path, self._identity, self._reader.device)
        with self._turn("restore"):
            vars(self).update(cache=cache, _transcript=transcript)
        return self

    def _reading(self, content: Any, *, closes: bool) -> Reading:
        size = self._options.run.chunk_size
        return self._reader.turn(self._transcript, content, self._options.media, closes=closes, size=size)

    @contextmanager
    def _turn(self, method: str) -> Iterator[None]:
        """Within it the chat is this call's. If anything raises, what came in is gone and the chat is as it was.

        Raises:
            InputError: another call is under way.
        """
        turn = _Turn(method)
        with undone(lambda: self._end(turn)):
            under_way = self._busy.setdefault("turn", turn)
            if under_way is not turn:
                raise InputError(
                    f"{method}() while {under_way} of this chat is under way: wait until it has returned, or give each "
                    "thread a fork() of its own"
                )
            turn.before = self.cache, self.cache.snapshot(), self._transcript
            yield
            turn.before = None

    def _end(self, turn: _Turn) -> None:
        """May be called at any time: it ends this turn alone, and takes it back unless it is through."""
        if self._busy.get("turn") is not turn:
            return
        if turn.before is not None:
            cache, restore, transcript = turn.before
            restore()
            vars(self).update(cache=cache, _transcript=transcript)
        self._busy.clear()


class _Turn:
    """A call that is under way, and what the chat was before; None: nothing to go back to.

    Args:
        method: of the chat.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self.before: tuple[CompressedCache, Callable[[], None], Transcript] | None = None

    def __str__(self) -> str:
        return f"{self._method}()"


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
