"""Whether our pass through a model's layers is the host's own: compared once for each model, on a short prompt.

The host's own `forward` runs two short rows, one of them at the last positions that the model was made for, and every
layer's input and output is kept. Our pass then runs each layer on the host's input, so that one layer's rounding is
all there is between the two, whatever the numbers are kept in. What the host does before its first layer, between
layers and behind the last is held against ours in the same way, and so is a decoding step. What is found holds as long
as nothing changes around the layers.

Two rows of so few tokens see no sliding window; those are compared by what the host's attention asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mminfer.config import InferenceConfig
from mminfer.errors import UnsupportedModelError
from mminfer.forward.attention import routed_attention
from mminfer.forward.decode import Decoder
from mminfer.forward.graphed import refuse
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from mminfer.forward.layer_attention import LayerAttention, PassSettings
from mminfer.forward.native_build import prepare_kernels
from mminfer.forward.prefill import PassOptions, prompt_pass
from mminfer.forward.probe import TOKENS, evaluating, full_name, is_close, is_half, is_same, probe, rotary_kept
from mminfer.forward.rows import through_layer
from mminfer.forward.surroundings import surroundings
from mminfer.forward.technique_fit import check_positions, check_replay, check_skip
from mminfer.layout import TokenLayout
from mminfer.models.adapter import ModelAdapter
from mminfer.models.structure import running_device

# How far one layer may be from the host's, as a part of what it adds to the stream; and the logits of a whole pass.
LAYER_BAR, HALF_LAYER_BAR = 1e-3, 0.06
LOGITS_BAR, HALF_LOGITS_BAR = 1e-2, 0.4
WAY_OUT = "verify=False turns this comparison off, at your own risk"

_checked: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # of each model, what was found right


@dataclass
class _Trace:
    """What the host's own pass did.

    Args:
        entered: [B, N, C] in front of each layer.
        left: [B, N, C] behind each layer.
        logits: [B, N, vocabulary].
    """

    entered: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class _Watched(LayerAttention):
    """Keeps the window that the host's attention asked for."""

    window: int | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        self.window = window
        return super().__call__(q, k, v, scale, window)


def check_host(
    adapter: ModelAdapter, config: InferenceConfig, verify: bool = True, forward: Callable[..., Any] | None = None
) -> None:
    """Refuses a model whose own pass is not ours, and techniques that its layers do not carry.

    Args:
        adapter: the host model, which nothing is patched on.
        config: the techniques.
        verify: whether to compare passes, if that was not done for this model as it is now; a few tokens go through it
            twice.
        forward: the model's own; None: what it has.

    Raises:
        UnsupportedModelError: the passes differ, or one of them fails.
        ConfigError: a technique does not go with the way the layers are built.
    """
    done = _checked.setdefault(adapter.model, {repr(None)})
    own = adapter.model.forward if forward is None else forward
    due = [(verify, f"{adapter.model.dtype} {surroundings(adapter, own)}", partial(_compare, adapter, own))]
    due += [(config.positions is not None, f"{config.positions!r}", partial(check_positions, adapter, config))]
    due += [(config.skip is not None, f"{config.skip!r}", partial(check_skip, adapter, config))]
    replays = config.cache is not None and config.cache.replay is not None
    due += [(replays, f"{config.cache!r}", partial(check_replay, adapter, config))]
    due = [check for check in due if check[0] and check[1] not in done]
    if not due:
        return
    with torch.no_grad(), evaluating(adapter.model), rotary_kept(adapter), torch.compiler.set_stance("force_eager"):
        for _, name, check in due:
            check()
            done.add(name)


def _compare(adapter: ModelAdapter, forward: Callable[..., Any]) -> None:
    prepare_kernels(running_device(adapter.model.get_input_embeddings()))
    inputs = probe(adapter)
    adapter.entering(torch.empty(0))  # read once, by two embeddings, which some rotary embeddings would remember
    with rotary_kept(adapter):
        trace = _host_pass(adapter, forward, inputs)
    try:
        embeds, layout = adapter.embed(inputs)
        _check_stream(adapter, trace, embeds)
        _check_layers(adapter, trace, layout)
        if not is_same(adapter.logits(trace.left[-1]), trace.logits):
            raise _differs(adapter, "the logits of the norm and the head are not the host's")
        _check_decoding(adapter, inputs, *_host_steps(adapter, forward, inputs, trace))
    except (UnsupportedModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # layers that nobody thought of raise anything
        raise UnsupportedModelError(
            f"{full_name(adapter)} does not go through our pass: {type(error).__name__}: {str(error)[:200]}; {WAY_OUT}"
        ) from error


def _host_pass(adapter: ModelAdapter, forward: Callable[..., Any], inputs: dict[str, Tensor]) -> _Trace:
    trace, thread = _Trace(), get_ident()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() == thread:
            trace.entered.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if get_ident() == thread:
            trace.left.append((output if isinstance(output, Tensor) else output[0]).clone())

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in adapter.layers]
    handles += [layer.register_forward_hook(after) for layer in adapter.layers]
    try:
        trace.logits = forward(**inputs, use_cache=False, return_dict=True).logits
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{full_name(adapter)} cannot be compared with our pass, since its own pass of a short text fails: "
            f"{type(error).__name__}: {str(error)[:200]}; {WAY_OUT}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _check_stream(adapter: ModelAdapter, trace: _Trace, embeds: Tensor) -> None:
    """Whether the host does between layers what we do: nothing."""
    depth = len(adapter.layers)
    if len(trace.entered) != depth:
        raise _differs(adapter, f"it runs {len(trace.entered)} layers, but has {depth}")
    steps = [("before its first layer", embeds.view_as(trace.entered[0]), trace.entered[0])]
    steps += [(f"between layers {i} and {i + 1}", trace.left[i], trace.entered[i + 1]) for i in range(depth - 1)]
    for where, ours, host in steps:
        if not is_close(ours, host, 1e-5, 0.02):
            raise _differs(adapter, f"it changes the hidden states {where}")


def _check_layers(adapter: ModelAdapter, trace: _Trace, layout: TokenLayout) -> None:
    """Each layer of ours behind the host's input of it."""
    half = is_half(trace.logits)
    settings = PassSettings(adapter, InferenceConfig(), layout.lengths)
    tables = adapter.rotary(trace.entered[0].flatten(0, 1)[None], layout.position[:, None], False)
    with routed_attention(adapter.text_config):
        for i, (entered, left) in enumerate(zip(trace.entered, trace.left, strict=True)):
            attend = _Watched(settings, layout, i, None, None)
            ours = through_layer(attend, entered.flatten(0, 1)[None], tables[adapter.layer_kinds[i]], None)
            if attend.window != (adapter.spec.sliding_window if i in adapter.spec.sliding_layers else None):
                raise _differs(adapter, f"layer {i} asks for a window of {attend.window}, which its config does not")
            off = (ours.view_as(left) - left).double().norm(dim=-1)
            added = (left - entered).double().norm(dim=-1)
            rounding = (1 if half else 8) * torch.finfo(left.dtype).eps * left.double().norm(dim=-1)
            # The median of each row: an expert chosen otherwise by a rounding is no fault, a rule left out is in all.
            apart = ((off - rounding).clamp_min(0) / added.clamp_min(1e-30)).median(dim=-1).values.max()
            if not float(apart) <= (HALF_LAYER_BAR if half else LAYER_BAR):
                raise _differs(
                    adapter,
                    f"layer {i} is {float(apart):.2g} of what it adds away from the host's; its attention "
                    "takes something into account that ours does not",
                )


def _host_steps(
    adapter: ModelAdapter, forward: Callable[..., Any], inputs: dict[str, Tensor], trace: _Trace
) -> tuple[Tensor, Tensor]:
    """[B, vocabulary] each, the host's: of a prompt of all tokens but the last, and of that as a decoding step."""
    if not adapter.rotary_follows_length:
        return trace.logits[:, -2], trace.logits[:, -1]
    cache: dict[str, Any] = {CACHE_NAME: DynamicCache()}
    last = {name: inputs[name] if name == "attention_mask" else inputs[name][..., -1:] for name in inputs}
    with rotary_kept(adapter):
        logits = [forward(**x, **cache, use_cache=True, return_dict=True).logits for x in (_prompt_of(inputs), last)]
    return logits[0][:, -1], logits[1][:, -1]


def _prompt_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[..., :-1] for name, x in inputs.items()}


def _check_decoding(adapter: ModelAdapter, inputs: dict[str, Tensor], of_prompt: Tensor, of_step: Tensor) -> None:
    """A prompt of all tokens but the last, and that as a decoding step, against the host's logits of both."""
    with rotary_kept(adapter):
        embeds, layout = adapter.embed(_prompt_of(inputs))
        cache, options = CompressedCache(), PassOptions(TOKENS - 1, last_only=True)
        output = prompt_pass(adapter, InferenceConfig(), embeds, layout, cache, options)
        _check_logits("a prompt", adapter, adapter.logits(output.last), of_prompt)
        last = adapter.entering(adapter.model.get_input_embeddings()(inputs["input_ids"][:, -1:]))
        decoder = Decoder(adapter, InferenceConfig())
        step = decoder.step(last, cache)[:, 0]
        _check_logits("a decoding step", adapter, step, of_step)
        if decoder.records(last.device):
            _check_recorded(adapter, decoder, cache, last)


def _check_recorded(adapter: ModelAdapter, decoder: Decoder, cache: CompressedCache, last: Tensor) -> None:
    """Two steps that are replayed from a CUDA graph, against the modules; where they differ, none is recorded again."""
    for hidden_states in (last.flip(0), last):
        want = Decoder(adapter, InferenceConfig(), record=False).step(hidden_states, cache.clone())
        found = decoder.step(hidden_states, cache)
        if not is_close(found, want, LOGITS_BAR, HALF_LOGITS_BAR):
            refuse(adapter, "a step that was recorded gives other logits than the modules")


def _check_logits(what: str, adapter: ModelAdapter, ours: Tensor, host: Tensor) -> None:
    if not is_close(ours, host, LOGITS_BAR, HALF_LOGITS_BAR):
        raise _differs(adapter, f"the logits of {what} are not the host's")


def _differs(adapter: ModelAdapter, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{full_name(adapter)} is not computed by our pass as by its own: {what}. Nothing was generated; {WAY_OUT}"
    )
