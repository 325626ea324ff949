"""An answer as an iterator of text pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer

from mminfer.output import GenerationOutput
from mminfer.running import ReadingCancelled

_END = object()


class TextStream(Iterator[str]):
    """Pieces of text while they are generated; `output` is the whole answer once the pieces are through.

    The generation stops when the stream is closed, when its `with` block is left, or when nobody holds it any more.

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
        # The thread holds its work, never the stream, which could not be let go of before the answer is there.
        self._thread = Thread(target=self._work.do, daemon=True)
        self._thread.start()

    @property
    def output(self) -> GenerationOutput | None:
        """The whole answer; None before it is there, and where the prompt was not read to its end."""
        return self._work.output

    def __next__(self) -> str:
        piece: Any = self._work.pieces.get()
        if piece is not _END:
            return str(piece)
        self._work.pieces.put(_END)
        self._thread.join()
        if self._work.error is not None:
            raise self._work.error
        raise StopIteration

    def close(self) -> None:
        """Stops the generation after its current token, or the reading of a prompt after its current chunk."""
        self._work.stop.set()
        self._thread.join()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_work"):
            self._work.stop.set()


class _Work:
    """What the thread of a stream does and leaves.

    Attributes:
        pieces: of text, and `_END` behind the last one.
        stop: set to end the work.
        output: the whole answer.
        error: what was raised instead.
    """

    def __init__(self, tokenizer: Any, run: Callable[..., GenerationOutput], criteria: Iterable[Any]) -> None:
        self.output: GenerationOutput | None = None
        self.error: BaseException | None = None
        self.pieces: Queue[Any] = Queue()
        self.stop = Event()
        self._run, self._criteria = run, [*criteria, _StopOn(self.stop)]
        self._streamer = _QueueStreamer(tokenizer, self.pieces)

    def do(self) -> None:
        try:
            self.output = self._run(streamer=self._streamer, stopping_criteria=self._criteria, stopped=self.stop.is_set)
        except ReadingCancelled:
            pass  # nobody waits for an answer
        except BaseException as error:  # handed to the reader, whatever it is
            self.error = error
        finally:
            self.pieces.put(_END)


class _QueueStreamer(TextStreamer):
    def __init__(self, tokenizer: Any, pieces: Queue[Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._pieces = pieces

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._pieces.put(text)


class _StopOn(StoppingCriteria):
    def __init__(self, event: Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)
