"""What one call of a patched model is doing: made for the call, and gone with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mminfer.errors import ConfigError
from mminfer.forward.kv_cache import CompressedCache
from mminfer.layout import GivenRows
from mminfer.models.encoding import Encoded
from mminfer.technique import is_whole

VISUAL_INPUTS = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


@dataclass(eq=False)
class CallState:
    """What one call of a patched model is doing; `PatchHandle.begin` puts it in force.

    A call is a prompt, in one stretch or in several, and the decoding steps behind it.

    Args:
        chunk_size: tokens of each chat that go through the layers at a time; None: all.
        end_ids: tokens that end a turn; rows of a batch that got one are computed no further. Empty by default, since
            only the caller knows that generation stops there; not for beams.
        headroom: how many tokens to come the cache has room for from the start; None: nobody knows.
        progress: told after each chunk how many tokens of the prompt it was.
        given_embeddings: rows of the next prompt whose embeddings are given; that prompt takes them.
        between_layers: called behind each layer of a prompt, so that others may have a turn.
        encoded: the pictures of the next prompt, encoded; that prompt takes them.

    Attributes:
        first_token_at: `time.perf_counter()` at the end of the last prompt pass.
        step_ms: duration of each decoding step since then, but for those in which something was compiled.

    Raises:
        ConfigError: the chunk size is no number of tokens.
    """

    chunk_size: int | None = None
    end_ids: Collection[int] = ()
    headroom: int | None = None
    progress: Callable[[int], object] | None = None
    given_embeddings: GivenRows | None = None
    between_layers: Callable[[], object] | None = None
    encoded: Encoded | None = None
    first_token_at: float = field(default=0.0, init=False)
    step_ms: list[float] = field(default_factory=list, init=False)
    _prompt_only: bool = field(default=False, init=False)  # every call is a stretch of a prompt, be it of one token
    _last_logits: Tensor | None = field(default=None, init=False)  # of a prompt that the cache holds already
    _running: Tensor | None = field(default=None, init=False)  # [K] int64, rows that the cache holds; None: all
    _ended: set[int] = field(default_factory=set, init=False)  # rows that generate no more

    def __post_init__(self) -> None:
        if self.chunk_size is not None and not is_whole(self.chunk_size, least=1):
            raise ConfigError(f"prefill_chunk_size={self.chunk_size!r}, wanted 1 or more tokens, or None for all")

    @property
    def is_reading(self) -> bool:
        """Whether every forward pass is a stretch of a prompt, be it of one token."""
        return self._prompt_only

    @contextmanager
    def reading(self, progress: Callable[[int], object] | None) -> Iterator[None]:
        """Within the `with` block every forward pass is a stretch of a prompt, be it of one token.

        Args:
            progress: as the attribute, for this time.
        """
        before = self.progress
        self._prompt_only, self.progress = True, progress
        try:
            yield
        finally:
            self._prompt_only, self.progress = False, before

    @contextmanager
    def resuming(self, cache: CompressedCache, logits: Tensor) -> Iterator[None]:
        """Within the `with` block the host's `generate` goes on from a prompt that is in the cache already.

        The host asks for the logits of the last token once more; it gets these. If it never does, the cache is put
        back as it was.

        Args:
            cache: holds the whole prompt.
            logits: [B, 1, vocabulary], of the prompt's last token.
        """
        self._last_logits = logits
        cache.logical_length -= 1
        try:
            yield
        finally:
            self.take_last_logits(cache)

    @property
    def waits(self) -> bool:
        """Whether there are logits of a prompt for which the host has not asked."""
        return self._last_logits is not None

    def take_last_logits(self, cache: CompressedCache) -> Tensor | None:
        """[B, 1, vocabulary], of a prompt that the cache holds already; None: there is none, or they were taken."""
        logits, self._last_logits = self._last_logits, None
        if logits is not None:
            cache.logical_length += 1
        return logits

    def take_given_embeddings(self) -> GivenRows | None:
        """The embeddings given for the next prompt, once."""
        given, self.given_embeddings = self.given_embeddings, None
        return given

    def take_encoded(self) -> Encoded | None:
        """The pictures encoded for the next prompt, once."""
        encoded, self.encoded = self.encoded, None
        return encoded

    def is_step(self, inputs: dict[str, Any], cache: CompressedCache) -> bool:
        """Whether a forward pass with these inputs is a decoding step and no prompt.

        It is one where something is in the cache and one token of text is added to each sequence.
        """
        if not cache.logical_length or self._prompt_only:
            return False
        if self.given_embeddings is not None or self.encoded is not None:
            return False
        if tokens_of(inputs).shape[1] != 1:
            return False
        visual = (inputs.get(name) for name in VISUAL_INPUTS)
        return not any(x is not None and (isinstance(x, Tensor) or len(x) > 0) for x in visual)

    def begin_prompt(self, cache: CompressedCache) -> None:
        """A prompt is about to go into the cache; all rows of its batch will generate."""
        self._running, self._ended = None, set()
        cache.headroom = self.headroom

    def end_prompt(self, now: float) -> None:
        """The first token can be chosen; now: by `time.perf_counter()`."""
        self.first_token_at = now
        self.step_ms = []

    def followed_by(self, other: CallState) -> CallState:
        """The other call, which has done nothing yet; it goes on with the times of this one, and with nothing else."""
        other.first_token_at, other.step_ms = self.first_token_at, self.step_ms
        return other

    def drop_finished(self, input_ids: Tensor | None, cache: CompressedCache, at_once: bool = True) -> Tensor | None:
        """Takes sequences whose turn has ended out of the cache, for good; at least one always stays.

        Args:
            input_ids: [B, 1], the last token of each row of the whole batch; None: not known.
            cache: holds the rows that were generating up to now.
            at_once: else only where half of the rows or more have ended, so that a cache that had better stay where it
                is in memory moves seldom.

        Returns:
            [K] int64, the rows that the cache holds; None: all of them.
        """
        if not self.end_ids or input_ids is None:
            return None
        last = input_ids[:, 0].tolist()
        held = list(range(len(last))) if self._running is None else self._running.tolist()
        self._ended |= {row for row in held if last[row] in self.end_ids}
        places = [place for place, row in enumerate(held) if row not in self._ended]
        if 0 < len(places) < len(held) and (at_once or 2 * len(places) <= len(held)):
            cache.reorder_cache(torch.tensor(places, device=input_ids.device))
            self._running = torch.tensor([held[place] for place in places], device=input_ids.device)
        return self._running


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """What of a model's inputs has one column for each token: ids [B, N], or embeddings [B, N, C]."""
    ids = inputs.get("input_ids")
    tokens: Tensor = inputs["inputs_embeds"] if ids is None else ids
    return tokens
