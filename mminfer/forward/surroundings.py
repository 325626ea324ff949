"""What stands around the layers of a host model: its own forwards and hooks, which a pass does not go through.

A comparison of passes holds for what it saw. Whatever was put there afterwards makes a new one due; and what a forward
that is not the library's does to visual rows, which a short text cannot show, is looked at where such rows come in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mminfer.errors import UnsupportedModelError
from mminfer.forward.probe import full_name, is_close, kept_attributes
from mminfer.layout import TokenLayout
from mminfer.models.adapter import ModelAdapter
from mminfer.models.entry import entering_states

# Whose forwards and hooks leave the numbers as they are.
_KNOWN = ("transformers", "accelerate", "torch", "peft", "mminfer")


def surroundings(adapter: ModelAdapter, forward: Callable[..., Any]) -> str:
    """Another text for each state of what a pass goes around, and of what it reads of the config.

    Hooks on the model itself run around a pass as around the host's own, so they do not count.

    Args:
        adapter: the host model.
        forward: its own.

    Raises:
        UnsupportedModelError: the model has another language model, or other layers, than the adapter knows.
    """
    language_model, config = getattr(adapter.base, adapter.language_model_name), adapter.text_config
    if language_model is not adapter.language_model or language_model.layers is not adapter.layers:
        raise UnsupportedModelError(
            f"the language model of this {type(adapter.model).__name__} was replaced, or its list of layers: make the "
            "engine, or set the patch, afterwards"
        )
    modules = {"base": adapter.base, "language_model": language_model}
    found = {name: [id(type(m)), id(vars(m).get("forward")), _hooks(m)] for name, m in modules.items()}
    read = [getattr(config, name, None) for name in ("num_hidden_layers", "sliding_window", "layer_types")]
    return f"{id(getattr(forward, '__func__', forward))} {found} {read} {len(adapter.layers)}"


def _hooks(module: nn.Module) -> list[int]:
    """Their numbers, which torch gives out once."""
    return [*module._forward_hooks, *module._forward_pre_hooks]


def has_foreign_forward(adapter: ModelAdapter) -> bool:
    """Whether the model, or the one beneath its head, runs or is hooked by code that is none of the libraries'."""
    kinds = [type(adapter.model).forward, type(adapter.base).forward]
    own = [vars(adapter.base).get("forward")]
    hooks = [*adapter.base._forward_hooks.values(), *adapter.base._forward_pre_hooks.values()]
    return any(_is_foreign(code) for code in (*kinds, *own, *hooks))


def _is_foreign(code: Any) -> bool:
    if code is None:
        return False
    code = getattr(code, "func", code)  # of a partial
    module = getattr(code, "__module__", None) or type(code).__module__
    return module.split(".")[0] not in _KNOWN


@torch.no_grad()
def check_entrance(
    adapter: ModelAdapter,
    forward: Callable[..., Any],
    inputs: Mapping[str, Any],
    embeds: Tensor,
    layout: TokenLayout,
) -> None:
    """Whether a host's first layer is given what our pass gives it for these inputs; nothing but embeddings is run.

    Args:
        adapter: the host model.
        forward: its own.
        inputs: of a prompt with images or videos.
        embeds: [T, C], packed.
        layout: of these rows.

    Raises:
        UnsupportedModelError: it is given something else.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
    given = {**inputs, "attention_mask": mask, "use_cache": False}
    given = {name: value for name, value in given.items() if name not in ("cache", "past_key_values")}
    with kept_attributes(adapter.base, adapter.host_state):
        hidden = entering_states(adapter.language_model, lambda: forward(**given))
    rows = hidden[mask.bool().to(hidden.device)]
    if rows.shape != embeds.shape or not is_close(embeds, rows, 1e-3, 0.02):
        raise UnsupportedModelError(
            f"{full_name(adapter)} has a forward or a hook of its own that gives the layers other rows for these "
            f"{len(layout.visual_rows)} visual tokens than our pass does: change what its get_image_features or "
            "get_video_features give instead, which a pass calls; verify=False turns this comparison off"
        )
