"""Drop-in patching: a loaded model's own `forward` and `generate` take our prompt pass until it is undone."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from mminfer.config import InferenceConfig, checked_config
from mminfer.errors import ConfigError, InputError
from mminfer.forward.call_state import CallState, tokens_of
from mminfer.forward.decode import Decoder
from mminfer.forward.host_check import check_host
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from mminfer.forward.native_build import prepare_kernels
from mminfer.forward.prefill import PassOptions, PromptOutput, prompt_pass
from mminfer.metrics.records import PromptRecord
from mminfer.metrics.vision import vision_shares
from mminfer.models.adapter import ModelAdapter
from mminfer.models.registry import adapter_for
from mminfer.models.structure import running_device

_REFUSED = {
    "labels": "a loss",
    "output_attentions": "attention matrices, which are never built",
    "output_hidden_states": "hidden states of rows that may have left",
}


class PatchHandle:
    """A patched model: what was done since the patch was set, and the way back. `patch` makes it.

    Attributes:
        model: the patched model.
        adapter: how the model is read.
        config: the techniques in force.
        records: one `PromptRecord` for each prompt pass since the patch was set.
        prompt_ms: duration of each of those passes.
    """

    def __init__(
        self,
        model: Any,
        config: InferenceConfig,
        compile: bool = False,
        prefill_chunk_size: int | None = None,
        verify: bool = True,
    ) -> None:
        self.config = checked_config(config)
        self._call = CallState(prefill_chunk_size)
        self._call_begun = False
        self._chunk_size = prefill_chunk_size
        if _patch_on(model) is not None:
            raise ConfigError("the model is patched already: call undo() on that patch first")
        self.model = model
        self.adapter: ModelAdapter = adapter_for(model)
        config.check(self.adapter.spec)
        check_host(self.adapter, config, verify)
        self.records: list[PromptRecord] = []
        self.prompt_ms: list[float] = []
        self._decoder = Decoder(self.adapter, config, compile)
        self._host_state = {name: getattr(self.adapter.base, name) for name in self.adapter.host_state}
        self._own_forward = model.__dict__.get("forward")  # None: the class's
        model.forward = _replacement(model.forward, self)

    @property
    def first_token_at(self) -> float:
        """`time.perf_counter()` at the end of the last prompt pass; 0.0: there was none."""
        return self._call.first_token_at

    @property
    def step_ms(self) -> list[float]:
        """Duration of each decoding step since the last prompt pass; `compile_ms` has those that compiled."""
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
        if self._call_begun:
            raise ConfigError("a call of this patched model is in force already: leave its `with` block first")
        self._call, self._call_begun = state, True
        try:
            yield state
        finally:
            self._call, self._call_begun = state.followed_by(CallState(self._chunk_size)), False

    def undo(self) -> None:
        """Gives the model back as it was. Calling it again does nothing."""
        if _patch_on(self.model) is not self:
            return
        if self._own_forward is None:
            del self.model.forward
        else:
            self.model.forward = self._own_forward
        for name, value in self._host_state.items():
            setattr(self.adapter.base, name, value)

    @torch.no_grad()
    def _forward(self, inputs: dict[str, Any]) -> Any:
        """What the model's `forward` gives for these inputs, a prompt or a decoding step, while it is patched."""
        cache, call = _cache_of(inputs), self._call
        logits = call.take_last_logits(cache)
        if logits is None:
            logits = self._step(inputs, cache) if call.is_step(inputs, cache) else self._prompt(inputs, cache)
        past: dict[str, Any] = {CACHE_NAME: None if inputs.get("use_cache") is False else cache}
        output = CausalLMOutputWithPast(logits=logits, **past)
        return output.to_tuple() if inputs.get("return_dict") is False else output

    def _step(self, inputs: dict[str, Any], cache: CompressedCache) -> Tensor:
        start, compile_ms = time.perf_counter(), self.compile_ms
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = self.model.get_input_embeddings()(inputs["input_ids"])
        embeds = self.adapter.entering(embeds)
        rows = self._call.drop_finished(inputs.get("input_ids"), cache)
        if rows is None:
            logits = self._decoder.step(embeds, cache)
        else:
            of_rows = self._decoder.step(embeds[rows], cache)
            logits = of_rows.new_zeros(len(embeds), *of_rows.shape[1:]).index_copy_(0, rows, of_rows)
        if self.compile_ms == compile_ms:
            self._call.step_ms.append(1e3 * (time.perf_counter() - start))
        return logits

    def _prompt(self, inputs: dict[str, Any], cache: CompressedCache) -> Tensor:
        if not cache.logical_length:  # a prompt begins
            prepare_kernels(running_device(self.model.get_input_embeddings()))
        start = time.perf_counter()
        call = self._call if self._call_begun else CallState(self._chunk_size)
        self._decoder.refresh()
        call.begin_prompt(cache)
        output = self._prompt_output(call, inputs, cache)
        output.record.vision_flops = vision_shares(self.adapter, inputs, output.record.visual)
        self.records.append(output.record)
        logits = self._prompt_logits(inputs, output)
        call.end_prompt(time.perf_counter())
        self.prompt_ms.append(1e3 * (call.first_token_at - start))
        self._call = call
        return logits

    def _prompt_output(self, call: CallState, inputs: dict[str, Any], cache: CompressedCache) -> PromptOutput:
        for name, what in _REFUSED.items():
            if inputs.get(name) is not None and inputs[name] is not False:
                raise InputError(f"{name}: a patched model gives no {what}; undo() the patch for this call")
        embeds, layout = self.adapter.embed(inputs, call.take_given_embeddings())
        keep = inputs.get("logits_to_keep", 0)
        return prompt_pass(
            self.adapter,
            self.config,
            embeds,
            layout,
            cache,
            PassOptions(
                tokens_of(inputs).shape[1], call.chunk_size, isinstance(keep, int) and keep == 1, call.progress
            ),
        )

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


def _patch_on(model: Any) -> PatchHandle | None:
    """The patch that is on the model now."""
    handle = getattr(model.__dict__.get("forward"), "mminfer_handle", None)
    return handle if isinstance(handle, PatchHandle) else None


def _replacement(original: Callable[..., Any], handle: PatchHandle) -> Callable[..., Any]:
    """What stands in for the model's own `forward`, with its signature."""
    signature = inspect.signature(original)
    keywords = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not args and keywords:  # as `generate` calls; binding takes long for one token
            return handle._forward(kwargs)
        bound = signature.bind(*args, **kwargs).arguments
        return handle._forward({**bound.pop(keywords, {}), **bound})

    vars(forward)["mminfer_handle"] = handle
    return forward


def _cache_of(inputs: dict[str, Any]) -> CompressedCache:
    """The cache to go on from; a new one in place of the empty one that `generate` brings."""
    cache = inputs.get(CACHE_NAME, inputs.get("past_key_values"))
    if isinstance(cache, CompressedCache):
        return cache
    if isinstance(cache, Cache) and getattr(cache, "is_compileable", False):
        raise InputError(
            f"{type(cache).__name__}: a static cache cannot shrink; leave cache_implementation at its default"
        )
    if cache is not None and cache.get_seq_length() > 0:
        raise InputError(
            f"{CACHE_NAME} is a {type(cache).__name__} filled by the unpatched model: start from an empty cache, or "
            "go on with the cache that the patched model returned"
        )
    return CompressedCache()


def patch(
    model: Any,
    config: InferenceConfig,
    compile: bool = False,
    prefill_chunk_size: int | None = None,
    verify: bool = True,
) -> PatchHandle:
    """Makes a loaded Hugging Face vision-language model run with these techniques, in its own `generate`.

    `forward` of the instance is replaced, nothing else: no class, no weight, no global table. When rows leave the
    prompt (merging, pruning), `forward` returns logits of the last position only, [B, 1, vocabulary], as `generate`
    asks for; otherwise [B, N, vocabulary] as the host does.

    Args:
        model: a `...ForConditionalGeneration` of a supported family.
        config: the techniques; `InferenceConfig()` changes nothing but the way it is computed.
        compile: decode by the host's modules under torch.compile. The first token takes the time to compile, half a
            minute or more; where it fails, decoding goes on as without.
        prefill_chunk_size: tokens of each chat that go through the layers at a time, images never split; the cache is
            compressed behind each chunk. None: the whole prompt at once. Pixels are encoded as they come in the call;
            `Engine.generate` also takes them piece by piece.
        verify: whether to compare our pass with the host's own on a few tokens first, once for each loaded model.

    Returns:
        A handle; `undo()` gives the model back as it was.

    Raises:
        UnsupportedModelError: the family has no adapter, or our pass is not the host's own for this language model.
        ConfigError: a setting does not fit the model, it is patched already, or the config is none.

    Example:
        >>> handle = mminfer.patch(model, mminfer.InferenceConfig(cache=mminfer.LookM(budget=8192)))
        >>> ids = model.generate(**processor_inputs, max_new_tokens=64)
        >>> handle.records[-1].layers[0].entries  # how many entries a head each sequence's cache holds in layer 0
        >>> handle.undo()
    """
    return PatchHandle(model, config, compile, prefill_chunk_size, verify)


@contextmanager
def patched(
    model: Any,
    config: InferenceConfig,
    compile: bool = False,
    prefill_chunk_size: int | None = None,
    verify: bool = True,
) -> Iterator[PatchHandle]:
    """`patch` for the time of a `with` block; arguments, errors and handle are those of `patch`.

    Example:
        >>> with mminfer.patched(model, mminfer.InferenceConfig(merge=mminfer.AIMMerge(ratio=0.25))):
        ...     ids = model.generate(**processor_inputs, max_new_tokens=64)
    """
    handle = patch(model, config, compile, prefill_chunk_size, verify)
    try:
        yield handle
    finally:
        handle.undo()
