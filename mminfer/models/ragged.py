"""Vision towers that are given some of a picture's patches: rows leave ahead of their layers, and come back behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mminfer.cells import CellGrid, standing_cells
from mminfer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from mminfer.models.vision import VisionTower, VisionWork
    from mminfer.technique import TowerTechnique


class RaggedTower(ABC):
    """Stands where a host's model has its tower, for one call of its encoder, and runs that on fewer rows.

    It gives what the tower gives for whole pictures: patches that left have the rows of those that stand for them.
    Where none leaves, it is the tower.

    Attributes:
        owner: [N] int64, the cell that stands for each of the call's; None: all for themselves, or nothing was called.
        work: what the call took; None: nothing was called.

    Args:
        tower: how the tower is built.
        technique: chooses what leaves.
        whole: what encoding whole pictures would take.
        frames: how many of the tower's pictures are frames of one video; 1: they are images.
    """

    def __init__(self, tower: VisionTower, technique: TowerTechnique, whole: VisionWork, frames: int = 1) -> None:
        self._tower, self._technique, self._whole, self._frames = tower, technique, whole, frames
        self._module: Any = tower.part(tower.module)
        self.owner: Tensor | None = None
        self.work: VisionWork | None = None

    def __getattr__(self, name: str) -> Any:
        """What the host reads of its tower beside calling it."""
        return getattr(self.__dict__["_module"], name)

    def __call__(self, pixel_values: Tensor, **given: Any) -> Any:
        self.work = self._whole
        found = self.cells(pixel_values, given)
        if found is not None:
            self.owner = standing_cells(self._technique, *found)
        if found is None or self.owner is None:
            return self._module(pixel_values, **given)
        output, self.work = self.run(pixel_values, given, found[1], self.owner)
        return output

    def check_rows(self, found: int, wanted: int) -> None:
        """Raises `UnsupportedModelError` where the host's tower ran another number of rows than it was to run."""
        if found != wanted:
            raise UnsupportedModelError(
                f"{type(self._module).__name__} gave {found} rows where {wanted} were to go through it, as a compiled "
                f"or replaced tower may: {type(self._technique).__name__} needs the host's own; leave tower=None"
            )

    @abstractmethod
    def cells(self, pixels: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, CellGrid] | None:
        """[N, P], the pixels of each cell, and their grid; None where they make no whole cells."""

    @abstractmethod
    def run(self, pixels: Tensor, given: Mapping[str, Any], grid: CellGrid, owner: Tensor) -> tuple[Any, VisionWork]:
        """What the host's tower gives, and what it took; owner: [N] int64, on the CPU."""


class FixedGridTower(RaggedTower):
    """Towers of CLIP's build, in a batch of pictures of one size: those with as many rows run together."""

    def cells(self, pixels: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, CellGrid] | None:
        side, patch = self._tower.cell_side, self._tower.patch_sides[-1]
        count, _, height, width = pixels.shape
        rows, columns = height // patch, width // patch
        if rows % side or columns % side or count % self._frames:
            return None
        found = cut(pixels[..., : rows * patch, : columns * patch], side * patch)
        return found, CellGrid(((self._frames, rows // side, columns // side),) * (count // self._frames))

    def run(self, pixels: Tensor, given: Mapping[str, Any], grid: CellGrid, owner: Tensor) -> tuple[Any, VisionWork]:
        count, (_, high, wide) = len(pixels), grid.sizes[0]
        first = int(self._tower.part(self._tower.class_token) is not None)
        patches = patch_owners(owner.view(count, high, wide), self._tower.cell_side)  # [n, R], counted over all
        own = torch.arange(patches.numel()).view_as(patches)
        stays = [(row == its).nonzero()[:, 0] for row, its in zip(patches, own, strict=True)]
        by_length: dict[int, list[int]] = {}
        for i, rows in enumerate(stays):
            if len(rows):
                by_length.setdefault(len(rows), []).append(i)
        order = [i for group in by_length.values() for i in group]
        outputs, seen = [], 0
        for group in by_length.values():
            index = torch.stack([stays[i] for i in group]) + first
            if first:
                index = torch.cat([torch.zeros(len(group), 1, dtype=torch.int64), index], 1)
            some = torch.tensor(group, device=pixels.device)
            own_given = {k: v[some] if _is_of_pictures(v, count) else v for k, v in given.items()}
            with self._gathered(index.to(pixels.device)) as pairs:
                outputs.append(self._module(pixels.index_select(0, some), **own_given))
            self.check_rows(outputs[-1].last_hidden_state.shape[1], index.shape[1])
            seen += sum(pairs)
        place = self._places(patches, stays, order, first)
        work = replace(
            self._whole,
            rows=sum(len(stays[i]) + first for i in order),
            pairs=(seen,) * len(self._whole.pairs),
        )
        return _joined(outputs, place.to(pixels.device)), work

    def _places(self, patches: Tensor, stays: list[Tensor], order: list[int], first: int) -> Tensor:
        """[n, rows] int64: for each row of each picture its place among all rows that ran, one after the other."""
        place = torch.full((patches.numel(),), -1)
        head = torch.zeros(len(patches), dtype=torch.int64)  # of class tokens
        start = 0
        for i in order:
            head[i] = start
            place[i * patches.shape[1] + stays[i]] = start + first + torch.arange(len(stays[i]))
            start += first + len(stays[i])
        rows = place[patches]
        if not first:
            return rows
        ran = torch.tensor([len(rows) > 0 for rows in stays])
        own = torch.arange(len(patches))
        heads = head[own.where(ran, patches[:, 0] // patches.shape[1])]  # of what stands for a picture that did not run
        return torch.cat([heads[:, None], rows], 1)

    @contextmanager
    def _gathered(self, index: Tensor) -> Iterator[list[int]]:
        """Within it the tower's layers are given these rows ([G, K] int64) of each picture alone.

        The list says how many query-key pairs a layer then has.
        """
        pairs: list[int] = []

        def gather(module: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            args, given, count = only_rows_of(args, given, index)
            pairs.append(count)
            return args, given

        with ahead_of(self._tower.part(self._tower.layer_list.rpartition(".")[0]), gather):
            yield pairs


def cut(pixels: Tensor, side: int) -> Tensor:
    """[n * cells, P]: squares of so many pixels a side, of pictures [n, channels, height, width]."""
    count, channels, height, width = pixels.shape
    squares = pixels.reshape(count, channels, height // side, side, width // side, side)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(count * (height // side) * (width // side), -1)


def patch_owners(owner: Tensor, side: int) -> Tensor:
    """[n, R] int64: the patch that stands for each, counted over all pictures, given the same of cells [n, h, w]."""
    count, high, wide = owner.shape
    cells = owner.repeat_interleave(side, 1).repeat_interleave(side, 2)
    y, x = torch.arange(high * side) % side, torch.arange(wide * side) % side
    picture, row, column = cells // (high * wide), cells // wide % high, cells % wide
    patches = (picture * high * side + row * side + y[:, None]) * (wide * side) + column * side + x
    return patches.view(count, -1)


def only_rows_of(args: Any, given: dict[str, Any], index: Tensor) -> tuple[Any, dict[str, Any], int]:
    """What layers are called with, of some rows alone, and query-key pairs of each layer.

    Args:
        args: of the call; the hidden states [G, N, C] come first, unless they have a name.
        given: the rest: hidden states, masks [G, N] or [G, 1, N or 1, N], and tables of positions [N, ...].
        index: [G, K] int64.
    """
    name = next((name for name in ("inputs_embeds", "hidden_states") if name in given), None)
    hidden: Tensor = args[0] if name is None else given[name]
    total, (groups, kept) = hidden.shape[1], index.shape
    chosen = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    args, given = (args, {**given, name: chosen}) if name is not None else ((chosen, *args[1:]), dict(given))
    pairs, mask = groups * kept**2, given.get("attention_mask")
    if isinstance(mask, Tensor):
        given["attention_mask"] = mask = _chosen_of_mask(mask.expand(groups, *mask.shape[1:]), index, total)
        if mask.dtype == torch.bool and mask.dim() == 4:
            pairs = int(mask[:, 0].expand(-1, kept, -1).sum())
        elif mask.dim() == 4:
            pairs = int((mask[:, 0].expand(-1, kept, -1) > torch.finfo(mask.dtype).min).sum())
    tables = given.get("position_embeddings")
    if tables is not None:
        given["position_embeddings"] = tuple(x[index[0]] for x in tables)
    return args, given, pairs


def _chosen_of_mask(mask: Tensor, index: Tensor, total: int) -> Tensor:
    kept = index.shape[1]
    if mask.dim() == 2:
        return mask.gather(1, index)
    if mask.shape[2] == total:
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask.gather(3, index[:, None, None].expand(-1, mask.shape[1], mask.shape[2], kept))


@contextmanager
def ahead_of(module: nn.Module, hook: Any) -> Iterator[None]:
    """Within it a hook changes what a module is called with, by this thread; the first of all hooks there."""
    thread = get_ident()

    def own(module: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        return hook(module, args, given) if get_ident() == thread else None

    # The handle is there before the hook, so that no interrupt leaves a hook that nobody could remove.
    handle = RemovableHandle(module._forward_pre_hooks, extra_dict=module._forward_pre_hooks_with_kwargs)
    try:
        try:
            module._forward_pre_hooks_with_kwargs[handle.id] = True
            module._forward_pre_hooks[handle.id] = own
            module._forward_pre_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
            yield
        finally:
            handle.remove()
    finally:  # once more, for an interrupt that came in between
        handle.remove()


def _is_of_pictures(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count


def _joined(outputs: list[Any], place: Tensor) -> BaseModelOutputWithPooling:
    """The tower's output for whole pictures; place: [n, rows] int64, among the rows of all outputs."""

    def whole(states: list[Tensor]) -> Tensor:
        rows = torch.cat([x.flatten(0, 1) for x in states])
        return rows.index_select(0, place.flatten()).view(*place.shape, -1)

    return output_of(outputs, whole)


def output_of(outputs: list[Any], whole: Callable[[list[Tensor]], Tensor]) -> BaseModelOutputWithPooling:
    """One output of several, `whole` applied to each kind of state of theirs that is there."""
    states: Any = None
    if getattr(outputs[0], "hidden_states", None) is not None:
        levels = zip(*(output.hidden_states for output in outputs), strict=True)
        states = tuple(None if level[0] is None else whole(list(level)) for level in levels)
    return BaseModelOutputWithPooling(
        last_hidden_state=whole([output.last_hidden_state for output in outputs]), hidden_states=states
    )
