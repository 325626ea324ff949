"""Ops as `torch.library` custom ops, for whoever watches: torch.compile, and dispatch modes such as a FLOP counter.

A custom op costs 40 microseconds a call on the CPU, which a decoding step of many layers would notice. So a plain call
goes straight to the function, and only a watched one takes the way through the dispatcher.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def traceable(
    fake: Callable[..., Any], flops: Callable[..., int] | None = None, mutates: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Decorator: registers the function as `mminfer::<name>`.

    Args:
        fake: like the function, but only makes outputs of the right shape and dtype.
        flops: like the function, gives the FLOPs; for torch's counter.
        mutates: names of the arguments that the function writes into.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"mminfer::{function.__name__}", function, mutates_args=mutates)
        op.register_fake(fake)
        if flops is not None:
            register_flop_formula(getattr(torch.ops.mminfer, function.__name__), get_raw=True)(_without_output(flops))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return op(*args, **kwargs) if watched() else function(*args, **kwargs)

        return call

    return register


def _without_output(flops: Callable[..., int]) -> Callable[..., int]:
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return flops(*args, **kwargs)

    return formula


def watched() -> bool:
    """Whether torch.compile or a dispatch mode looks on."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
