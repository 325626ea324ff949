"""How Triton kernels are tuned and launched; Triton itself is imported by whoever has a kernel."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from mminfer_kernels.backends import interpreted

SMALLEST_BUCKET = 16  # `tl.dot` takes nothing smaller
SHARED_BYTES = {"cuda": 160 * 1024, "hip": 48 * 1024}  # A100's; of MI300's 64 KiB some turn layouts around

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]


@dataclass(frozen=True)
class Launch:
    """A kernel launch that was recorded and not run."""

    kernel: Any
    grid: Grid
    arguments: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("mminfer_kernels_launches", default=None)


def launch(kernel: Any, grid: Grid, tensors: dict[str, torch.Tensor | None], **arguments: Any) -> None:
    """Run a kernel on its tensors' device, unless launches are being recorded.

    Args:
        kernel: a jitted or autotuned function.
        grid: number of programs along each axis, or a function that tells it from the kernel's arguments.
        tensors: its pointer arguments by name; None compiles the argument away.
        arguments: its other arguments by name.
    """
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, {**tensors, **arguments}))
        return
    given = [x for x in tensors.values() if x is not None]
    if interpreted() and any(x.dtype == torch.bfloat16 for x in given):
        raise TypeError("Triton's interpreter is silently wrong in bfloat16, wanted float32: see `interpretable`")
    device = given[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**tensors, **arguments)


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Yield a list that fills with the launches inside, none of which runs: what the ops return then is not filled."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def interpretable(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, bfloat16 turned to float32 where kernels are interpreted."""
    if not interpreted():
        return tensors
    return tuple(x.float() if x.dtype == torch.bfloat16 else x for x in tensors)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if the elements of its last dimension do not lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: torch.Tensor | None, letters: str) -> dict[str, int]:
    """Strides of the leading dimensions by name: "qbh" gives stride_qb and stride_qh; of no tensor 0."""
    tensor, dimensions = letters[0], letters[1:]
    sizes = (0,) * len(dimensions) if x is None else x.stride()
    return {f"stride_{tensor}{letter}": size for letter, size in zip(dimensions, sizes, strict=False)}


def power_of_two(n: int, least: int = SMALLEST_BUCKET) -> int:
    """The smallest power of two that is `n` and `least` or more."""
    return max(least, 1 << (max(n, 1) - 1).bit_length())


def tile_fits(arguments: dict[str, Any], x: torch.Tensor, held: int, streamed: int, depth: int) -> bool:
    """Whether a kernel that multiplies tiles of `x` suits this machine and dtype.

    float32 products are sums of single multiplications, exact to float32, that hold whole rows in registers: only
    small tiles do not spill. The others go through tensor cores, which want large ones.

    Args:
        arguments: of the launch and the config, and "backend", "cuda" or "hip".
        x: one of the operands.
        held, streamed: rows of the tile that stays and of the tile that each step loads.
        depth: elements of a row.
    """
    if x.dtype == torch.float32:
        return max(held, streamed) <= (32 if depth <= 64 else 16)
    # on AMD what stays lies in registers, and so does the last stage
    stages = arguments["num_stages"]
    rows = streamed * (stages - 1) if arguments["backend"] == "hip" else held + streamed * stages
    needed = rows * depth * x.element_size()
    return min(held, streamed) >= 32 and needed <= SHARED_BYTES[arguments["backend"]]


def autotuned(
    configs: list[tuple[dict[str, int], int, int]],
    key: list[str],
    interpreted_blocks: dict[str, int],
    fits: Callable[[dict[str, Any]], bool],
    restored: tuple[str, ...] = (),
) -> Callable[[Any], Any]:
    """Decorator of a jitted kernel: `triton.autotune`, with one config of small blocks where it is interpreted.

    Args:
        configs: block sizes, warps and stages, the default first.
        key: arguments whose change starts a new search.
        interpreted_blocks: the block sizes under the interpreter.
        fits: told the arguments of the launch and of a config, says whether to try it; where no config fits the last
            one is taken.
        restored: tensors that the kernel may add to, put back after every trial.
    """
    import triton

    def fitting(configs: list[Any], named: dict[str, Any], **arguments: Any) -> list[Any]:
        backend = triton.runtime.driver.active.get_current_target().backend
        launched = {**named, **arguments, "backend": backend}
        return [x for x in configs if fits(launched | x.all_kwargs())] or configs[-1:]

    if interpreted():
        return triton.autotune([triton.Config(interpreted_blocks)], key)
    candidates = [triton.Config(blocks, num_warps=warps, num_stages=stages) for blocks, warps, stages in configs]
    return triton.autotune(
        candidates, key, prune_configs_by={"early_config_prune": fitting}, restore_value=list(restored)
    )
