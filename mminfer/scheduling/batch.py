"""Answers that are decoded together: between two steps others join them, and those that are done leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.forward.decode import Decoder
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.rotary import frequency_factors
from mminfer.models.adapter import ModelAdapter
from mminfer.scheduling.answer import Answer
from mminfer.scheduling.prompt import Prompting, is_plain
from mminfer.technique import PositionTechnique


class Kind(NamedTuple):
    """What answers must have in common so that one step can take them together and each is as it is alone.

    Args:
        positions: the technique that rotates their keys.
        length: the length that their frequencies were scaled for; 0.0 where they follow none.
        is_packed: whether the heads of their caches differ in length.
        alone: a number of its own, where the host's frequencies follow the longest position of a step; else 0.
    """

    positions: PositionTechnique | None
    length: float
    is_packed: bool
    alone: int


class _Coming(NamedTuple):
    """An answer that joins, and where its prompt stands."""

    cache: CompressedCache
    row: int
    answer: Answer


def kind_of(adapter: ModelAdapter, config: InferenceConfig, cache: CompressedCache, answer: Answer) -> Kind:
    """Of an answer behind this cache, which was made with these settings."""
    scaled = frequency_factors(config, adapter.spec, cache.rotary_length) is not None
    alone = id(answer) if adapter.rotary_follows_length else 0
    return Kind(config.positions, cache.rotary_length if scaled else 0.0, cache.is_packed, alone)


def pass_of(adapter: ModelAdapter, config: InferenceConfig, prompting: Prompting) -> tuple[Any, ...] | None:
    """What prompts must have in common so that one pass can take their next pieces; None: none does.

    Args:
        adapter: the host model.
        config: the techniques.
        prompting: one of them.
    """
    piece, cache = prompting.piece, prompting.cache
    if piece is None or not is_plain(piece) or adapter.rotary_follows_length:
        return None
    if cache.layers:
        scaled = frequency_factors(config, adapter.spec, cache.rotary_length) is not None
        held: tuple[Any, ...] = (cache.is_packed, cache.rotary_length if scaled else 0.0)
    elif frequency_factors(config, adapter.spec, 1e12) is not None:
        return None  # frequencies follow the longest prompt of a pass
    else:
        held = ()
    return id(prompting.handle), held, *(name for name, value in piece.items() if value is not None)


class Batch:
    """Answers that are decoded together.

    Args:
        adapter: the host model.
        positions: of their kind.
        compile: decode by the host's modules under torch.compile.
    """

    def __init__(self, adapter: ModelAdapter, positions: PositionTechnique | None, compile: bool) -> None:
        self._adapter = adapter
        self._decoder = Decoder(adapter, InferenceConfig(positions), compile)
        self._cache: CompressedCache | None = None
        self._rows: list[Answer] = []  # of the cache
        self._coming: list[_Coming] = []

    @property
    def answers(self) -> list[Answer]:
        """Those that are not done."""
        return [answer for answer in (*self._rows, *(one.answer for one in self._coming)) if not answer.is_done]

    def join(self, cache: CompressedCache, row: int, answer: Answer) -> None:
        """Takes an answer in behind the prompt in this row of a cache, which others may share."""
        self._coming.append(_Coming(cache, row, answer))

    @torch.no_grad()
    def step(self, leaving: Callable[[CompressedCache, int, Answer], object]) -> None:
        """One more token of each answer.

        Args:
            leaving: told of each answer that is done by now: the cache, and the row that is its own in it.
        """
        self._regroup()
        if self._cache is None:
            return
        ids = torch.tensor([[answer.token_ids[-1]] for answer in self._rows], device=self._cache.layers[0].device)
        embeds = self._adapter.entering(self._adapter.model.get_input_embeddings()(ids))
        logits = self._decoder.step(embeds, self._cache)[:, -1].float()
        take_tokens(self._rows, logits)
        for row, answer in enumerate(self._rows):
            if answer.is_done:
                leaving(self._cache, row, answer)

    def _regroup(self) -> None:
        """The rows that still generate, and those that come."""
        staying = [row for row, answer in enumerate(self._rows) if not answer.is_done]
        coming = [one for one in self._coming if not one.answer.is_done]
        self._coming = []
        if len(staying) == len(self._rows) and not coming:
            return
        rows = [(one.cache, one.row) for one in coming]
        if self._cache is not None:
            rows = [*((self._cache, row) for row in staying), *rows]
        self._rows = [*(self._rows[row] for row in staying), *(one.answer for one in coming)]
        if coming:
            self._decoder.refresh()
        self._cache = _cache_of(rows)


def _cache_of(rows: Sequence[tuple[CompressedCache, int]]) -> CompressedCache | None:
    """The cache of these rows: theirs, if they are all there are in it, since nobody else goes on from it."""
    if not rows:
        return None
    first = rows[0][0]
    if all(cache is first for cache, _ in rows) and [row for _, row in rows] == list(range(len(first.tokens))):
        return first
    return CompressedCache.of_rows(rows)


def take_tokens(answers: Sequence[Answer], logits: Tensor) -> None:
    """Chooses the next token of each answer and takes it in; what one of them raises ends that one alone.

    Args:
        answers: as many as there are rows.
        logits: [B, V] float32.
    """
    likeliest = logits.argmax(-1).tolist()
    for row, answer in enumerate(answers):
        if answer.is_done:
            continue
        own = logits[row : row + 1]
        try:
            answer.take(likeliest[row] if answer.takes_the_likeliest else answer.choose(own), own)
        except Exception as error:  # processors, criteria and listeners raise anything
            answer.fail(error)
