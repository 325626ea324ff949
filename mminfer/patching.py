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

from mminfer.config import InferenceConfig
from mminfer.errors import ConfigError, InputError
from mminfer.forward.decode import Decoder
from mminfer.forward.kv_cache import CACHE_NAME, ROOM, CompressedCache
from mminfer.forward.native_build import prepare_kernels
from mminfer.forward.prefill import PassOptions, prompt_pass
from mminfer.layout import GivenRows
from mminfer.metrics.records import PromptRecord
from mminfer.metrics.vision import vision_shares
from mminfer.models.base import ModelAdapter
from mminfer.models.registry import adapter_for
from mminfer.technique import is_whole

_REFUSED = {
    "labels": "a loss",
    "output_attentions": "attention matrices, which are never built",
    "output_hidden_states": "hidden states of rows that may have left",
}


class PatchHandle:
    """A patched model: what its last prompt pass did, and the way back.

    Attributes:
        model: the patched model.
        adapter: how the model is read.
        config: the techniques in force.
        records: one `PromptRecord` a prompt pass, since the patch was set.
        prompt_ms: duration of each of those passes.
        end_ids: tokens that end a turn; rows of a batch that got one are computed no further. Empty by default, since
            only the caller knows that generation stops there; not for beams.
        room: how many tokens to come the cache has room for from the start.
        chunk_size: tokens of a prompt that go through the layers at a time; None: all.
        progress: told after each chunk how many tokens of the prompt it was.
        ready: rows of the next prompt whose embeddings were given; that prompt takes them.
        reading: whether every call is a stretch of a prompt, be it of one token.
        first_token_at: `time.perf_counter()` at the end of the last prompt pass.
        step_ms: duration of each decoding step since then.
        compile_ms: time of the steps in which something was compiled, since the patch was set; not among `step_ms`.
    """

    def __init__(
        self, model: Any, config: InferenceConfig, compile: bool = False, prefill_chunk_size: int | None = None
    ) -> None:
        if prefill_chunk_size is not None and not is_whole(prefill_chunk_size, least=1):
            raise ConfigError(f"prefill_chunk_size={prefill_chunk_size!r}, wanted 1 or more tokens, or None for all")
        if isinstance(getattr(model.__dict__.get("forward"), "mminfer_handle", None), PatchHandle):
            raise ConfigError("the model is patched already: call undo() on that patch first")
        self.model, self.config = model, config
        self.adapter: ModelAdapter = adapter_for(model)
        config.check(self.adapter.spec)
        self._decoder = Decoder(self.adapter, config, compile)
        self.records: list[PromptRecord] = []
        self.prompt_ms: list[float] = []
        self.first_token_at = 0.0
        self.end_ids: set[int] = set()
        self.room = ROOM
        self.chunk_size = prefill_chunk_size
        self.progress: Callable[[int], object] | None = None
        self.ready: GivenRows | None = None
        self.reading = False
        self._rows: Tensor | None = None
        self._resumed: Tensor | None = None
        self.step_ms: list[float] = []
        self._state = {name: getattr(self.adapter.base, name) for name in self.adapter.host_state}
        self._instance_forward = model.__dict__.get("forward")
        original = model.forward
        signature = inspect.signature(original)
        others = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not args and others:  # as `generate` calls; binding takes long for one token
                return self._forward(kwargs)
            bound = signature.bind(*args, **kwargs).arguments
            return self._forward({**bound.pop(others, {}), **bound})

        vars(forward)["mminfer_handle"] = self
        model.forward = forward

    @property
    def compile_ms(self) -> float:
        return self._decoder.compile_ms

    def resume(self, cache: CompressedCache, logits: Tensor) -> None:
        """Lets `generate` go on from a prompt that is in the cache already.

        The host asks for the logits of the last token once more; it gets these.

        Args:
            cache: holds the whole prompt.
            logits: [B, 1, vocabulary] of its last token.
        """
        self._resumed = logits
        cache.logical_length -= 1

    def undo(self) -> None:
        """Gives the model back as it was. Calling it again does nothing."""
        if getattr(self.model.__dict__.get("forward"), "mminfer_handle", None) is not self:
            return
        if self._instance_forward is None:
            del self.model.forward
        else:
            self.model.forward = self._instance_forward
        for name, value in self._state.items():
            setattr(self.adapter.base, name, value)

    @torch.no_grad()
    def _forward(self, inputs: dict[str, Any]) -> Any:
        cache = _cache_of(inputs)
        if not cache.logical_length:  # a prompt begins
            prepare_kernels(self.model.get_input_embeddings().weight.device)
        start = time.perf_counter()
        if self._resumed is not None:
            logits, self._resumed = self._resumed, None
            cache.logical_length += 1
            self._rows = None
        elif cache.logical_length and not self.reading and self.ready is None and _is_step(inputs):
            compiled = self.compile_ms
            logits = self._step(inputs, cache)
            if self.compile_ms == compiled:
                self.step_ms.append(1e3 * (time.perf_counter() - start))
        else:
            self._rows = None
            self._decoder.renew()
            cache.room = self.room
            logits = self._prompt(inputs, cache)
            self.first_token_at = time.perf_counter()
            self.prompt_ms.append(1e3 * (self.first_token_at - start))
            self.step_ms.clear()
        past: dict[str, Any] = {CACHE_NAME: None if inputs.get("use_cache") is False else cache}
        output = CausalLMOutputWithPast(logits=logits, **past)
        return output.to_tuple() if inputs.get("return_dict") is False else output

    def _step(self, inputs: dict[str, Any], cache: CompressedCache) -> Tensor:
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = self.model.get_input_embeddings()(inputs["input_ids"])
        rows = self._unfinished(inputs, cache)
        if rows is None:
            return self._decoder.step(embeds, cache)
        logits = self._decoder.step(embeds[rows], cache)
        return logits.new_zeros(len(embeds), *logits.shape[1:]).index_copy_(0, rows, logits)

    def _unfinished(self, inputs: dict[str, Any], cache: CompressedCache) -> Tensor | None:
        """Rows of the batch that still generate; None: all. Those whose turn has ended leave the cache for good."""
        if not self.end_ids or inputs.get("input_ids") is None:
            return None
        ids = inputs["input_ids"][:, 0].tolist()
        rows = range(len(ids)) if self._rows is None else self._rows.tolist()
        going = [place for place, row in enumerate(rows) if ids[row] not in self.end_ids]
        if 0 < len(going) < len(rows):
            device = inputs["input_ids"].device
            cache.reorder_cache(torch.tensor(going, device=device))
            self._rows = torch.tensor([rows[place] for place in going], device=device)
        return self._rows

    def _prompt(self, inputs: dict[str, Any], cache: CompressedCache) -> Tensor:
        for name, what in _REFUSED.items():
            if inputs.get(name) is not None and inputs[name] is not False:
                raise InputError(f"{name}: a patched model gives no {what}; undo() the patch for this call")
        ready, self.ready = self.ready, None
        embeds, layout = self.adapter.embed(inputs, ready)
        like = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        keep = inputs.get("logits_to_keep", 0)
        out = prompt_pass(
            self.adapter,
            self.config,
            embeds,
            layout,
            cache,
            PassOptions(like.shape[1], self.chunk_size, isinstance(keep, int) and keep == 1, self.progress),
        )
        out.record.vision_flops = vision_shares(self.adapter, inputs, out.record.visual)
        self.records.append(out.record)
        if out.hidden is None:
            return self.adapter.logits(out.last[:, None])
        return self._all_logits(inputs, out.hidden, like.shape[:2])

    def _all_logits(self, inputs: dict[str, Any], hidden: Tensor, shape: tuple[int, int]) -> Tensor:
        """[B, N, vocabulary] (or the columns of `logits_to_keep`), in the padded places the rows came from."""
        mask = inputs.get("attention_mask")
        mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask[:, -shape[1] :].bool()
        padded = hidden.new_zeros(*shape, hidden.shape[-1])
        padded[mask.to(hidden.device)] = hidden
        keep = inputs.get("logits_to_keep", 0)
        if isinstance(keep, int):
            keep = slice(-keep, None) if keep else slice(None)
        return self.adapter.logits(padded[:, keep])


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


def _is_step(inputs: dict[str, Any]) -> bool:
    """Whether this is one text token a sequence, with nothing to see."""
    seen = (inputs.get("pixel_values"), inputs.get("pixel_values_videos"), inputs.get("mm_encoder_outputs"))
    like = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    return like.shape[1] == 1 and not any(x is not None and (isinstance(x, Tensor) or len(x) > 0) for x in seen)


def patch(
    model: Any, config: InferenceConfig, compile: bool = False, prefill_chunk_size: int | None = None
) -> PatchHandle:
    """Makes a loaded Hugging Face vision-language model run with these techniques, in its own `generate`.

    `forward` of the instance is replaced, nothing else: no class, no weight, no global table. When rows leave the
    prompt (merging, pruning), `forward` returns logits of the last position only, as `generate` asks for.

    Args:
        model: a `...ForConditionalGeneration` of a supported family.
        config: the techniques; `InferenceConfig()` changes nothing but the way it is computed.
        compile: decode by the host's modules under torch.compile. The first token takes the time to compile, half a
            minute or more; where it fails, decoding goes on as without.
        prefill_chunk_size: tokens of each chat that go through the layers at a time, images never split; the cache is
            compressed behind each chunk. None: the whole prompt at once. Pixels are encoded as they come in the call;
            `Engine.generate` also takes them piece by piece.

    Returns:
        A handle; `undo()` gives the model back as it was.

    Raises:
        UnsupportedModelError: the family has no adapter.
        ConfigError: a setting does not fit the model, or it is patched already.
    """
    return PatchHandle(model, config, compile, prefill_chunk_size)


@contextmanager
def patched(
    model: Any, config: InferenceConfig, compile: bool = False, prefill_chunk_size: int | None = None
) -> Iterator[PatchHandle]:
    """`patch` for the time of a `with` block."""
    handle = patch(model, config, compile, prefill_chunk_size)
    try:
        yield handle
    finally:
        handle.undo()
