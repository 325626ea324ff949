"""Answers that are decoded together: between two steps others join them, and those that are done leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.forward.decode import Decoder
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.rotary import frequency_factors
from mminfer.models.adapter import ModelAdapter
from mminfer.scheduling.answer import Answer
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


def kind_of(adapter: ModelAdapter, config: InferenceConfig, cache: CompressedCache, answer: Answer) -> Kind:
    """Of an answer behind this cache, which was made with these settings."""
    scaled = frequency_factors(config, adapter.spec, cache.rotary_length) is not None
    alone = id(answer) if adapter.rotary_follows_length else 0
    return Kind(config.positions, cache.rotary_length if scaled else 0.0, cache.is_packed, alone)


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
        self._coming: list[tuple[CompressedCache, Answer]] = []

    @property
    def answers(self) -> list[Answer]:
        """Those that are not done."""
        return [answer for answer in (*self._rows, *(answer for _, answer in self._coming)) if not answer.is_done]

    def join(self, cache: CompressedCache, answer: Answer) -> None:
        """Takes an answer in behind the prompt of this cache, which several answers may share."""
        self._coming.append((cache, answer))

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
        coming = [(cache, answer) for cache, answer in self._coming if not answer.is_done]
        self._coming = []
        if len(staying) == len(self._rows) and not coming:
            return
        rows = [(cache, 0) for cache, _ in coming]
        if self._cache is not None:
            rows = [*((self._cache, row) for row in staying), *rows]
        self._rows = [*(self._rows[row] for row in staying), *(answer for _, answer in coming)]
        if coming:
            self._decoder.refresh()
        if len(rows) == len(coming) == 1:
            self._cache = coming[0][0]  # nobody else goes on from it
        else:
            self._cache = CompressedCache.of_rows(rows) if rows else None


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
