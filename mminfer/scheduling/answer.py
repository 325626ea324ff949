"""One answer while it is generated: by the host's own logits processors and stopping criteria, a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria

from mminfer.errors import InputError
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from mminfer.models.adapter import ModelAdapter
from mminfer.running import GenerationSettings, made_by_host

_MOST_RULES = 64  # settings of which it is kept what the host makes
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
        rules: what the host makes of settings.
        prompt_ids: token ids of the prompt.
    """

    def __init__(self, request: AnswerRequest, rules: HostRules, prompt_ids: Sequence[int]) -> None:
        self.listener, self.token_ids = request.listener, list[int]()
        self.is_done = self.failed = False
        self._row, self._length = torch.tensor([prompt_ids], device=rules.device), len(prompt_ids)
        own = rules.of(request.settings, self._row)
        self._processors, self._samples, self._ends, self._criteria = (
            own.processors,
            own.samples,
            own.ends,
            own.criteria,
        )
        self._longest = own.longest
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


class Rules(NamedTuple):
    """By what an answer is generated.

    Args:
        processors: of logits.
        samples: whether tokens are drawn.
        ends: tokens that end it.
        longest: tokens of prompt and answer at most.
        criteria: others that end it.
    """

    processors: list[Any]
    samples: bool
    ends: frozenset[int]
    longest: int
    criteria: list[Any]


class HostRules:
    """What the host's `generate` makes of settings: of those that only take the likeliest token it is asked once.

    Args:
        adapter: the host model.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self._plain: dict[int, tuple[GenerationSettings, Rules]] = {}  # by `id` of settings, which stay alive here

    @property
    def device(self) -> torch.device:
        """Of token ids."""
        device: torch.device = self._adapter.model.get_input_embeddings().weight.device
        return device

    def of(self, settings: GenerationSettings, prompt: Tensor) -> Rules:
        """For an answer behind a prompt ([1, N] ids)."""
        length, known = prompt.shape[1], self._plain.get(id(settings))
        if known is not None:
            return known[1]._replace(longest=length + known[1].longest)
        rules = self._asked(settings, prompt)
        if _follows_length_alone(settings, rules, length):
            while len(self._plain) >= _MOST_RULES:
                del self._plain[next(iter(self._plain))]
            self._plain[id(settings)] = settings, rules._replace(longest=rules.longest - length)
        return rules

    def _asked(self, settings: GenerationSettings, prompt: Tensor) -> Rules:
        axes = self._adapter.position_axes
        inputs = {
            "input_ids": prompt,
            "attention_mask": torch.ones_like(prompt),
            "position_ids": prompt.new_zeros(prompt.shape if axes == 1 else (axes, *prompt.shape)),  # nobody reads them
            CACHE_NAME: CompressedCache(),
        }
        made = made_by_host(self._adapter.model, inputs, settings.arguments, settings.stopping_criteria)
        return Rules(made.processors, bool(made.config.do_sample), *_told_apart(made.criteria))


def _follows_length_alone(settings: GenerationSettings, rules: Rules, length: int) -> bool:
    """Whether the host would make the same of these settings behind any prompt, but for the number of tokens."""
    plain = all(value is None or isinstance(value, (bool, int, float, str)) for value in settings.arguments.values())
    simple = not (rules.processors or rules.samples or rules.criteria or settings.stopping_criteria)
    return plain and simple and rules.longest == length + (settings.max_new_tokens or 0)


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
