"""Which modules of a host's layer are its FFN branch: found by watching one run of the layer."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Branch = tuple[str, str]
_branches: WeakKeyDictionary[nn.Module, Branch | None] = WeakKeyDictionary()


class _Called(NamedTuple):
    """One call of a module that stands directly in a layer.

    Args:
        name: the module's.
        given: [1, T, C], what it was given; None: no such tensor.
        output: [1, T, C]; None: no such tensor.
    """

    name: str
    given: Tensor | None
    output: Tensor | None


def ffn_branch(layer: nn.Module, run: Callable[[], Tensor] | None = None) -> Branch | None:
    """First and last module of the layer's FFN branch: rows left out between them keep the residual stream as it was.

    Args:
        layer: of the host.
        run: runs the layer on a few rows, [1, T, C] behind it; called once for each layer. None: it was.

    Returns:
        Their names; None: the FFN does not stand alone in a branch that is added to the stream.
    """
    if layer not in _branches and run is not None:
        _branches[layer] = _found(layer, run)
    return _branches.get(layer)


def _found(layer: nn.Module, run: Callable[[], Tensor]) -> Branch | None:
    calls, behind = _watched(layer, run)
    names = [call.name for call in calls]
    if "self_attn" not in names or len(set(names)) != len(names):
        return None
    after_attention, last = calls[names.index("self_attn") + 1 :], calls[-1]
    for call in after_attention:
        if call.given is not None and last.output is not None and _adds(call.given, last.output, behind):
            return call.name, last.name
    return None


def _watched(layer: nn.Module, run: Callable[[], Tensor]) -> tuple[list[_Called], Tensor]:
    """The calls of the layer's own modules in order, and what came out behind the layer."""
    calls: list[_Called] = []
    thread = get_ident()

    def watch(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if get_ident() != thread:  # somebody else's pass
                return
            given = args[0].clone() if args and isinstance(args[0], Tensor) else None
            calls.append(_Called(name, given, output.clone() if isinstance(output, Tensor) else None))

        return after

    handles = [module.register_forward_hook(watch(name)) for name, module in layer.named_children()]
    try:
        return calls, run()
    finally:
        for handle in handles:
            handle.remove()


def _adds(stream: Tensor, branch: Tensor, behind: Tensor) -> bool:
    """Whether `behind` is the stream plus some multiple of what the branch gave."""
    if not stream.shape == branch.shape == behind.shape:
        return False
    added, given = (behind.double() - stream.double()).flatten(), branch.double().flatten()
    factor = added.dot(given) / given.dot(given).clamp_min(torch.finfo(torch.float64).tiny)
    tolerance = 8 * torch.finfo(behind.dtype).eps * float(behind.double().norm() + stream.double().norm())
    return float(factor) != 0 and float((added - factor * given).norm()) <= tolerance
