"""Taking readings in: the pieces of a prompt go through a model's pass, one after the other, into a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from mminfer.forward.call_state import CallState
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from mminfer.inputs.progress import ReadingBar, reading_bar
from mminfer.inputs.reading import Reading
from mminfer.layout import GIVEN_ROWS
from mminfer.metrics.records import PromptRecord, joined
from mminfer.patching import ModelPass


class ReadingCancelled(Exception):
    """Whoever asked for an answer has gone while its prompt was read."""


class PromptReader:
    """Takes readings in. What they read of is opened between the turns: it may come from a caller's iterator.

    Args:
        handle: the pass behind the model.
        state: what the call is doing, in force on the pass.
        turn: holds the model while a piece goes through it.
        show_progress: whether to show a bar of the tokens read.
        stopped: called after each chunk; ends the reading if it gives True.
        check_length: told how many tokens a prompt has so far, before they go in; raises where these are too many.
    """

    def __init__(
        self,
        handle: ModelPass,
        state: CallState,
        turn: Callable[[], AbstractContextManager[None]],
        show_progress: bool,
        stopped: Callable[[], bool] | None = None,
        check_length: Callable[[int], object] | None = None,
    ) -> None:
        self._handle, self._state, self._turn = handle, state, turn
        self._show_progress, self._stopped, self._check_length = show_progress, stopped, check_length

    def read(self, readings: Sequence[Reading], caches: Sequence[CompressedCache]) -> tuple[Tensor, list[PromptRecord]]:
        """Takes each reading into its cache.

        Returns:
            Logits [B, 1, vocabulary] of the last tokens, and a record of each reading; those without tokens left out.

        Raises:
            ReadingCancelled: `stopped` gave True.
        """
        logits, records = [], []
        with reading_bar(self._show_progress) as bar, self._state.reading(partial(self._advance, bar)):
            for reading, cache in zip(readings, caches, strict=True):
                first = len(self._handle.records)
                last_logits = self._read_one(reading, cache, bar)
                if last_logits is not None:
                    logits.append(last_logits)
                    records.append(joined(self._handle.records[first:]))
        return torch.cat(logits) if logits else torch.empty(0), records

    def _read_one(self, reading: Reading, cache: CompressedCache, bar: ReadingBar) -> Tensor | None:
        """[1, 1, vocabulary], of the reading's last token; None: it has no token."""
        output = None
        bar.begin()
        for inputs in reading:
            if self._check_length is not None:
                self._check_length(cache.logical_length + inputs["input_ids"].shape[1])
            self._state.given_embeddings = inputs.pop(GIVEN_ROWS, None)
            with self._turn():
                output = self._handle.model(**inputs, **{CACHE_NAME: cache}, logits_to_keep=1, use_cache=True)
            bar.expect(reading.parts_done, reading.parts_expected)
        return None if output is None else output.logits

    def _advance(self, bar: ReadingBar, tokens: int) -> None:
        bar.advance(tokens)
        if self._stopped is not None and self._stopped():
            raise ReadingCancelled
