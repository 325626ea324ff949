"""Answers prepared requests on one model, by the host's `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mminfer_kernels import record_backends
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.errors import InputError
from mminfer.forward.call_state import CallState
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from mminfer.inputs.reading import Reading
from mminfer.layout import GIVEN_ROWS, GivenRows
from mminfer.metrics.memory import peak_memory
from mminfer.metrics.records import PromptRecord, stacked
from mminfer.metrics.stats import stats_of
from mminfer.metrics.vision import vision_shares
from mminfer.models.adapter import ModelAdapter
from mminfer.output import GenerationOutput
from mminfer.patching import StandIn
from mminfer.running.call import GenerationCall
from mminfer.running.model_lock import lock_of
from mminfer.running.options import GenerationArguments, RunOptions
from mminfer.running.prompt_reader import PromptReader, ReadingCancelled


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
        self._lock = lock_of(model)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.get_input_embeddings().weight.device
        return device

    def run(
        self,
        inputs: dict[str, Any],
        start: float,
        stopped: Callable[[], bool] | None = None,
        **generation_kwargs: Any,
    ) -> list[GenerationOutput]:
        """Generates from prepared inputs.

        Args:
            inputs: of a batch, as the processor makes them.
            start: `time.perf_counter()` when the request came in.
            stopped: as for `answer`, but called before the prompt only, since one pass cannot be stopped.
            generation_kwargs: the host's.

        Raises:
            InputError: the host knows no such argument.
            ReadingCancelled: `stopped` gave True.
        """
        arguments = self._checked(generation_kwargs)
        given = inputs.get(GIVEN_ROWS)
        if given is not None:
            given = given.repeated(arguments.expand_size)
        with self._generating(arguments, given_embeddings=given) as call, self._turn(stopped):
            call.generate({name: value for name, value in inputs.items() if name != GIVEN_ROWS})
        record = call.handle.records[-1]
        if not record.vision_flops:  # the host's `generate` encodes before it calls the model
            record.vision_flops = vision_shares(self._adapter, inputs, record.visual, arguments.expand_size)
        return self._outputs(call, record, start)

    def read(self, readings: Sequence[Reading], caches: Sequence[CompressedCache], options: RunOptions) -> None:
        """Takes readings in, each into its cache, without generating.

        If anything raises, what some pieces left in a cache stays there: it is the caller's to put it back.
        """
        state = CallState(options.chunk_size)
        with self._lock.reading():
            handle = StandIn(self._model, self._config)
            with handle.begin(state):
                PromptReader(handle, state, self._turn, options.progress).read(readings, caches)

    def answer(
        self,
        readings: Sequence[Reading],
        caches: Sequence[CompressedCache],
        start: float,
        options: RunOptions,
        stopped: Callable[[], bool] | None = None,
        **generation_kwargs: Any,
    ) -> list[GenerationOutput]:
        """Takes readings in, each into its cache as `read` does, and answers them in one batch.

        Args:
            readings: one for each chat, to the end of its prompt.
            caches: what earlier turns left of each chat, or empty ones.
            start: `time.perf_counter()` when the request came in.
            options: how the prompts go in.
            stopped: called after each chunk; ends the reading if it gives True. None: nobody ends it.
            generation_kwargs: the host's.

        Raises:
            InputError: the host knows no such argument, or it is to do without a cache.
            ReadingCancelled: `stopped` gave True.
        """
        arguments = self._checked(generation_kwargs)
        if arguments.setting("use_cache") is False:
            raise InputError("use_cache=False: what a chat or a prompt in chunks has read stands in its cache alone")
        with self._generating(arguments, options.chunk_size) as call:
            reader = PromptReader(call.handle, call.state, partial(self._turn, stopped), options.progress, stopped)
            with self._lock.reading():
                logits, records = reader.read(readings, caches)
            cache, expand_size = CompressedCache.stack(caches), arguments.expand_size
            if expand_size > 1:  # the host repeats its inputs so, but not a cache that it is given
                cache.batch_repeat_interleave(expand_size)
                logits = logits.repeat_interleave(expand_size, 0)
            with self._turn(stopped), call.state.resuming(cache, logits):
                call.generate({**self._placeholders([r.ids for r in readings]), CACHE_NAME: cache})
        return self._outputs(call, stacked(records), start)

    def check_free(self) -> None:
        """Raises `InputError` if this thread asks the model from within a call of it, for which it would wait."""
        self._lock.check()

    def check_arguments(self, generation_kwargs: dict[str, Any], *, one_answer_for: str | None = None) -> None:
        """Refuses what the host would refuse behind the prompt only; see `GenerationArguments.check`."""
        _refuse_caches(generation_kwargs)
        GenerationArguments(self._model, generation_kwargs).check(one_answer_for)

    def _checked(self, generation_kwargs: dict[str, Any]) -> GenerationArguments:
        _refuse_caches(generation_kwargs)
        arguments = GenerationArguments(self._model, generation_kwargs)
        arguments.check()
        return arguments

    @contextmanager
    def _generating(
        self, arguments: GenerationArguments, chunk_size: int | None = None, given_embeddings: GivenRows | None = None
    ) -> Iterator[GenerationCall]:
        """A call, whose state is in force within the `with` block and nowhere else."""
        if "stop_strings" in arguments.given:
            arguments.given.setdefault("tokenizer", self._processor.tokenizer)
        self.check_free()
        state = CallState(chunk_size, arguments.finishing_ids, arguments.headroom, given_embeddings=given_embeddings)
        handle = StandIn(self._model, self._config, self._compile)
        with (
            handle.begin(state),
            record_backends() as backends,
            peak_memory(self.device) as peak,
        ):
            yield GenerationCall(handle, state, arguments, backends, peak)

    @contextmanager
    def _turn(self, stopped: Callable[[], bool] | None = None) -> Iterator[None]:
        """Within it the model is this call's; `ReadingCancelled` is raised in place of waiting for nobody."""

        def wait() -> None:
            if stopped is not None and stopped():
                raise ReadingCancelled

        with self._lock.turn(None if stopped is None else wait):
            wait()
            yield

    def _placeholders(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """What the host's `generate` wants to see of prompts that the cache holds already.

        Args:
            rows: the token ids of each prompt.
        """
        columns, device = max(map(len, rows)), self.device
        ids = torch.tensor([[0] * (columns - len(row)) + row for row in rows], device=device)
        lengths = torch.tensor([[len(row)] for row in rows], device=device)
        mask = (torch.arange(columns, device=device) >= columns - lengths).long()
        axes = self._adapter.position_axes
        positions = ids.new_zeros(ids.shape if axes == 1 else (axes, *ids.shape))  # nobody reads them
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

    def _outputs(self, call: GenerationCall, record: PromptRecord, start: float) -> list[GenerationOutput]:
        """The answers, one for each row that was generated; start: when the request came in."""
        times, element_size = call.times(start), self._model.dtype.itemsize
        outputs = []
        for row in range(len(call.new_ids)):
            ids, logits = call.answer(row)
            chat = row * len(record.prompt) // len(call.new_ids)  # several rows may belong to one chat
            stats = stats_of(self._adapter.spec, record, chat, len(ids), element_size, times)
            text = self._processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            outputs.append(GenerationOutput(text, ids, stats, logits))
        return outputs


def _refuse_caches(generation_kwargs: dict[str, Any]) -> None:
    for name in ("cache", "past_key_values"):
        if generation_kwargs.get(name) is not None:
            raise InputError(f"{name}: an engine's calls have caches of their own: use chat(), or patch the model")
