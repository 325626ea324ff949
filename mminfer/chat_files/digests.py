"""Digests of what made a chat: of weights, of a tokenizer, of a template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED_BYTES = 2**24  # of all weights together
STRETCHES = 16  # in which the bytes of one tensor are taken
# Settings of a language model that its weights do not tell: fields whose names hold one of these.
_SETTINGS = ("rope", "theta", "scal", "multiplier", "softcap", "eps", "act", "window", "layer_types", "bias", "norm")
_PROBE = "The café of 東京, 3.14 + \t[x]\n\n don't_STOP 🙂 Привет ab12"


def digest_of(*parts: bytes) -> str:
    """Sixteen hex digits over these bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """Of a sample of every tensor of a model: the same on every device, another where an adapter was merged.

    Weights that lie elsewhere (offloaded by accelerate) are taken from there; of such as cannot be had the shape
    counts. What is taken is `SAMPLED_BYTES` at most, in stretches over each tensor: a few milliseconds.
    """
    named = list(_named_tensors(model))
    budget = SAMPLED_BYTES // max(len(named), 1)
    found = hashlib.sha256(json.dumps(list(_adapters(model))).encode())
    for name, tensor in named:
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for part in _plain_parts(tensor):
            for stretch in _stretches(part, budget):
                found.update(stretch)
    return found.hexdigest()[:16]


def settings_digest(text_config: Any) -> str:
    """Of the settings of a language model that neither its weights nor its geometry tell."""
    data = text_config.to_dict()
    kept = {name: data[name] for name in sorted(data) if any(part in name for part in _SETTINGS)}
    return digest_of(json.dumps(kept, default=str).encode())


def tokenizer_digest(tokenizer: Any) -> str:
    """Of a vocabulary, and of how a text of many scripts is cut by it."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    try:
        cut = list(tokenizer(_PROBE, add_special_tokens=False).input_ids)
    except Exception:  # tokenizers raise anything
        cut = []
    special = [str(token) for token in getattr(tokenizer, "all_special_tokens", [])]
    return digest_of(json.dumps([vocabulary, cut, special]).encode())


def template_digest(processor: Any) -> str:
    """Of a chat template and of what stands for media in it."""
    templates = [getattr(owner, "chat_template", None) for owner in (processor, processor.tokenizer)]
    marks = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video")]
    return digest_of(json.dumps([templates, marks], default=str).encode())


def media_digest(processor: Any) -> str:
    """Of how a processor makes pixels of media: the same picture is read in another way where that differs."""
    owners: list[Any] = [getattr(processor, f"{kind}_processor", None) for kind in ("image", "video")]
    settings = [owner.to_dict() if hasattr(owner, "to_dict") else str(type(owner)) for owner in owners]
    return digest_of(json.dumps(settings, default=str, sort_keys=True).encode())


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and saved buffer once, under a name that wrapping does not change."""
    seen: set[int] = set()
    for place, module in model.named_modules():
        unsaved: set[str] = getattr(module, "_non_persistent_buffers_set", set())
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in unsaved or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            full = f"{place}.{name}".replace("_orig_mod.", "").lstrip(".")
            yield full, _offloaded(module, name) if tensor.is_meta else tensor


def _offloaded(module: nn.Module, name: str) -> Tensor:
    """A weight that accelerate keeps elsewhere while it is not used."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        try:
            found = one.weights_map[name]
        except (AttributeError, KeyError, TypeError):
            continue
        if isinstance(found, Tensor):
            return found
    tensor: Tensor = getattr(module, name)
    return tensor


def _adapters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Which adapters are in force and how strongly, where a layer has any."""
    for place, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "scaling"):
            state = [module.active_adapters, getattr(module, "disable_adapters", None), module.scaling]
            yield place.replace("_orig_mod.", ""), repr(state)


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's numbers: a quantised or distributed one is made of others."""
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        yield from _plain_parts(tensor.to_local())
    elif hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _plain_parts(getattr(tensor, name))
    elif not tensor.is_meta and tensor.layout is torch.strided and not tensor.is_quantized:
        yield tensor


def _stretches(tensor: Tensor, budget: int) -> Iterator[Any]:
    """Bytes of a tensor: all of them, or `budget` of them in stretches from its first to its last element."""
    flat = tensor.reshape(-1)
    length = max(1, budget // flat.element_size() // STRETCHES)
    if flat.numel() <= length * STRETCHES:
        yield _bytes_of(flat)
        return
    step = (flat.numel() - length) / (STRETCHES - 1)
    taken = [flat[int(i * step) : int(i * step) + length] for i in range(STRETCHES)]
    yield _bytes_of(torch.cat(taken))


def _bytes_of(flat: Tensor) -> Any:
    return flat.cpu().contiguous().view(torch.uint8).numpy()
