"""Answers prepared requests on one model, by the host's `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mminfer_kernels import record_backends
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.forward.call_state import CallState
from mminfer.forward.host_check import check_host
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from mminfer.inputs.markers import tokenizer_of
from mminfer.inputs.reading import Reading
from mminfer.layout import GIVEN_ROWS, GivenRows, Modality
from mminfer.metrics.memory import peak_memory
from mminfer.metrics.records import PromptRecord, stacked
from mminfer.metrics.stats import stats_of
from mminfer.metrics.vision import vision_shares
from mminfer.models.adapter import ModelAdapter
from mminfer.models.encoding import Encoded, HostEncoder
from mminfer.models.structure import running_device
from mminfer.models.vision import PIXEL_INPUTS
from mminfer.output import GenerationOutput
from mminfer.patching import StandIn, check_unpatched
from mminfer.running.call import GenerationCall
from mminfer.running.model_lock import lock_of
from mminfer.running.options import RunOptions
from mminfer.running.prompt_reader import PromptReader, ReadingCancelled
from mminfer.running.settings import GenerationSettings, resolve


class Runner:
    """Answers prepared requests.

    Args:
        model: the host model.
        processor: its processor.
        adapter: how the model is read.
        config: the techniques.
        compile: decode by the host's modules under torch.compile; see `mminfer.patch`.
        verify: whether to compare our pass with the host's own.
    """

    def __init__(
        self, model: Any, processor: Any, adapter: ModelAdapter, config: InferenceConfig, compile: bool, verify: bool
    ) -> None:
        self._model, self._processor, self._adapter = model, processor, adapter
        self._config, self._compile, self._verify = config, compile, verify
        self._lock = lock_of(model)

    @property
    def device(self) -> torch.device:
        return running_device(self._model.get_input_embeddings())

    def settings(self, given: Mapping[str, Any], *, one_answer_for: str | None = None) -> GenerationSettings:
        """A call's arguments as settings of generation, before anything runs; see `resolve`."""
        self._check_model()
        tokenizer, vocab_size = tokenizer_of(self._processor), self._adapter.spec.vocab_size
        return resolve(self._model, tokenizer, vocab_size, given, one_answer_for)

    def run(
        self,
        inputs: dict[str, Any],
        start: float,
        settings: GenerationSettings,
        stopped: Callable[[], bool] | None = None,
    ) -> list[GenerationOutput]:
        """Generates from prepared inputs.

        Args:
            inputs: of a batch, as the processor makes them.
            start: `time.perf_counter()` when the request came in.
            settings: of the generation.
            stopped: as for `answer`, but called before the prompt only, since one pass cannot be stopped.

        Raises:
            InputError: the prompt leaves no room for an answer.
            ReadingCancelled: `stopped` gave True.
        """
        chats, columns = inputs["input_ids"].shape
        settings.check_rows(chats)
        settings.check_prompt(columns)
        given = inputs.get(GIVEN_ROWS)
        if given is not None:
            given = given.repeated(settings.expand_size)
        encoder = HostEncoder(self._adapter, self._config.tower, self._adapter.encoder_cache)
        prompt = {name: value for name, value in inputs.items() if name != GIVEN_ROWS}
        with self._generating(settings, given_embeddings=given) as call, self._turn(stopped):
            if not encoder.is_plain:  # else the host's `generate` encodes before it calls the model
                call.state.encoded = self._encoded(encoder, prompt, settings)
                prompt = {name: value for name, value in prompt.items() if name not in PIXEL_INPUTS.values()}
            call.generate(prompt)
        record = call.handle.records[0]  # the host's guidance has prompts of its own behind it
        if encoder.is_plain and not record.vision_flops:
            record.vision_flops = vision_shares(self._adapter, inputs, record.visual, settings.expand_size)
            record.full_vision_flops = record.vision_flops
        return self._outputs(call, record, start)

    def _encoded(self, encoder: HostEncoder, inputs: dict[str, Any], settings: GenerationSettings) -> Encoded:
        """The pictures of a batch, as often as its sequences will be there."""
        ids, tokens = inputs["input_ids"], dict[Modality, list[int]]()
        for kind in PIXEL_INPUTS:
            token = self._adapter.placeholder_id(kind)
            tokens[kind] = [0] * len(ids) if token is None else (ids == token).sum(1).tolist()
        return encoder.encode(inputs).repeated(tokens, settings.expand_size)

    def read(self, readings: Sequence[Reading], caches: Sequence[CompressedCache], options: RunOptions) -> None:
        """Takes readings in, each into its cache, without generating.

        If anything raises, what some pieces left in a cache stays there: it is the caller's to put it back.
        """
        self._check_model()
        state = CallState(options.chunk_size, headroom=0)
        with self._lock.reading():
            handle = StandIn(self._model, self._config, verify=self._verify, encoder_cache=self._adapter.encoder_cache)
            with handle.begin(state):
                PromptReader(handle, state, self._turn, options.progress).read(readings, caches)

    def answer(
        self,
        readings: Sequence[Reading],
        caches: Sequence[CompressedCache],
        start: float,
        options: RunOptions,
        settings: GenerationSettings,
        stopped: Callable[[], bool] | None = None,
    ) -> list[GenerationOutput]:
        """Takes readings in, each into its cache as `read` does, and answers them in one batch.

        Args:
            readings: one for each chat, to the end of its prompt.
            caches: what earlier turns left of each chat, or empty ones.
            start: `time.perf_counter()` when the request came in.
            options: how the prompts go in.
            settings: of the generation.
            stopped: called after each chunk; ends the reading if it gives True. None: nobody ends it.

        Raises:
            InputError: the prompt leaves no room for an answer.
            ReadingCancelled: `stopped` gave True.
        """
        settings.check_rows(len(readings))
        with self._generating(settings, options.chunk_size) as call:
            turn = partial(self._turn, stopped)
            reader = PromptReader(call.handle, call.state, turn, options.progress, stopped, settings.check_prompt)
            with self._lock.reading():
                logits, records = reader.read(readings, caches)
            cache, expand_size = CompressedCache.stack(caches), settings.expand_size
            if expand_size > 1:  # the host repeats its inputs so, but not a cache that it is given
                cache.batch_repeat_interleave(expand_size)
                logits = logits.repeat_interleave(expand_size, 0)
            with self._turn(stopped), call.state.resuming(cache, logits):
                call.generate({**self._placeholders([r.ids for r in readings], settings), CACHE_NAME: cache})
        return self._outputs(call, stacked(records), start)

    def _check_model(self) -> None:
        """Compares our pass with the host's own once more where something has changed around the layers since."""
        check_unpatched(self._model)
        check_host(self._adapter, InferenceConfig(), self._verify)

    def check_free(self) -> None:
        """Raises `InputError` if this thread asks the model from within a call of it, for which it would wait."""
        self._lock.check()

    @contextmanager
    def _generating(
        self, settings: GenerationSettings, chunk_size: int | None = None, given_embeddings: GivenRows | None = None
    ) -> Iterator[GenerationCall]:
        """A call, whose state is in force within the `with` block and nowhere else."""
        self.check_free()
        state = CallState(chunk_size, settings.finishing_ids, settings.headroom, given_embeddings=given_embeddings)
        cache = self._adapter.encoder_cache
        handle = StandIn(self._model, self._config, self._compile, self._verify, cache)
        with (
            handle.begin(state),
            record_backends() as backends,
            peak_memory(self.device) as peak,
        ):
            yield GenerationCall(handle, state, settings, backends, peak)

    @contextmanager
    def _turn(self, stopped: Callable[[], bool] | None = None) -> Iterator[None]:
        """Within it the model is this call's; `ReadingCancelled` is raised in place of waiting for nobody."""

        def wait() -> None:
            if stopped is not None and stopped():
                raise ReadingCancelled

        with self._lock.turn(None if stopped is None else wait):
            wait()
            yield

    def _placeholders(self, rows: Sequence[list[int]], settings: GenerationSettings) -> dict[str, Tensor]:
        """What the host's `generate` wants to see of prompts that the cache holds already: what it would see else.

        Args:
            rows: the token ids of each prompt.
            settings: what pads where the tokenizer has no padding.
        """
        columns, device, pad = max(map(len, rows)), self.device, self._processor.tokenizer.pad_token_id
        pad = settings.pad_token_id if pad is None else pad
        ids = torch.tensor([[pad] * (columns - len(row)) + row for row in rows], device=device)
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
