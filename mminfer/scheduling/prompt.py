"""Prompts on their way into caches, piece by piece or several in one pass, with room for the steps of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mminfer.errors import InputError
from mminfer.forward.call_state import CallState
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from mminfer.inputs.assembling import TOKEN_TYPES
from mminfer.inputs.reading import Reading
from mminfer.layout import GIVEN_ROWS
from mminfer.metrics.records import PromptRecord
from mminfer.patching import ModelPass


class Prompt(Protocol):
    """What a request reads. It is asked by the thread of the scheduler alone."""

    def begin(self) -> CompressedCache:
        """The cache to go on from: an empty one, or what is known of the prompt already. It is the request's own."""

    def readings(self) -> Iterator[Reading]:
        """What is left to read. It is gone on with when a reading is in the cache, and may look at that."""

    def took(self, record: PromptRecord, cache: CompressedCache, row: int) -> None:
        """Told of each pass: what it did, and in which row of a cache the prompt stands since."""

    @property
    def text_left(self) -> int | None:
        """Characters that are left to read, as far as is known before it is begun; None: also media, or any number."""

    @property
    def ids(self) -> Sequence[int]:
        """The token ids of the whole prompt, once it was read."""


class WholePrompt:
    """A prompt of which nothing is known.

    Args:
        begin: a reading of it, from its beginning to where the answer goes.
    """

    text_left: int | None = None

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

    def took(self, record: PromptRecord, cache: CompressedCache, row: int) -> None:
        self.records.append(record)


class Prompting:
    """Takes a prompt in.

    Attributes:
        cache: what was read so far, perhaps with other prompts.
        row: of the cache, in which this one stands.
        logits: [1, V] of the last token read, float32; None: nothing was read.
        piece: what goes in next; None: all was read.

    Args:
        prompt: what is read.
        handle: the pass behind the model.
        headroom: tokens to come behind it.
        most_tokens: of a prompt; None: any number.
    """

    def __init__(self, prompt: Prompt, handle: ModelPass, headroom: int, most_tokens: int | None) -> None:
        self.prompt, self.handle, self.headroom, self._most = prompt, handle, headroom, most_tokens
        self.cache, self.row = prompt.begin(), 0
        self.logits: Tensor | None = None
        self.piece: dict[str, Any] | None = None
        self._pieces = self._all_pieces()
        self.go_on()

    def go_on(self) -> None:
        """Makes the next piece ready.

        Raises:
            InputError: the prompt is too long.
        """
        self.piece = next(self._pieces, None)
        if self.piece is None:
            return
        if len(self.cache.tokens) > 1:  # it was read with others, which go their own ways
            self.cache, self.row = CompressedCache.of_rows([(self.cache, self.row)]), 0
        tokens = sum(self.cache.tokens) + self.piece["input_ids"].shape[1]
        if self._most is not None and tokens > self._most:
            raise InputError(f"the prompt has {tokens} tokens or more: wanted {self._most} at most")

    def took(self, record: PromptRecord, cache: CompressedCache, row: int, logits: Tensor) -> None:
        """The piece is in; logits: [B, V] of the cache's rows."""
        self.cache, self.row, self.logits = cache, row, logits[row : row + 1]
        self.prompt.took(record, cache, row)

    def _all_pieces(self) -> Iterator[dict[str, Any]]:
        for reading in self.prompt.readings():
            yield from reading


def read_pieces(promptings: Sequence[Prompting], chunk_size: int | None, between: Callable[[], object]) -> None:
    """Takes the next piece of each prompt in, by one pass; if it raises, all are as they were.

    Args:
        promptings: one, or several of one handle that `fit_together`.
        chunk_size: tokens that go through the layers at a time; None: all.
        between: called behind each layer.
    """
    first, pieces = promptings[0], [one.piece or {} for one in promptings]
    state = CallState(chunk_size, headroom=max(one.headroom for one in promptings))
    cache, inputs = first.cache, dict(pieces[0])
    if len(promptings) > 1:
        cache = CompressedCache.stack([one.cache for one in promptings]) if cache.layers else CompressedCache()
        inputs = _stacked(pieces)
    state.given_embeddings, state.between_layers = inputs.pop(GIVEN_ROWS, None), between
    with first.handle.begin(state), state.reading(None):
        output = first.handle.model(**inputs, **{CACHE_NAME: cache}, logits_to_keep=1, use_cache=True)
    record, logits = first.handle.records.pop(), output.logits[:, -1].float()
    first.handle.prompt_ms.clear()
    for row, one in enumerate(promptings):
        one.took(record, cache, row, logits)


def is_plain(piece: dict[str, Any]) -> bool:
    """Whether a piece is of text alone."""
    return piece.keys() <= {"input_ids", "attention_mask", "position_ids", *TOKEN_TYPES}


def _stacked(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pieces of text as one batch, padded on the left."""
    lengths = [piece["input_ids"].shape[1] for piece in pieces]
    inputs = {
        name: torch.cat([_padded(piece[name], max(lengths)) for piece in pieces], value.dim() - 2)
        for name, value in pieces[0].items()
        if value is not None
    }
    columns = torch.arange(max(lengths))
    mask = torch.stack([(columns >= max(lengths) - length).long() for length in lengths])
    return {**inputs, "attention_mask": mask.to(inputs["input_ids"].device)}


def _padded(value: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(value, (length - value.shape[-1], 0))
