"""How much entries can write: what a layer's output projection makes of their values, beside what attention writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

SAMPLE = 32  # rows of a stretch whose outputs are projected, to say how much attention writes
TINY = torch.finfo(torch.float32).tiny


class OutputWeights:
    """A layer's output projection, head by head.

    Args:
        project: of the outputs of all heads, side by side.
        heads: query heads, H.
        like: [..., D], values, by whose width and type it is asked where its weights cannot be read.
    """

    def __init__(self, project: nn.Module, heads: int, like: Tensor) -> None:
        self._project = project
        weight = _weight(project, heads * like.shape[-1], like).unflatten(1, (heads, -1)).transpose(0, 1)  # [H, C, D]
        with torch.autocast(like.device.type, enabled=False):
            weight = weight.float()
            self._products = weight.mT @ weight  # [H, D, D]
        self._shape = heads, *weight.shape[1:]

    def flops(self, values: int, outputs: int) -> int:
        """What `written` takes of so many of both, and getting ready for one sequence."""
        heads, channels, width = self._shape
        return 2 * heads * width * (width * (channels + values) + outputs * channels)

    def written(self, values: Tensor, outputs: Tensor) -> Tensor:
        """[G, n] float32: what each value writes by itself, by the query head of its group that makes most of it.

        In units of the geometric mean of two scales: what a value writes on average, and what attention writes to a
        middling row. By the first alone all layers would count alike; by the second alone those count too much whose
        rows read a mean of many values, which is short.

        Args:
            values: [G, n, D].
            outputs: of attention among these, [H, R, D].
        """
        norms = self.norms(values)
        return norms / (norms.mean() * self.usual(outputs)).sqrt().clamp_min(TINY)

    def norms(self, values: Tensor) -> Tensor:
        """[G, n] float32: of what values [G, n, D] write."""
        return self.squares(values).clamp_min(0).sqrt()

    def squares(self, values: Tensor) -> Tensor:
        """[G, n] float32: these norms squared; rounding may leave some below 0."""
        width = self._shape[2]
        products = self._products.view(len(values), -1, width)  # [G, H / G * D, D], each of which is symmetric
        with torch.autocast(values.device.type, enabled=False):
            wide = values.float()
            turned = (wide @ products.mT).unflatten(2, (-1, width))  # [G, n, H / G, D]
            if values.device.type == "cpu":
                return turned.mul_(wide[:, :, None]).sum(-1).amax(2)
            return (turned @ wide[..., None])[..., 0].amax(2)  # one launch for both, and none of these numbers twice

    def usual(self, outputs: Tensor) -> Tensor:
        """[] float32: of what attention writes to a middling row."""
        return self.lengths(outputs.transpose(0, 1).flatten(1)).median()

    def lengths(self, rows: Tensor) -> Tensor:
        """[n] float32: how much attention writes to rows whose heads' outputs are these, [n, H * D]."""
        written = self._project(rows[None])[0]
        dtype = torch.promote_types(written.dtype, torch.float32)
        return torch.linalg.vector_norm(written, dim=-1, dtype=dtype).float()


def output_weights(attention: nn.Module, heads: int, like: Tensor) -> OutputWeights | None:
    """Of the attention of a host's layer; None where it has no projection that is known by its name."""
    project = getattr(attention, "o_proj", None)
    return OutputWeights(project, heads, like) if isinstance(project, nn.Module) else None


def sampled(outputs: Sequence[Tensor]) -> Tensor:
    """[H, n, D]: some of the rows of outputs [1, H, n', D], evenly spread over all of them."""
    every = sample_step(sum(part.shape[2] for part in outputs))
    return torch.cat([part[0, :, ::every] for part in outputs], 1)


def sample_step(rows: int) -> int:
    """How far apart those of so many rows are that say how much attention writes."""
    return max(-(-rows // SAMPLE), 1)


class Segments(NamedTuple):
    """What is known of one stretch's entries in one layer until all layers are through.

    Args:
        squares: [G, n] float32, of `OutputWeights.squares`.
        lengths: [m] float32, of `OutputWeights.lengths`.
    """

    squares: Tensor
    lengths: Tensor


def written_together(segments: Sequence[Segments]) -> list[Tensor]:
    """`OutputWeights.written` of many stretches and layers, in as many launches as one takes.

    Returns:
        [G, n] float32 of each.
    """
    sizes, counts = ([x.shape[-1] for x in column] for column in zip(*segments, strict=True))
    device = segments[0].squares.device
    norms = torch.cat([x.squares for x in segments], 1).clamp_min_(0).sqrt_()
    mean = _padded(norms.sum(0), sizes, 0.0).sum(1) / _there([n * len(norms) for n in sizes], device)
    usual = _padded(torch.cat([x.lengths for x in segments]), counts, torch.nan).nanmedian(1).values
    unit = (mean * usual).sqrt_().clamp_min_(TINY)
    own = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return list((norms / unit[own.to(device, non_blocking=True)]).split(sizes, 1))


def _padded(flat: Tensor, sizes: Sequence[int], filling: float) -> Tensor:
    """[S, n]: parts of so many numbers in turn, a row each, filled up."""
    starts = torch.tensor(sizes).cumsum(0)[:, None] - torch.tensor(sizes)[:, None]
    turn = torch.arange(max(sizes))
    places = (starts + turn).where(turn < torch.tensor(sizes)[:, None], len(flat))
    return torch.nn.functional.pad(flat, (0, 1), value=filling)[places.to(flat.device, non_blocking=True)]


def _there(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)


def _weight(project: nn.Module, width: int, like: Tensor) -> Tensor:
    """[C, width]: read, or asked for by rows that are 1 in one place, where it is quantized, elsewhere or wrapped."""
    if _is_plain(project) and project.weight.is_floating_point() and not project.weight.is_meta:
        return project.weight.detach()
    ones = torch.eye(width, dtype=like.dtype, device=like.device)
    asked: Tensor = project(torch.cat([ones, torch.zeros_like(ones[:1])])[None])[0]  # as layers ask: [B, N, C]
    return (asked[:-1] - asked[-1:]).mT


def _is_plain(project: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether its weights are all there is to it: no hook, and no forward of its own, adds to what it gives."""
    hooked = project._forward_hooks or project._forward_pre_hooks or "forward" in vars(project)
    return type(project) is nn.Linear and not hooked
