"""An answer as an iterator of text pieces."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer

from mminfer.errors import InputError
from mminfer.output import GenerationOutput
from mminfer.running import ReadingCancelled

_END = object()
EXIT_PATIENCE_S = 5.0  # how long the end of the program waits for streams that are told to stop


class TextStream(Iterator[str]):
    """Pieces of text while they are generated; `output` is the whole answer once the pieces are through.

    The generation stops within a step when a loop over the stream is left, whoever still holds the stream, when it is
    closed or its `with` block is left, and when nobody holds it any more.

    Args:
        tokenizer: the model's.
        run: generates; takes the host's `streamer` and `stopping_criteria`, and `stopped`, which tells when to give up
            reading.
        stopping_criteria: the caller's own, on top.
    """

    def __init__(
        self, tokenizer: Any, run: Callable[..., GenerationOutput], stopping_criteria: Iterable[Any] = ()
    ) -> None:
        self._work = _Work(tokenizer, run, stopping_criteria)
        self._was_left = False
        # The thread holds its work, never the stream, which could not be let go of before the answer is there.
        self._thread = Thread(target=self._work.do, daemon=True)
        _running[self._thread] = self._work
        self._thread.start()

    @property
    def output(self) -> GenerationOutput | None:
        """The whole answer; None before it is there, and where the prompt was not read to its end."""
        return self._work.output

    def __iter__(self) -> Iterator[str]:
        """What one loop holds: the answer ends with it."""
        return _Loop(self)

    def __next__(self) -> str:
        """The next piece.

        Raises:
            InputError: a loop over this stream was left before the answer was through.
        """
        if self._was_left:
            raise InputError(
                "a loop over this stream was left, which ended its answer: to take an answer in parts, keep one "
                "iterator, pieces = iter(stream), or call next(stream)"
            )
        # An interrupt may take a piece away, the last mark too: where the work is done, nobody waits for more.
        piece: Any = self._work.next_piece()
        if piece is not _END:
            return str(piece)
        self._thread.join()
        if self._work.error is not None:
            raise self._work.error
        raise StopIteration

    def __reduce__(self) -> NoReturn:
        raise InputError("a stream cannot be copied or pickled: take its output once it is through")

    def close(self) -> None:
        """Stops the generation after its current token, or the reading of a prompt after its current chunk."""
        self._work.stop = True
        self._thread.join()

    def _leave(self) -> None:
        """A loop has let go; nothing is waited for, since that may be anywhere, the garbage collector too."""
        if not self._work.is_through:
            self._work.stop = self._was_left = True

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            self._let_go()
        finally:  # once more, for an interrupt that came in between
            self._let_go()

    def _let_go(self) -> None:
        if hasattr(self, "_work"):
            self._work.stop = True


class _Loop(Iterator[str]):
    """A loop's hold on a stream."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def __next__(self) -> str:
        return next(self._stream)

    def __del__(self) -> None:
        try:
            self._stream._leave()
        finally:  # once more, for an interrupt that came in between
            self._stream._leave()


class _Work:
    """What the thread of a stream does and leaves.

    Attributes:
        stop: set to end the work; a plain flag, since whoever collects garbage may set it.
        output: the whole answer.
        error: what was raised instead.
    """

    def __init__(self, tokenizer: Any, run: Callable[..., GenerationOutput], criteria: Iterable[Any]) -> None:
        self.output: GenerationOutput | None = None
        self.error: BaseException | None = None
        self.stop = False
        self._is_done = False
        self._pieces: SimpleQueue[Any] = SimpleQueue()  # of text, and `_END` behind the last one
        self._run, self._criteria = run, [*criteria, _StopOn(self)]
        self._streamer = _QueueStreamer(tokenizer, self._pieces)

    def do(self) -> None:
        try:
            self.output = self._run(streamer=self._streamer, stopping_criteria=self._criteria, stopped=self.is_stopped)
        except ReadingCancelled:
            pass  # nobody waits for an answer
        except BaseException as error:  # handed to the reader, whatever it is
            self.error = error
        finally:
            self._is_done = True
            self._pieces.put(_END)

    def abandon(self) -> None:
        """In a forked process nobody does the work any more."""
        self.error = InputError("a stream goes on in the process that began it: begin another one in this process")
        self._is_done = True
        self._pieces.put(_END)

    def is_stopped(self) -> bool:
        return self.stop

    def next_piece(self) -> Any:
        """The next piece of text, waited for; `_END` behind the last one, as often as it is asked for."""
        try:
            return self._pieces.get(block=not self._is_done)
        except Empty:
            return _END

    @property
    def is_through(self) -> bool:
        """Whether the last piece has been taken."""
        return self._is_done and self._pieces.empty()


_running: WeakKeyDictionary[Thread, _Work] = WeakKeyDictionary()


@atexit.register
def _stop_all() -> None:
    """The interpreter must not go away under threads that are computing; it waits for their steps, not for ever."""
    until = time.monotonic() + EXIT_PATIENCE_S
    running = list(_running.items())
    for _, work in running:
        work.stop = True
    for thread, _ in running:
        thread.join(max(0.0, until - time.monotonic()))


def _abandon_all() -> None:
    for work in list(_running.values()):
        work.abandon()
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)


class _QueueStreamer(TextStreamer):
    def __init__(self, tokenizer: Any, pieces: SimpleQueue[Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._pieces = pieces

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._pieces.put(text)


class _StopOn(StoppingCriteria):
    def __init__(self, work: _Work) -> None:
        self._work = work

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._work.stop, device=input_ids.device)
