"""One call of the host's `generate` through our pass, and what it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mminfer.errors import UnsupportedModelError
from mminfer.forward.call_state import CallState
from mminfer.forward.kv_cache import CACHE_NAME
from mminfer.metrics.memory import Peak
from mminfer.metrics.stats import CallTimes
from mminfer.patching import ModelPass
from mminfer.running.row_ends import RowEnds
from mminfer.running.settings import GenerationSettings


class GenerationCall:
    """One call of the host's `generate`, and what it took.

    Args:
        handle: the pass behind the model.
        state: what the call is doing, in force on the pass.
        settings: of the call.
        backends: what runs each op, filled in on the way.
        peak: of the memory, known once the call is over.

    Attributes:
        new_ids: [rows, new tokens] int64.
        lengths: tokens of each row's answer, its end of turn among them; what follows is padding.
        logits: [rows, new tokens, vocabulary] from which those tokens were taken, if they were asked for.
    """

    def __init__(
        self,
        handle: ModelPass,
        state: CallState,
        settings: GenerationSettings,
        backends: dict[str, str],
        peak: Peak,
    ) -> None:
        self.handle, self.state, self.settings = handle, state, settings
        self._backends, self._peak, self._end, self._allocated = backends, peak, 0.0, 0
        self.new_ids = torch.empty(0, 0, dtype=torch.int64)
        self.lengths: list[int] = []
        self.logits: Tensor | None = None

    def generate(self, inputs: dict[str, Any]) -> None:
        """Runs it; inputs: the model's, with `input_ids` [B, N].

        Raises:
            UnsupportedModelError: the model answered by another way than our pass.
        """
        (chats, columns), ends = inputs["input_ids"].shape, RowEnds()
        beams, criteria = self.settings.num_beams > 1, self.settings.stopping_criteria
        if not beams and chats * self.settings.expand_size > 1:  # a row alone ends with the call
            criteria = ends.watched(criteria)
        result = self.handle.model.generate(
            **inputs,
            **self.settings.arguments,
            streamer=self.settings.streamer,
            stopping_criteria=list(criteria),
        )
        self._end = time.perf_counter()
        if not self.handle.records or self.state.waits:
            raise UnsupportedModelError(
                f"{type(self.handle.model).__name__}.generate did not call the model it belongs to, so that the "
                "settings had no effect: take away what has replaced it on this model"
            )
        self._allocated = result[CACHE_NAME].allocated_bytes
        self.new_ids = result.sequences[:, columns:]
        stopped = ends.columns() or [0] * len(self.new_ids)
        if beams:
            self.lengths = (result.beam_indices >= 0).sum(1).tolist()
        else:
            self.lengths = [
                self._length(ids, stop - columns) for ids, stop in zip(self.new_ids.tolist(), stopped, strict=True)
            ]
        if result.get("logits") is not None:
            self.logits = _logits(result.logits, result.beam_indices if beams else None)

    def _length(self, ids: list[int], stopped: int) -> int:
        """Of an answer up to its first end of turn, which is kept; stopped: where a criterion ended it, if above 0."""
        end = next((i + 1 for i, token in enumerate(ids) if token in self.settings.end_ids), len(ids))
        return min(end, stopped) if stopped > 0 else end

    def times(self, start: float) -> CallTimes:
        """Of the whole call; start: `time.perf_counter()` when the request came in."""
        new_tokens, first, compile_ms = self.new_ids.shape[1], self.state.first_token_at, self.handle.compile_ms
        tpot = (1e3 * (self._end - first) - compile_ms) / (new_tokens - 1) if new_tokens > 1 else None
        own = (1e3 * (first - start), sum(self.handle.prompt_ms), tpot, compile_ms)
        return CallTimes(self._allocated, *own, self._peak.bytes, self._backends)

    def answer(self, row: int) -> tuple[list[int], Tensor | None]:
        """One row's answer, and its logits."""
        length = self.lengths[row]
        ids: list[int] = self.new_ids[row, :length].tolist()
        return ids, None if self.logits is None else self.logits[row, :length]


def _logits(steps: Sequence[Tensor], beam_indices: Tensor | None) -> Tensor:
    """[rows, new tokens, vocabulary], of rows of answers.

    Args:
        steps: [rows that generated, vocabulary] of each token.
        beam_indices: [rows of answers, new tokens], which of the rows that generated each token came from, -1 behind an
            answer's end; None: they are the same.
    """
    if beam_indices is None:
        return torch.stack(list(steps), 1)
    rows = beam_indices.clamp_min(0).unbind(1)
    return torch.stack([logits[index] for logits, index in zip(steps, rows, strict=False)], 1)
