"""The pass behind a model's `forward`, on whatever model that hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from mminfer.config import InferenceConfig, check_flag, checked_config
from mminfer.errors import ConfigError, InputError, UnsupportedModelError
from mminfer.forward.call_state import CallState, tokens_of
from mminfer.forward.decode import Decoder
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache, Origin
from mminfer.forward.native_build import prepare_kernels
from mminfer.forward.prefill import PassOptions, PromptOutput, prompt_pass
from mminfer.forward.surroundings import check_entrance, has_foreign_forward
from mminfer.layout import TokenLayout
from mminfer.metrics.clock import done_at
from mminfer.metrics.records import PromptRecord
from mminfer.metrics.vision import note_vision
from mminfer.models.adapter import ModelAdapter
from mminfer.models.encoder_cache import EncoderCache
from mminfer.models.encoding import Encoded, HostEncoder
from mminfer.models.registry import adapter_for
from mminfer.models.structure import running_device
from mminfer.models.wrappers import check_layers
from mminfer.patching.callers_inputs import (
    cache_for,
    check_batch,
    check_columns,
    check_continuation,
    check_heads,
    check_holes,
    check_mask,
)
from mminfer.patching.replacement import check_unpatched

_REFUSED = {
    "labels": "a loss",
    "output_attentions": "attention matrices, which are never built",
    "output_hidden_states": "hidden states of rows that may have left",
}


class ModelPass:
    """What a model's `forward` gives while our prompt pass takes its calls, and what was done so far.

    Args:
        model: the host's; not patched.
        config: the techniques.
        compile: decode by the host's modules under torch.compile.
        prefill_chunk_size: tokens of each chat that go through the layers at a time; None: all.
        verify: whether to compare what the layers are given, where the model has a forward of its own.
        encoder_cache: of pictures that were encoded before; None: none are kept.

    Attributes:
        model: the host's.
        adapter: how the model is read.
        config: the techniques in force.
        records: one `PromptRecord` for each prompt pass so far.
        prompt_ms: duration of each of those passes.

    Raises:
        UnsupportedModelError: the family has no adapter, or a layer is compiled.
        ConfigError: a setting does not fit the model, it is patched already, the config is none, or `compile` no bool.
    """

    def __init__(
        self,
        model: Any,
        config: InferenceConfig,
        compile: bool = False,
        prefill_chunk_size: int | None = None,
        verify: bool = True,
        encoder_cache: EncoderCache | None = None,
    ) -> None:
        self.config = checked_config(config)
        check_flag("compile", compile)
        check_flag("verify", verify)
        self._verify = verify
        self._call = CallState(prefill_chunk_size)
        self._begun_by: int | None = None  # the thread whose call is in force
        self._chunk_size = prefill_chunk_size
        self.model = model
        self.adapter: ModelAdapter = adapter_for(model)
        check_unpatched(model)
        config.check(self.adapter.spec)
        check_layers(self.adapter.layers)
        self.records: list[PromptRecord] = []
        self.prompt_ms: list[float] = []
        self._encoder = HostEncoder(self.adapter, config.tower, encoder_cache)
        self._decoder = Decoder(self.adapter, config, compile)
        self._origin = Origin.of(self.adapter.language_model, config.positions, config.cache)

    @property
    def first_token_at(self) -> float:
        """`time.perf_counter()` at the end of the last prompt pass; 0.0: there was none."""
        return self._call.first_token_at

    @property
    def step_ms(self) -> list[float]:
        """Duration of each decoding step since the last prompt pass; `compile_ms` has those that compiled.

        On a GPU, which is not waited for between steps, these are the times of their launches.
        """
        return self._call.step_ms

    @property
    def compile_ms(self) -> float:
        """Time of the steps since the patch was set in which something was compiled; they are not in `step_ms`."""
        return self._decoder.compile_ms

    @contextmanager
    def begin(self, state: CallState) -> Iterator[CallState]:
        """Puts a call's state in force for the time of a `with` block; no other call ever sees it.

        Outside such blocks every prompt begins a call of its own, with the settings that `CallState` has by default
        and the patch's `prefill_chunk_size`.

        Args:
            state: made for this call.

        Raises:
            ConfigError: another call is in force.
        """
        if self._begun_by is not None:
            raise ConfigError("a call of this patched model is in force already: leave its `with` block first")
        try:
            self._call, self._begun_by = state, get_ident()
            yield state
        finally:
            self._call, self._begun_by = state.followed_by(CallState(self._chunk_size)), None
            self._decoder.let_go()

    @property
    def _host_forward(self) -> Callable[..., Any]:
        """The model's own."""
        forward: Callable[..., Any] = self.adapter.model.forward
        return forward

    @property
    def _state(self) -> CallState:
        """Of the call in force; other threads than the one that began it have none."""
        return self._call if self._begun_by in (None, get_ident()) else CallState(self._chunk_size)

    @torch.no_grad()
    def forward(self, inputs: dict[str, Any]) -> Any:
        """What the model's `forward` gives for these inputs, a prompt or a decoding step."""
        handed, call = inputs.get(CACHE_NAME, inputs.get("past_key_values")), self._state
        cache = cache_for(handed)
        logits = call.take_last_logits(cache)
        if logits is None:
            if cache.logical_length:
                check_continuation(cache, self._origin)
            is_step = call.is_step(inputs, cache)
            logits = self._step(call, inputs, cache) if is_step else self._prompt(call, inputs, cache)
        if handed is not None and handed is not cache:  # the caller's own, or the empty one that `generate` brings
            cache = cache.move_into(handed)
        past: dict[str, Any] = {CACHE_NAME: None if inputs.get("use_cache") is False else cache}
        output = CausalLMOutputWithPast(logits=logits, **past)
        return output.to_tuple() if inputs.get("return_dict") is False else output

    def _step(self, call: CallState, inputs: dict[str, Any], cache: CompressedCache) -> Tensor:
        start, compile_ms = time.perf_counter(), self.compile_ms
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = self.model.get_input_embeddings()(inputs["input_ids"])
        embeds = self.adapter.entering(embeds)
        rows = call.drop_finished(inputs.get("input_ids"), cache, at_once=not self._decoder.is_recorded(cache))
        running = embeds if rows is None else embeds[rows]
        check_batch(len(running), cache)
        logits = self._decoder.step(running, cache)
        if rows is not None:
            logits = logits.new_zeros(len(embeds), *logits.shape[1:]).index_copy_(0, rows, logits)
        if self.compile_ms == compile_ms:
            call.step_ms.append(1e3 * (time.perf_counter() - start))
        return logits

    def _prompt(self, call: CallState, inputs: dict[str, Any], cache: CompressedCache) -> Tensor:
        if not cache.logical_length:  # a prompt begins
            prepare_kernels(running_device(self.model.get_input_embeddings()))
        start = time.perf_counter()
        if self._begun_by is None:
            call = CallState(self._chunk_size)
        self._decoder.refresh()
        call.begin_prompt(cache)
        output = self._prompt_output(call, inputs, cache)
        self.records.append(output.record)
        logits = self._prompt_logits(inputs, output)
        call.end_prompt(done_at(logits.device))
        self.prompt_ms.append(1e3 * (call.first_token_at - start))
        if self._begun_by is None:
            self._call = call
        return logits

    def _prompt_output(self, call: CallState, inputs: dict[str, Any], cache: CompressedCache) -> PromptOutput:
        for name, what in _REFUSED.items():
            if inputs.get(name) is not None and inputs[name] is not False:
                raise InputError(f"{name}: a patched model gives no {what}; undo() the patch for this call")
        keep = inputs.get("logits_to_keep", 0)
        last_only = isinstance(keep, int) and keep == 1
        check_heads(cache, self.config)
        check_columns(cache, self.config)
        check_holes(inputs, self.adapter.spec.sliding_window)
        ends_in_padding = check_mask(call, inputs, cache, last_only or self.config.removes_rows)
        given = call.take_given_embeddings()
        encoded = call.take_encoded() or self._encoder.encode(inputs)
        embeds, layout = self.adapter.embed(inputs, given, encoded)
        if self._verify and given is None and len(layout.visual_rows) > 0 and has_foreign_forward(self.adapter):
            self._check_entrance(inputs, encoded, embeds, layout)
        places_given = inputs.get("position_ids") is not None and not call.is_reading  # a reading counts from 0
        columns, between = tokens_of(inputs).shape[1], call.between_layers
        options = PassOptions(columns, call.chunk_size, last_only, call.progress, places_given, between)
        output = prompt_pass(self.adapter, self.config, embeds, layout, cache, options)
        cache.origin, cache.ends_in_padding = self._origin, ends_in_padding
        note_vision(self.adapter, output.record, inputs, encoded)
        return output

    def _check_entrance(self, inputs: dict[str, Any], encoded: Encoded, embeds: Tensor, layout: TokenLayout) -> None:
        """Compares what the layers are given with what a forward of the model's own gives them; see `check_entrance`.

        Raises:
            UnsupportedModelError: it is something else, or cannot be compared.
        """
        if encoded.copies > 1 and not self._encoder.is_plain:
            raise UnsupportedModelError(
                "this model has a forward or a hook of its own, and several answers of one prompt cannot be compared "
                "with it where tower= or encoder_cache_bytes= is set: ask for one answer, or pass verify=False"
            )
        if not self._encoder.is_plain:
            inputs = {**encoded.pixels, **inputs}
            embeds, layout = self.adapter.embed(inputs)
        check_entrance(self.adapter, self._host_forward, inputs, embeds, layout)

    def _prompt_logits(self, inputs: dict[str, Any], output: PromptOutput) -> Tensor:
        """[B, N, vocabulary] (or the columns of `logits_to_keep`), padding as it came; or [B, 1, vocabulary]."""
        if output.hidden is None:
            return self.adapter.logits(output.last[:, None])
        shape, mask = tokens_of(inputs).shape[:2], inputs.get("attention_mask")
        mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask[:, -shape[1] :].bool()
        padded = output.hidden.new_zeros(*shape, output.hidden.shape[-1])
        padded[mask.to(padded.device)] = output.hidden
        keep = inputs.get("logits_to_keep", 0)
        if isinstance(keep, int):
            keep = slice(-keep, None) if keep else slice(None)
        return self.adapter.logits(padded[:, keep])
