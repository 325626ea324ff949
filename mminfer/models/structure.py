"""Whether a host's language model is built as the passes run it, and what its modules ask for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mminfer.errors import UnsupportedModelError


def check_structure(language_model: Any) -> None:
    """Raises `UnsupportedModelError` unless these are decoder layers between a rotary embedding and a norm.

    Args:
        language_model: the host's.
    """
    name = type(language_model).__name__
    missing = [part for part in ("layers", "norm", "rotary_emb") if getattr(language_model, part, None) is None]
    if missing or len(language_model.layers) == 0:
        raise UnsupportedModelError(
            f"{name} has no {', '.join(missing) or 'layer'}: supported are stacks of decoder layers between a rotary "
            "embedding and a norm, as Llama's"
        )
    first: Any = getattr(language_model.layers[0], "self_attn", None)
    for i, layer in enumerate(language_model.layers):
        attention = getattr(layer, "self_attn", None)
        if attention is None or getattr(attention, "config", None) is None or attention.config is not first.config:
            raise UnsupportedModelError(
                f"layer {i} of {name} ({type(layer).__name__}) has no self_attn that reads the model's text config: "
                "supported are layers of attention throughout"
            )


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of the forward that the module's class has."""
    return inspect.signature(type(module).forward).parameters


def running_device(module: nn.Module) -> torch.device:
    """Where a module's inputs are wanted: its weights may lie elsewhere until it runs (accelerate's offloading).

    Raises:
        UnsupportedModelError: its weights are nowhere.
    """
    execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    device = torch.device(execution) if execution is not None else next(module.parameters()).device
    if device.type == "meta":
        raise UnsupportedModelError("the model's weights are on the meta device, where there are none: load them")
    return device


def wants_positions(attention: nn.Module) -> bool:
    """Whether an attention cannot do without its rows' positions."""
    found = parameters_of(attention).get("position_ids")
    return found is not None and found.default is found.empty
