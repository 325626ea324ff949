"""One call of the host's `generate` through our pass, and what it took."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from mminfer.errors import UnsupportedModelError
from mminfer.forward.call_state import CallState
from mminfer.metrics.memory import Peak
from mminfer.metrics.stats import CallTimes
from mminfer.patching import ModelPass
from mminfer.running.options import GenerationArguments


class GenerationCall:
    """One call of the host's `generate`, and what it took.

    Args:
        handle: the pass behind the model.
        state: what the call is doing, in force on the pass.
        arguments: of the call.
        backends: what runs each op, filled in on the way.
        peak: of the memory, known once the call is over.

    Attributes:
        new_ids: [rows, new tokens] int64.
        logits: [rows, new tokens, vocabulary], if they were asked for.
    """

    def __init__(
        self,
        handle: ModelPass,
        state: CallState,
        arguments: GenerationArguments,
        backends: dict[str, str],
        peak: Peak,
    ) -> None:
        self.handle, self.state, self.arguments = handle, state, arguments
        self._backends, self._peak, self._end = backends, peak, 0.0
        self.new_ids = torch.empty(0, 0, dtype=torch.int64)
        self.logits: Tensor | None = None

    def generate(self, inputs: dict[str, Any]) -> None:
        """Runs it; inputs: the model's, with `input_ids` [B, N].

        Raises:
            UnsupportedModelError: the model answered by another way than our pass.
        """
        arguments = {**self.arguments.given, "return_dict_in_generate": True}
        result = self.handle.model.generate(**inputs, **arguments)
        self._end = time.perf_counter()
        if not self.handle.records or self.state.waits:
            raise UnsupportedModelError(
                f"{type(self.handle.model).__name__}.generate did not call the model it belongs to, so that the "
                "settings had no effect: take away what has replaced it on this model"
            )
        self.new_ids = result.sequences[:, inputs["input_ids"].shape[1] :]
        self.logits = None if result.get("logits") is None else torch.stack(result.logits, 1)

    def times(self, start: float) -> CallTimes:
        """Of the whole call; start: `time.perf_counter()` when the request came in."""
        new_tokens, first, compile_ms = self.new_ids.shape[1], self.state.first_token_at, self.handle.compile_ms
        tpot = (1e3 * (self._end - first) - compile_ms) / (new_tokens - 1) if new_tokens > 1 else None
        prompt_ms = sum(self.handle.prompt_ms)
        return CallTimes(1e3 * (first - start), prompt_ms, tpot, compile_ms, self._peak.bytes, self._backends)

    def answer(self, row: int) -> tuple[list[int], Tensor | None]:
        """One row's new tokens up to the first end of turn, which is kept, and their logits.

        What follows in a batch is padding.
        """
        ids: list[int] = self.new_ids[row].tolist()
        end_ids = self.arguments.end_ids
        length = next((i + 1 for i, token in enumerate(ids) if token in end_ids), len(ids))
        return ids[:length], None if self.logits is None else self.logits[row, :length]
