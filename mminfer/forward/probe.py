"""A short prompt on which a model is looked at, and the model's state around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mminfer.forward.turns import undone
from mminfer.models.adapter import ModelAdapter
from mminfer.models.structure import running_device

ROWS, TOKENS = 2, 12


def probe(adapter: ModelAdapter) -> dict[str, Tensor]:
    """Two rows of text, the second at the last positions that the model was made for."""
    device, config, spec = running_device(adapter.model.get_input_embeddings()), adapter.model.config, adapter.spec
    special = {value for part in (config, adapter.text_config) for value in vars(part).values() if type(value) is int}
    plain = [i for i in range(min(spec.vocab_size, 2000)) if i not in special] or [0]
    ids = torch.tensor([plain[(i * 7919 + 13) % len(plain)] for i in range(ROWS * TOKENS)], device=device)
    first = torch.tensor([0, max(0, spec.max_position_embeddings - TOKENS)], device=device)
    positions = first[:, None] + torch.arange(TOKENS, device=device)
    if spec.position_axes > 1:
        positions = positions.expand(spec.position_axes, -1, -1)
    ids = ids.view(ROWS, TOKENS)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and every module back in its own behind the `with` block."""
    training = [module for module in model.modules() if module.training]
    with undone(lambda: _set_training(training, True)):
        _set_training(training, False)
        yield


def _set_training(modules: Sequence[nn.Module], mode: bool) -> None:
    for module in modules:
        module.training = mode


@contextmanager
def kept_attributes(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """These attributes of a module as they were behind the `with` block."""
    before = {name: getattr(module, name) for name in names}

    def put_back() -> None:
        for name, value in before.items():
            setattr(module, name, value)

    with undone(put_back):
        yield


@contextmanager
def rotary_kept(adapter: ModelAdapter) -> Iterator[None]:
    """The rotary embedding as it was behind the `with` block: some remember the longest prompt they have seen."""
    rotary: Any = adapter.language_model.rotary_emb
    attributes, buffers = dict(vars(rotary)), dict(rotary._buffers)

    def put_back() -> None:
        vars(rotary).update(attributes)
        rotary._buffers.clear()
        rotary._buffers.update(buffers)

    with undone(put_back):
        yield


def is_close(ours: Tensor, host: Tensor, bar: float, half_bar: float) -> bool:
    """Whether they differ by so small a part of the host's, by norm; what is infinite must be so in both."""
    ours, theirs, same = _finite(ours, host)
    return same and float((ours - theirs).norm()) <= (half_bar if is_half(host) else bar) * float(theirs.norm())


def is_same(ours: Tensor, host: Tensor) -> bool:
    """Whether each number is the host's but for some rounding, as where one module was run twice on the same rows."""
    ours, theirs, same = _finite(ours, host)
    eps = max(torch.finfo(host.dtype).eps, 1e-4)
    bar = eps * (4 * theirs.abs() + 2 * theirs.square().mean().sqrt())
    return same and bool(((ours - theirs).abs() <= bar).all())


def _finite(ours: Tensor, host: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Both in float64 with zeros where the host's are infinite, and whether ours are so there; on the host's device."""
    ours, theirs = ours.to(host.device).double(), host.double()
    infinite = theirs.isinf()
    same = torch.equal(ours[infinite], theirs[infinite])
    return ours.masked_fill(infinite, 0), theirs.masked_fill(infinite, 0), same


def is_half(x: Tensor) -> bool:
    return x.dtype.itemsize < 4


def full_name(adapter: ModelAdapter) -> str:
    return f"{type(adapter.language_model).__name__} in {type(adapter.model).__name__}"
