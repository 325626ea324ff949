"""Whether a model's layers are built as techniques take them: found out on a short prompt, before any pass."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.errors import ConfigError
from mminfer.forward.attention import routed_attention
from mminfer.forward.branches import ffn_branch
from mminfer.forward.layer_attention import LayerAttention, PassSettings
from mminfer.forward.probe import TOKENS, full_name, is_close, probe
from mminfer.forward.rotary import fractional, frequency_factors
from mminfer.forward.rows import through_layer
from mminfer.models.adapter import ModelAdapter
from mminfer.models.structure import running_device


def check_positions(adapter: ModelAdapter, config: InferenceConfig) -> None:
    """Whether angles that we form are the host's where positions are whole, and scaled frequencies fit."""
    like = torch.empty(
        1, TOKENS, 1, dtype=adapter.model.dtype, device=running_device(adapter.model.get_input_embeddings())
    )
    position = torch.arange(TOKENS, dtype=torch.float64, device=like.device).expand(adapter.position_axes, 1, -1)
    try:
        ours, host = adapter.rotary(like, position, True), adapter.rotary(like, position, False)
        same = all(is_close(a, b, 1e-4, 0.02) for kind in host for a, b in zip(ours[kind], host[kind], strict=True))
        factors = frequency_factors(config, adapter.spec, float(adapter.spec.max_position_embeddings) * 2)
        adapter.rotary(like, position, fractional(config), factors)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{type(config.positions).__name__}: the rotary embedding of {full_name(adapter)} takes no other positions "
            f"or frequencies: {str(error)[:200]}"
        ) from error
    if not same:
        raise ConfigError(
            f"{type(config.positions).__name__}: {full_name(adapter)} orders its rotary angles in a way that is not "
            "supported; leave positions at None"
        )


def check_skip(adapter: ModelAdapter, config: InferenceConfig) -> None:
    """Whether rows that skip an operator leave the others as they were, in every layer that skips one."""
    skip, depth = config.skip, len(adapter.layers)
    if skip is None:
        return
    embeds, layout = adapter.embed(probe(adapter))
    every_second = torch.arange(len(layout), device=layout.modality.device) % 2
    layout = replace(layout, modality=every_second.to(layout.modality), host=None)
    settings = PassSettings(adapter, config, layout.lengths)
    tables = adapter.rotary(embeds[None], layout.position[:, None], False)

    def run(i: int, queries: Tensor | None = None, ffn: Tensor | None = None) -> Tensor:
        attend = LayerAttention(replace(settings, config=InferenceConfig(skip=skip)), layout, i, queries, None)
        return through_layer(attend, embeds[None], tables[adapter.layer_kinds[i]], ffn)

    with routed_attention(adapter.text_config):
        for i, layer in enumerate(adapter.layers):
            queries, ffn = skip.apply(layout, i, depth)
            if queries is None and ffn is None:
                continue
            name = f"{type(skip).__name__}: layer {i} of {full_name(adapter)} ({type(layer).__name__})"
            if ffn is not None and ffn_branch(layer, partial(run, i)) is None:
                raise ConfigError(f"{name} has no FFN in a branch of its own: rows cannot leave it out")
            try:
                spared = run(i, queries, ffn)
            except Exception as error:
                raise ConfigError(
                    f"{name} cannot leave rows out: {type(error).__name__}: {str(error)[:200]}"
                ) from error
            kept = layout.text_rows
            if not is_close(spared[0, kept], run(i)[0, kept], 1e-4, 0.02):
                raise ConfigError(f"{name} is changed for text as well when visual rows leave an operator out")


def check_replay(adapter: ModelAdapter, config: InferenceConfig) -> None:
    """Whether rows may go by a second time, further out; it is found out where each layer's FFN stands.

    Raises:
        ConfigError: the host's rotary frequencies follow the longest position that it has seen.
    """
    if adapter.rotary_follows_length:
        raise ConfigError(
            f"{type(config.cache).__name__} runs rows again at positions behind the prompt, and the rotary frequencies "
            f"of {full_name(adapter)} follow the longest position seen: use LookM or Digest, which run nothing again"
        )
    embeds, layout = adapter.embed(probe(adapter))
    tables = adapter.rotary(embeds[None], layout.position[:, None], False)

    def run(i: int) -> Tensor:
        attend = LayerAttention(PassSettings(adapter, InferenceConfig(), layout.lengths), layout, i, None, None)
        return through_layer(attend, embeds[None], tables[adapter.layer_kinds[i]], None)

    with routed_attention(adapter.text_config):
        for i, layer in enumerate(adapter.layers):
            ffn_branch(layer, partial(run, i))
