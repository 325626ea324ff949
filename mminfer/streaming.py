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

    Args:
        tokenizer: the model's.
        run: generates; takes the host's `streamer` and `stopping_criteria`, and `stopped`, which tells when to give up
            reading.
        stopping_criteria: the caller's own, on top.
    """

    def __init__(
        self, tokenizer: Any, run: Callable[..., GenerationOutput], stopping_criteria: Iterable[Any] = ()
    ) -> None:
        self.output: GenerationOutput | None = None
        self._error: BaseException | None = None
        self._pieces: Queue[Any] = Queue()
        self._stop = Event()
        self._run, self._criteria = run, [*stopping_criteria, _StopOn(self._stop)]
        self._streamer = _QueueStreamer(tokenizer, self._pieces)
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self.output = self._run(
                streamer=self._streamer, stopping_criteria=self._criteria, stopped=self._stop.is_set
            )
        except ReadingCancelled:
            pass  # nobody waits for an answer
        except BaseException as error:  # handed to the reader, whatever it is
            self._error = error
        finally:
            self._pieces.put(_END)

    def __next__(self) -> str:
        piece = self._pieces.get()
        if piece is not _END:
            return piece
        self._pieces.put(_END)
        self._thread.join()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """Stops the generation after its current token, or the reading of a prompt after its current chunk."""
        self._stop.set()
        self._thread.join()

    def __del__(self) -> None:
        self._stop.set()


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
