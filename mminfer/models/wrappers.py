"""Models as they are handed over: which wrappers are looked through, and which models are refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mminfer.errors import UnsupportedModelError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unwrapped(model: Any) -> Any:
    """The host model itself, where a wrapper passes calls on to it; anything that is no wrapper as it is.

    Looked through are `torch.compile(model)`, and adapters of peft that change the model's own layers, as LoRA does.

    Raises:
        UnsupportedModelError: another wrapper, or one that adds to prompts or caches.
    """
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        if "_orig_mod" in model._modules:  # torch.compile's
            model = model._orig_mod
        elif type(model).__module__.startswith("peft."):
            model = _without_adapters(model)
        else:
            _refuse_wrapper(model)
            break
    return model


def named_dtypes() -> str:
    """Those that passes can be made in, for messages."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def check_loaded(model: Any) -> None:
    """Raises `UnsupportedModelError` where a model holds no numbers that passes can be made with.

    Weights may be elsewhere if accelerate's hooks bring them in time.
    """
    if model.dtype not in DTYPES:
        raise UnsupportedModelError(
            f"the model is of dtype {model.dtype}: wanted one of {named_dtypes()}; load it with dtype="
        )
    if hasattr(model, "_hf_hook"):
        return
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and not hasattr(module, "_hf_hook"):
                where = f"{name}.{own}" if name else own
                raise UnsupportedModelError(
                    f"{where} is on the meta device, which holds no numbers: load the weights first, "
                    "by from_pretrained or load_state_dict(..., assign=True)"
                )


def check_layers(layers: Any) -> None:
    """Raises `UnsupportedModelError` where decoder layers are compiled, since a pass must look into them."""
    for i, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
                where = f"decoder layer {i}" + (f" ({name})" if name else "")
                raise UnsupportedModelError(
                    f"{where} runs under torch.compile, which would not see what a pass changes in it: pass the model "
                    "uncompiled, and decode compiled by compile=True"
                )


def _without_adapters(model: Any) -> Any:
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            raise UnsupportedModelError(
                f"adapter {name!r} ({getattr(config, 'peft_type', None)}) of the {type(model).__name__} adds to "
                "prompts or caches outside of the layers: wanted LoRA or another that changes the layers; drop it, or "
                "generate with the model as it is"
            )
    return model.get_base_model() if hasattr(model, "get_base_model") else model.model


def _refuse_wrapper(model: nn.Module) -> None:
    """Raises `UnsupportedModelError` if there is a host model right beneath this one."""
    for name, inner in model.named_children():
        if isinstance(inner, PreTrainedModel):
            kind = type(model).__name__
            sharded = "FullyShardedDataParallel" in kind
            way_out = "load it unsharded" if sharded else f"pass the model in it, its .{name}"
            raise UnsupportedModelError(f"{kind} wraps a {type(inner).__name__}: {way_out}")
