"""How Triton kernels are configured and launched; Triton itself is imported by whoever has a kernel."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from mminfer_kernels.backends import interpreted
from mminfer_kernels.tuned import measured_place

MOST_BLOCKS = 65_535  # of a CUDA grid, along its second and third axis
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
        kernel: a jitted function, or `Configured`.
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
    device, wanted, name = given[0].device, grid, getattr(kernel, "__name__", "the kernel")

    def within_bounds(meta: dict[str, Any]) -> tuple[int, ...]:
        return checked_grid(name, wanted(meta) if callable(wanted) else wanted)

    grid = within_bounds if callable(wanted) else checked_grid(name, wanted)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**tensors, **arguments)


def checked_grid(kernel: str, grid: tuple[int, ...]) -> tuple[int, ...]:
    """The grid. Raises `ValueError` where a GPU has none of this size."""
    if max(grid[1:], default=1) > MOST_BLOCKS:
        raise ValueError(
            f"{kernel} would take a grid of {' x '.join(map(str, grid))}, wanted at most {MOST_BLOCKS} along all axes "
            "but the first: split the batch, or pass backend='reference'"
        )
    return grid


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


class Configured:
    """A jitted kernel and the configs that it may be launched in; every launch takes one at once, none is searched for.

    It takes the one that was measured as the fastest for this architecture, type, head size and class of lengths
    (`mminfer_kernels.tuned`), or else the first that fits.

    Args:
        fn: the kernel.
        configs: `triton.Config`s, the default first.
        fits: told the arguments of a launch and of a config, says whether to take it; where none fits, the last is.
        lengths: arguments by whose size the best config may change.
    """

    def __init__(
        self, fn: Any, configs: list[Any], fits: Callable[[dict[str, Any]], bool], lengths: tuple[str, ...]
    ) -> None:
        self.fn, self.configs, self.lengths = fn, configs, lengths
        self.__name__: str = fn.__name__
        self._fits = fits
        self._constants = [x.name for x in getattr(fn, "params", ()) if x.is_constexpr]
        self._chosen: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: Grid) -> Callable[..., Any]:
        return lambda **arguments: self.fn[grid](**arguments, **self.chosen(arguments).all_kwargs())

    def fitting(self, arguments: dict[str, Any], backend: str | None = None) -> list[Any]:
        """The configs that suit these arguments, the default first; the last one where none does.

        Args:
            arguments: of the launch.
            backend: "cuda" or "hip"; None: that of the device in use.
        """
        if backend is None:
            import triton

            backend = triton.runtime.driver.active.get_current_target().backend
        launched = {**arguments, "backend": backend}
        return [x for x in self.configs if self._fits(launched | x.all_kwargs())] or self.configs[-1:]

    def chosen(self, arguments: dict[str, Any]) -> Any:
        """The config for these arguments; decided once for each of their kinds."""
        if len(self.configs) == 1:
            return self.configs[0]
        kind = self.kind(arguments)
        found = self._chosen.get(kind)
        if found is None:
            fitting = self.fitting(arguments)
            place = measured_place(self.__name__, kind)
            measured = self.configs[place : place + 1] if place is not None else []
            found = self._chosen[kind] = next((x for x in measured if any(x is y for y in fitting)), fitting[0])
        return found

    def kind(self, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """What the choice may rest on: the device's index, types, what is left out, constants, classes of lengths."""
        tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
        left_out = tuple(name for name, x in arguments.items() if x is None)
        sizes = tuple(power_of_two(arguments[name]) for name in self.lengths if name in arguments)
        constants = tuple((name, arguments[name]) for name in self._constants if name in arguments)
        return tensors[0].device.index, tensors[0].dtype, left_out, constants, sizes


def configured(
    configs: list[tuple[dict[str, int], int, int]],
    lengths: tuple[str, ...],
    interpreted_blocks: dict[str, int],
    fits: Callable[[dict[str, Any]], bool],
) -> Callable[[Any], Configured]:
    """Decorator of a jitted kernel: `Configured`, with one config of small blocks where it is interpreted.

    Args:
        configs: block sizes, warps and stages, the default first.
        lengths: as `Configured` takes them.
        interpreted_blocks: the block sizes under the interpreter.
        fits: as `Configured` takes it.
    """
    import triton

    if interpreted():
        candidates = [triton.Config(interpreted_blocks)]
    else:
        candidates = [triton.Config(blocks, num_warps=warps, num_stages=stages) for blocks, warps, stages in configs]
    return lambda fn: Configured(fn, candidates, fits, lengths)
