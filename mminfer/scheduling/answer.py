"""One answer while it is generated: by the host's own logits processors and stopping criteria, a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria

from mminfer.errors import InputError
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from mminfer.models.adapter import ModelAdapter
from mminfer.running import GenerationSettings, Made, made_by_host

_ROOM = 256  # tokens by which the ids of an answer that somebody looks at grow


class Listener(Protocol):
    """Whoever waits for an answer. It is called by the thread of the scheduler and must not wait for anything.

    What it raises ends this answer alone.
    """

    def take(self, token_id: int, logits: Tensor) -> bool:
        """The next token, with the model's own logits of it ([V] float32); True ends the answer."""

    def end(self, cache: CompressedCache, row: int) -> None:
        """The answer is whole; row `row` of the cache holds prompt and answer, but for the last token, for now."""

    def fail(self, error: BaseException) -> None:
        """There will be no answer, or no more of it."""


@dataclass(frozen=True, eq=False)
class AnswerRequest:
    """How one answer is generated, and who waits for it.

    Args:
        settings: of generation; without beams, guidance, several sequences to return or a streamer.
        listener: is told of every token.
        seed: of what is drawn for this answer alone. None: it draws from torch's common generator.

    Raises:
        InputError: the settings ask for more than one row.
    """

    settings: GenerationSettings
    listener: Listener
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.settings.expand_size != 1 or self.settings.guided or self.settings.streamer is not None:
            raise InputError(
                "num_beams, num_return_sequences, guidance_scale or a streamer: wanted an answer of one row by itself; "
                "call engine.generate() for those"
            )


class Answer:
    """An answer whose prompt was read.

    Attributes:
        listener: is told of every token.
        token_ids: generated so far.
        is_done: whether there is no more to come.
        failed: whether it ended before it was whole.

    Args:
        request: how it is generated.
        adapter: the host model.
        prompt_ids: token ids of the prompt.
    """

    def __init__(self, request: AnswerRequest, adapter: ModelAdapter, prompt_ids: Sequence[int]) -> None:
        self.listener, self.token_ids = request.listener, list[int]()
        self.is_done = self.failed = False
        self._row = torch.tensor([prompt_ids], device=adapter.model.get_input_embeddings().weight.device)
        self._length = len(prompt_ids)
        host = _prepared(adapter, request.settings, self._row)
        self._processors, self._samples = host.processors, bool(host.config.do_sample)
        self._ends, self._longest, self._criteria = _told_apart(host.criteria)
        self._generator: torch.Generator | None = None
        if request.seed is not None:
            self._generator = torch.Generator(self._row.device).manual_seed(request.seed)

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether each token is the one of the largest logit, which is found for many answers at once."""
        return not self._samples and not self._processors

    def choose(self, logits: Tensor) -> int:
        """The next token, from the model's logits [1, V] float32."""
        if self.takes_the_likeliest:
            return int(logits.argmax(-1))
        scores = logits.clone()  # some processors write into what they get
        for processor in self._processors:
            scores = processor(self._seen, scores)
        if not self._samples:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def take(self, token_id: int, logits: Tensor) -> None:
        """Takes in a chosen token and the logits [1, V] that it was chosen from; it may be the last."""
        self.token_ids.append(token_id)
        if self._looks_at_ids:
            self._write(token_id)
        stopped = self.listener.take(token_id, logits[0])
        length = self._length + len(self.token_ids)
        self.is_done = stopped or token_id in self._ends or length >= self._longest
        if not self.is_done and self._criteria:
            self.is_done = any(bool(criterion(self._seen, logits).all()) for criterion in self._criteria)

    def fail(self, error: BaseException) -> None:
        """Ends it before it is whole."""
        if not self.is_done:
            self.is_done = self.failed = True
            with suppress(Exception):  # nobody may be there any more to be told
                self.listener.fail(error)

    @property
    def _looks_at_ids(self) -> bool:
        return bool(self._processors or self._criteria)

    @property
    def _seen(self) -> Tensor:
        """[1, tokens] of prompt and answer."""
        return self._row[:, : self._length + len(self.token_ids)]

    def _write(self, token_id: int) -> None:
        place = self._length + len(self.token_ids) - 1
        if place >= self._row.shape[1]:
            self._row = torch.nn.functional.pad(self._row, (0, _ROOM))
        self._row[0, place] = token_id


def _prepared(adapter: ModelAdapter, settings: GenerationSettings, prompt: Tensor) -> Made:
    """What the host's `generate` makes of settings for an answer behind a prompt ([1, N] ids)."""
    axes = adapter.position_axes
    inputs = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "position_ids": prompt.new_zeros(prompt.shape if axes == 1 else (axes, *prompt.shape)),  # nobody reads them
        CACHE_NAME: CompressedCache(),
    }
    return made_by_host(adapter.model, inputs, settings.arguments, settings.stopping_criteria)


def _told_apart(criteria: Sequence[Any]) -> tuple[frozenset[int], int, list[Any]]:
    """End tokens and the most tokens, which need no tensors, and the other criteria."""
    ends, longest, others = set[int](), 2**62, []
    for one in criteria:
        if type(one) is EosTokenCriteria:
            ends |= set(one.eos_token_id.reshape(-1).tolist())
        elif type(one) is MaxLengthCriteria:
            longest = min(longest, one.max_length)
        else:
            others.append(one)
    return frozenset(ends), longest, others
