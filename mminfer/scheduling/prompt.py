"""A prompt on its way into a cache, piece by piece, with room between for the decoding steps of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from mminfer.errors import InputError
from mminfer.forward.call_state import CallState
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from mminfer.inputs.reading import Reading
from mminfer.layout import GIVEN_ROWS
from mminfer.metrics.records import PromptRecord
from mminfer.patching import ModelPass


class Prompt(Protocol):
    """What a request reads. It is asked by the thread of the scheduler alone, when its turn has come."""

    def begin(self) -> CompressedCache:
        """The cache to go on from: an empty one, or what is known of the prompt already. It is the request's own."""

    def readings(self) -> Iterator[Reading]:
        """What is left to read. It is gone on with when a reading is in the cache, and may look at that."""

    def took(self, record: PromptRecord) -> None:
        """Told of each pass."""

    @property
    def ids(self) -> Sequence[int]:
        """The token ids of the whole prompt, once it was read."""


class WholePrompt:
    """A prompt of which nothing is known.

    Args:
        begin: a reading of it, from its beginning to where the answer goes.
    """

    def __init__(self, begin: Callable[[], Reading]) -> None:
        self._reading = begin
        self.records: list[PromptRecord] = []
        self.ids: list[int] = []

    def begin(self) -> CompressedCache:
        return CompressedCache()

    def readings(self) -> Iterator[Reading]:
        reading = self._reading()
        yield reading
        self.ids = reading.ids

    def took(self, record: PromptRecord) -> None:
        self.records.append(record)


class Prompting:
    """Takes a prompt in.

    Attributes:
        cache: what was read so far.
        logits: [1, V] of the last token read, of the model's own type; None: nothing was read.

    Args:
        prompt: what is read.
        handle: the pass behind the model.
        chunk_size: tokens that go through the layers at a time; None: a piece at once.
        headroom: tokens to come behind it.
        most_tokens: of a prompt; None: any number.
    """

    def __init__(
        self, prompt: Prompt, handle: ModelPass, chunk_size: int | None, headroom: int, most_tokens: int | None
    ) -> None:
        self.prompt, self._handle, self._most = prompt, handle, most_tokens
        self._state = CallState(chunk_size, headroom=headroom)
        self.cache = prompt.begin()
        self.logits: Tensor | None = None
        self._pieces = self._all_pieces()

    def read_piece(self, between: Callable[[], object]) -> bool:
        """Takes the next piece in; gives whether there was one.

        Args:
            between: called now and then while the piece goes through the layers; if it raises, the cache is as it was.
        """
        piece = next(self._pieces, None)
        if piece is None:
            return False
        tokens = self.cache.logical_length + piece["input_ids"].shape[1]
        if self._most is not None and tokens > self._most:
            raise InputError(f"the prompt has {tokens} tokens or more: wanted {self._most} at most")
        self._state.given_embeddings = piece.pop(GIVEN_ROWS, None)
        self._state.between_layers = between
        with self._handle.begin(self._state) as state, state.reading(None):
            output = self._handle.model(**piece, **{CACHE_NAME: self.cache}, logits_to_keep=1, use_cache=True)
        self.prompt.took(self._handle.records.pop())
        self._handle.prompt_ms.clear()
        self.logits = output.logits[:, -1].float()
        return True

    def _all_pieces(self) -> Iterator[dict[str, Any]]:
        for reading in self.prompt.readings():
            yield from reading
