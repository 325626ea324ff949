"""Running requests on a model: one call at a time, patched for its duration, measured."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from mminfer_kernels import record_backends
from torch import Tensor, nn
from transformers import GenerationConfig

from mminfer.config import InferenceConfig
from mminfer.errors import InputError
from mminfer.forward.kv_cache import CACHE_NAME, ROOM, CompressedCache
from mminfer.inputs.progress import reading_bar
from mminfer.inputs.reading import Reading
from mminfer.layout import GIVEN_ROWS
from mminfer.metrics.memory import Peak, peak_memory
from mminfer.metrics.records import PromptRecord, joined, stacked
from mminfer.metrics.stats import CallTimes, stats_of
from mminfer.metrics.vision import vision_shares
from mminfer.models.base import ModelAdapter
from mminfer.output import GenerationOutput
from mminfer.patching import PatchHandle, patched
from mminfer.technique import is_whole

MOST_ROOM = 1024  # beyond, a cache grows when the tokens come
COPIES = ("num_beams", "num_return_sequences")


class ReadingStopped(Exception):
    """Whoever asked for an answer has gone while its prompt was read."""


class OneAtATime:
    """A lock that tells a thread that it would wait for itself."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._owner == get_ident():
            raise InputError(
                "content that is being read asks the model that reads it: make it before, or load the model once more"
            )
        self._lock.acquire()
        self._owner = get_ident()

    def __exit__(self, *args: object) -> None:
        self._owner = None
        self._lock.release()


_locks: WeakKeyDictionary[nn.Module, OneAtATime] = WeakKeyDictionary()  # engines may share a model


@dataclass(frozen=True)
class RunOptions:
    """How prompts go in.

    Args:
        chunk_size: tokens of a chat that go through the model at a time; None: the prompt at once.
        progress: show a bar of the tokens read.
    """

    chunk_size: int | None = None
    progress: bool = False


class Runner:
    """Answers prepared requests.

    Args:
        model: the host model.
        processor: its processor.
        adapter: how the model is read.
        config: the techniques.
        compile: decode by the host's modules under torch.compile; see `mminfer.patch`.
    """

    def __init__(
        self, model: Any, processor: Any, adapter: ModelAdapter, config: InferenceConfig, compile: bool
    ) -> None:
        self._model, self._processor, self._adapter = model, processor, adapter
        self._config, self._compile = config, compile
        self._lock = _locks.setdefault(model, OneAtATime())

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.get_input_embeddings().weight.device
        return device

    def run(self, inputs: dict[str, Any], start: float, **generation_kwargs: Any) -> list[GenerationOutput]:
        """Generates from prepared inputs.

        Args:
            inputs: of a batch, as the processor makes them.
            start: `time.perf_counter()` when the request came in.
            generation_kwargs: the host's.
        """
        generation_kwargs.pop("stopped", None)  # one pass cannot be stopped
        self.check_arguments(generation_kwargs)
        ready, copies = inputs.get(GIVEN_ROWS), self.copies(generation_kwargs)
        with self._generating(generation_kwargs, RunOptions()) as call:
            call.handle.ready = ready if ready is None else ready.repeated(copies)
            call.generate({name: value for name, value in inputs.items() if name != GIVEN_ROWS})
        record = call.handle.records[-1]
        if not record.vision_flops:  # the host's `generate` encodes before it calls the model
            record.vision_flops = vision_shares(self._adapter, inputs, record.visual, copies)
        return self._outputs(call, record, start)

    def read(self, readings: Sequence[Reading], caches: Sequence[CompressedCache], options: RunOptions) -> None:
        """Takes readings in, each into its cache, without generating.

        If anything raises, what some pieces left in a cache stays there: it is the caller's to put it back.
        """
        with self._lock, patched(self._model, self._config, prefill_chunk_size=options.chunk_size) as handle:
            self._take_in(handle, readings, caches, options)

    def answer(
        self,
        readings: Sequence[Reading],
        caches: Sequence[CompressedCache],
        start: float,
        options: RunOptions,
        **generation_kwargs: Any,
    ) -> list[GenerationOutput]:
        """Takes readings in, each into its cache as `read` does, and answers them in one batch.

        Args:
            readings: one for each chat, to the end of its prompt.
            caches: what earlier turns left of each chat, or empty ones.
            start: `time.perf_counter()` when the request came in.
            options: how the prompts go in.
            generation_kwargs: the host's; `stopped` is called after each chunk and ends the reading if it gives True.

        Raises:
            ReadingStopped: it did.
        """
        stopped: Callable[[], bool] | None = generation_kwargs.pop("stopped", None)
        self.check_arguments(generation_kwargs)
        copies = self.copies(generation_kwargs)
        with self._generating(generation_kwargs, options) as call:
            last, records = self._take_in(call.handle, readings, caches, options, stopped)
            cache = CompressedCache.stack(caches)
            if copies > 1:  # the host repeats its inputs so, but not a cache that it is given
                cache.batch_repeat_interleave(copies)
                last = last.repeat_interleave(copies, 0)
            call.handle.resume(cache, last)
            ids, mask = _left_padded([r.ids for r in readings], self.device)
            axes = self._adapter.position_axes
            positions = ids.new_zeros(ids.shape if axes == 1 else (axes, *ids.shape))  # nobody reads them
            call.generate({"input_ids": ids, "attention_mask": mask, "position_ids": positions, CACHE_NAME: cache})
        return self._outputs(call, stacked(records), start)

    def _take_in(
        self,
        handle: PatchHandle,
        readings: Sequence[Reading],
        caches: Sequence[CompressedCache],
        options: RunOptions,
        stopped: Callable[[], bool] | None = None,
    ) -> tuple[Tensor, list[PromptRecord]]:
        """Logits [B, 1, vocabulary] of the last tokens, and a record of each reading that held any."""
        logits, records = [], []
        handle.reading = True
        with reading_bar(options.progress) as bar:

            def progress(tokens: int) -> None:
                bar.advance(tokens)
                if stopped is not None and stopped():
                    raise ReadingStopped

            handle.progress = progress
            for reading, cache in zip(readings, caches, strict=True):
                first, output = len(handle.records), None
                bar.begin()
                for inputs in reading:
                    handle.ready = inputs.pop(GIVEN_ROWS, None)
                    output = self._model(**inputs, **{CACHE_NAME: cache}, logits_to_keep=1, use_cache=True)
                    bar.expect(reading.parts_done, reading.parts_expected)
                if output is not None:
                    logits.append(output.logits)
                    records.append(joined(handle.records[first:]))
        handle.reading = False
        return torch.cat(logits) if logits else torch.empty(0), records

    @contextmanager
    def _generating(self, generation_kwargs: dict[str, Any], options: RunOptions) -> Iterator[_Call]:
        if "stop_strings" in generation_kwargs:
            generation_kwargs.setdefault("tokenizer", self._processor.tokenizer)
        with (
            self._lock,
            patched(self._model, self._config, self._compile, options.chunk_size) as handle,
            record_backends() as backends,
            peak_memory(self.device) as peak,
        ):
            handle.room = min(max(ROOM, generation_kwargs.get("max_new_tokens") or 0), MOST_ROOM)
            beams = self._setting(generation_kwargs, "num_beams") or 1
            handle.end_ids = set() if beams > 1 else self._end_ids(generation_kwargs)
            yield _Call(self._model, handle, generation_kwargs, backends, peak)

    def _outputs(self, call: _Call, record: PromptRecord, start: float) -> list[GenerationOutput]:
        times = call.times(start)
        end_ids, element_size = self._end_ids(call.generation_kwargs), self._model.dtype.itemsize
        outputs = []
        for row, ids in enumerate(call.new_ids):
            token_ids = _until_end(ids.tolist(), end_ids)
            chat = row * len(record.prompt) // len(call.new_ids)  # several rows may belong to one chat
            stats = stats_of(self._adapter.spec, record, chat, len(token_ids), element_size, times)
            text = self._processor.tokenizer.decode(token_ids, skip_special_tokens=True).strip()
            logits = None if call.logits is None else call.logits[row, : len(token_ids)]
            outputs.append(GenerationOutput(text, token_ids, stats, logits))
        return outputs

    def copies(self, generation_kwargs: dict[str, Any]) -> int:
        """How many times the host repeats every sequence: beams, or sequences to return."""
        return max(self._setting(generation_kwargs, name) or 1 for name in COPIES)

    def check_arguments(self, generation_kwargs: dict[str, Any], *, one_answer_for: str | None = None) -> None:
        """Refuses what the host would refuse after the prompt only.

        Args:
            generation_kwargs: the host's.
            one_answer_for: what takes one answer only, if it does, and what to do instead.

        Raises:
            InputError: a name that the host does not know, or wrong numbers of beams or sequences to return.
        """
        known = {"tokenizer", *vars(GenerationConfig()), *vars(self._model.generation_config)}
        for function in (self._model.generate, self._model.forward):
            known |= set(inspect.signature(function).parameters)
        unknown = [name for name in generation_kwargs if name not in known]
        if unknown:
            raise InputError(f"generate() knows no argument {', '.join(unknown)}: leave it out, or check its spelling")
        for name in COPIES:
            value = self._setting(generation_kwargs, name)
            if value is not None and not is_whole(value, least=1):
                raise InputError(f"{name}={value!r}: wanted a whole number from 1")
        copies = self.copies(generation_kwargs)
        if one_answer_for is not None and copies != 1:
            raise InputError(f"num_beams or num_return_sequences is {copies}: {one_answer_for}")

    def _setting(self, generation_kwargs: dict[str, Any], name: str) -> Any:
        """A setting of generation: of the call, else of the config it passes, else the model's."""
        given = generation_kwargs.get("generation_config") or self._model.generation_config
        return generation_kwargs.get(name, getattr(given, name, None))

    def _end_ids(self, generation_kwargs: dict[str, Any]) -> set[int]:
        end = self._setting(generation_kwargs, "eos_token_id")
        return set() if end is None else set(end) if isinstance(end, (list, tuple)) else {end}


class _Call:
    """One call of the host's `generate`, and what it took."""

    def __init__(
        self,
        model: Any,
        handle: PatchHandle,
        generation_kwargs: dict[str, Any],
        backends: dict[str, str],
        peak: Peak,
    ) -> None:
        self._model, self.handle, self.generation_kwargs = model, handle, generation_kwargs
        self._backends, self._peak, self._end = backends, peak, 0.0
        self.new_ids = torch.empty(0, 0, dtype=torch.int64)  # [rows, new tokens]
        self.logits: Tensor | None = None  # [rows, new tokens, vocabulary]

    def generate(self, inputs: dict[str, Any]) -> None:
        result = self._model.generate(**inputs, **{**self.generation_kwargs, "return_dict_in_generate": True})
        self._end = time.perf_counter()
        self.new_ids = result.sequences[:, inputs["input_ids"].shape[1] :]
        self.logits = None if result.get("logits") is None else torch.stack(result.logits, 1)

    def times(self, start: float) -> CallTimes:
        """Of the whole call, which began at `start`."""
        handle, new = self.handle, self.new_ids.shape[1]
        first = handle.first_token_at
        tpot = (1e3 * (self._end - first) - handle.compile_ms) / (new - 1) if new > 1 else None
        prompt_ms = sum(handle.prompt_ms)
        return CallTimes(1e3 * (first - start), prompt_ms, tpot, handle.compile_ms, self._peak.bytes, self._backends)


def _left_padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [B, N] int64 each; what stands in the padding is never looked at."""
    columns = max(map(len, rows))
    ids = torch.tensor([[0] * (columns - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([[len(row)] for row in rows], device=device)
    return ids, (torch.arange(columns, device=device) >= columns - lengths).long()


def _until_end(ids: list[int], end_ids: set[int]) -> list[int]:
    """The ids up to the first end of turn, which is kept; what follows in a batch is padding."""
    for i, token in enumerate(ids):
        if token in end_ids:
            return ids[: i + 1]
    return ids
