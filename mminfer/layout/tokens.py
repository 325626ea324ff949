"""What every room must know of the tokens: one immutable record, made once, narrowed as tokens leave."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from mminfer_kernels import merge_rows, top_places
from torch import Tensor

from mminfer.errors import InputError
from mminfer.layout.columns import Modality, RowCounts, SideBySide

# Those with an entry for each row, but companions, which stay where the rows are.
_COLUMNS = ("sequence", "modality", "image_id", "size", "source", "position", "block")
_TYPES = {"modality": torch.int8, "size": torch.float32, "position": torch.float64}  # of the others int64


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Per-token facts of a packed batch: T rows, sequence after sequence, no padding.

    Args:
        sequence: [T] int64, ascending: which chat of the batch a token belongs to.
        modality: [T] int8, a `Modality`.
        image_id: [T] int64: the image, tile or frame a token belongs to, counted over the batch; -1 for text.
        size: [T] float32: how many patches a token stands for; 1 for text, 0 for a visual token that is no patch
            (LLaVA-OneVision's newline), which no merge may touch.
        source: [T] int64: the token's row in the packed prompt as it came in.
        position: [A, T] float64: rotary positions on A axes (1, or 3 for M-RoPE).
        next_position: [B] float64: where the next text token of each sequence goes.
        companions: [V, K, C]: what joins the hidden states of the V visual rows behind each of the first K layers
            (DeepStack), in the rows' order; None where the model has no such features.
        block: [T] int64: tokens in a row with one number see each other in both directions, -1 looks back only; None
            where all do.
        run_before: [B] float64: where the last token before these rows stands, if it is visual, so that a run of
            visual tokens goes on; nan behind text. None where nothing came before.
        stand_in: [T] int64, on the CPU: the row that stands for each, its own where it stands for itself; None where
            all do. Those for which others stand are copies, which leave before the first layer: `without_copies`.
        host: the same rows on the CPU, where they are on another device and their facts are known; see `on_host`.
        counts: what is known of rows on another device whose facts are no longer.
        side_by_side: how the columns lie on a GPU; of those that were replaced since it says nothing.
        known_of: the columns of which `host` and `counts` tell; None: those given. Where a column is replaced beside
            them both are forgotten, so that nobody believes what is no longer so.

    `next_position` and `run_before` are on the CPU where a pass makes them.
    """

    sequence: Tensor
    modality: Tensor
    image_id: Tensor
    size: Tensor
    source: Tensor
    position: Tensor
    next_position: Tensor
    companions: Tensor | None = None
    block: Tensor | None = None
    run_before: Tensor | None = None
    stand_in: Tensor | None = None
    host: TokenLayout | None = None
    counts: RowCounts | None = None
    known_of: tuple[Tensor | None, ...] | None = None
    side_by_side: SideBySide | None = None

    def __post_init__(self) -> None:
        columns, known_of = tuple(getattr(self, name) for name in _COLUMNS), self.known_of
        if self.host is None and self.counts is None:
            known_of = None
        elif known_of is None:
            known_of = columns
        elif any(now is not then for now, then in zip(columns, known_of, strict=True)):
            known_of = None
            object.__setattr__(self, "host", None)
            object.__setattr__(self, "counts", None)
        object.__setattr__(self, "known_of", known_of)

    def __len__(self) -> int:
        return self.sequence.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.next_position.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the columns are."""
        return self.sequence.device

    @cached_property
    def on_host(self) -> TokenLayout:
        """The same rows on the CPU, without companions; where nobody knows them there, they are fetched."""
        if self.device.type == "cpu":
            return self
        return self.host if self.host is not None else replace(self, counts=None, companions=None)._moved("cpu")

    def to(self, device: torch.device) -> TokenLayout:
        """The layout there, made from one on the CPU, which it remembers."""
        return self if self.device == device else replace(self._moved(device), host=replace(self, companions=None))

    def _moved(self, device: torch.device | str) -> TokenLayout:
        own = self._side_by_side()
        patient = torch.device(device).type == "cpu"
        if own is None:
            columns = {name: x for name in _COLUMNS if (x := getattr(self, name)) is not None}
            moved: dict[str, Any] = {n: x.to(device, non_blocking=not patient) for n, x in columns.items()}
            return replace(self, **moved)
        return self._of(SideBySide.read(own.data.to(device, non_blocking=not patient), own.names))

    def _side_by_side(self) -> SideBySide | None:
        """The columns, as they lie already or put together; None where somebody gave them other types."""
        columns = {name: x for name in _COLUMNS if (x := getattr(self, name)) is not None}
        held = self.side_by_side
        if held is not None and all(held.columns.get(name) is x for name, x in columns.items()):
            return held
        usual = all(x.dtype == _TYPES.get(name, torch.int64) for name, x in columns.items())
        return SideBySide.of(columns) if usual else None

    def _of(self, rows: SideBySide, **changes: Any) -> TokenLayout:
        """The layout with these columns."""
        columns: dict[str, Any] = dict(rows.columns)
        made = replace(self, side_by_side=rows, **columns, **changes)
        made.__dict__["is_visual"] = rows.is_visual
        return made

    def _known(self, fact: Tensor) -> Tensor:
        """What was made on the CPU, where the columns are."""
        return fact.to(self.device, non_blocking=True)

    @cached_property
    def is_visual(self) -> Tensor:
        """[T] bool."""
        return self.modality != Modality.TEXT

    @cached_property
    def text_rows(self) -> Tensor:
        """[number of text tokens] int64: the rows that are text."""
        if self.host is not None:
            return self._known(self.host.text_rows)
        return places_of(~self.is_visual, None if self.counts is None else sum(self.text_lengths))

    @cached_property
    def visual_rows(self) -> Tensor:
        """[V] int64: the rows that are visual."""
        if self.host is not None:
            return self._known(self.host.visual_rows)
        return places_of(self.is_visual, None if self.counts is None else sum(self.visual_lengths))

    @cached_property
    def last_visible_row(self) -> Tensor | None:
        """[T] int64: the last row that each row sees, itself or the end of its block; None where all look back only."""
        if self.block is None:
            return None
        rows = torch.arange(len(self), device=self.block.device)
        group = self.block + 1  # text in group 0
        return torch.zeros_like(rows).scatter_reduce(0, group, rows, "amax")[group].where(group > 0, rows)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each sequence."""
        if self.counts is not None:
            return self.counts.lengths
        return tuple(torch.bincount(self.on_host.sequence, minlength=self.num_sequences).tolist())

    @cached_property
    def visual_lengths(self) -> tuple[int, ...]:
        """Visual rows of each sequence."""
        if self.counts is not None:
            return self.counts.visual_lengths
        own = self.on_host
        return tuple(torch.bincount(own.sequence[own.is_visual], minlength=self.num_sequences).tolist())

    @cached_property
    def text_lengths(self) -> tuple[int, ...]:
        """Text rows of each sequence."""
        return tuple(a - b for a, b in zip(self.lengths, self.visual_lengths, strict=True))

    @cached_property
    def image_lengths(self) -> tuple[int, ...]:
        """Tokens of each image or frame that stand for patches."""
        own = self.on_host
        return tuple(torch.bincount(own.image_id[own.is_visual & (own.size > 0)]).tolist())

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First row and one past the last row of each sequence (the pairs of `cu_seqlens`)."""
        ends = list(accumulate(self.lengths))
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    @cached_property
    def known(self) -> RowCounts | None:
        """What the host knows without a wait; None on the CPU, where nobody waits, and where nothing is known."""
        if self.host is None:
            return self.counts if self.device.type != "cpu" else None
        ends = tuple(bool(self.host.is_visual[stop - 1]) for _, stop in self.spans)
        return RowCounts(self.lengths, self.visual_lengths, ends, self.host.is_visual)

    @cached_property
    def last_in_run(self) -> Tensor:
        """[B] float64: where each sequence's last row stands if it is visual; nan if it is text."""
        own, last = self.on_host, [stop - 1 for _, stop in self.spans]
        return own.position[0, last].where(own.is_visual[last], torch.nan)

    @cached_property
    def resume_position(self) -> Tensor:
        """[B] float64: where the next stretch of each sequence's prompt begins."""
        own, last = self.on_host, [stop - 1 for _, stop in self.spans]
        return self.next_position.to(own.position.device).where(own.is_visual[last], own.position[0, last] + 1)

    def chunks(self, size: int | None) -> list[Tensor]:
        """Rows ([K] int64, ascending, on the CPU) that go through the layers together, at most `size` of each sequence.

        All sequences end in the last chunk; a shorter one has no rows in the first ones. Images are never split.

        Raises:
            InputError: an image has more than `size` tokens.
        """
        rows = torch.arange(len(self))
        if size is None or max(self.lengths) <= size:
            return [rows]
        if self.device.type != "cpu":
            return self.on_host.chunks(size)
        cuts = [self.cuts(start, stop, size) for start, stop in self.spans]
        count = max(map(len, cuts)) - 1
        padded = [[c[0]] * (count + 1 - len(c)) + c for c in cuts]
        return [torch.cat([rows[c[i] : c[i + 1]] for c in padded]) for i in range(count)]

    def cuts(self, start: int, stop: int, size: int) -> list[int]:
        """Ascending rows, `start` and `stop` among them, at most `size` apart and none inside an image.

        Raises:
            InputError: an image has more than `size` tokens.
        """
        owner = self.image_id[start:stop]
        inside = (owner[1:] == owner[:-1]) & (owner[1:] >= 0)
        free = torch.cat([(~inside).nonzero()[:, 0] + 1 + start, torch.tensor([stop], device=owner.device)])
        cuts = [start]
        while cuts[-1] < stop:
            place = int(torch.searchsorted(free, cuts[-1] + size, right=True)) - 1
            if place < 0 or int(free[place]) <= cuts[-1]:
                tokens = int(free[place + 1]) - cuts[-1]
                raise InputError(
                    f"prefill_chunk_size={size}, but an image has {tokens} tokens and is never split: "
                    f"pass at least {tokens}"
                )
            cuts.append(int(free[place]))
        return cuts

    def select(self, index: Tensor, counts: RowCounts | None = None) -> TokenLayout:
        """The layout of the rows in `index` ([K] int64, ascending); counts: what the host knows of them."""
        own = self.host if index.device.type == "cpu" else None
        host = None if own is None else own.select(index)
        index = index.to(self.device, non_blocking=True)
        rows = None if self.device.type == "cpu" else self._side_by_side()
        if rows is not None:
            return self._of(
                rows.select(index),
                host=host,
                counts=counts if host is None else None,
                known_of=None,
                companions=None if self.companions is None else self.companions[self._visual_places(index)],
            )
        return replace(
            self,
            host=host,
            counts=counts if host is None else None,
            known_of=None,
            stand_in=None,
            sequence=self.sequence[index],
            modality=self.modality[index],
            image_id=self.image_id[index],
            size=self.size[index],
            source=self.source[index],
            position=self.position[:, index],
            block=None if self.block is None else self.block[index],
            companions=None if self.companions is None else self.companions[self._visual_places(index)],
        )

    def without_copies(self) -> tuple[Tensor, TokenLayout]:
        """Rows that stand for themselves ([K] int64, ascending, on the CPU), and their layout, sizes added up."""
        rows = torch.arange(len(self))
        if self.stand_in is None:
            return rows, self
        own = self.on_host
        kept, gone = (self.stand_in == rows).nonzero()[:, 0], (self.stand_in != rows).nonzero()[:, 0]
        size = own.size[kept].index_add(0, torch.searchsorted(kept, self.stand_in[gone]), own.size[gone])
        left = replace(self.select(kept), size=self._known(size))
        return kept, left if own is self else replace(left, host=replace(own.select(kept), size=size))

    def merge(self, index: Tensor, size: Tensor, owner: Tensor) -> TokenLayout:
        """The layout after merging; companions are averaged as their tokens were, by size.

        Args:
            index: [K] int64, ascending: the rows that stay.
            size: [K] float32: patches that each now stands for.
            owner: [T] int64: the row of `index` that each row became part of; its own where it stays.
        """
        merged = replace(self.select(index.to(self.device)), size=size)
        if self.companions is None or merged.companions is None:
            return merged
        stays = self.size[index[merged.visual_rows]]
        gone = self.visual_rows[owner[self.visual_rows] != self.visual_rows]
        companions, _ = merge_rows(
            merged.companions.flatten(1),
            self.companions[self._visual_places(gone)].flatten(1),
            merged._visual_places(torch.searchsorted(index, owner[gone])),
            stays.where(stays > 0, 1),
            self.size[gone],
        )
        return replace(merged, companions=companions.view_as(merged.companions))

    def _visual_places(self, rows: Tensor) -> Tensor:
        """Places of the visual ones among these rows in the order of all visual rows."""
        return (self.is_visual.cumsum(0) - 1)[rows[self.is_visual[rows]]]

    def at(self, position: Tensor, next_position: Tensor) -> TokenLayout:
        """The same tokens at other rotary positions: [A, T] and [B] float64."""
        return replace(
            self, position=position, next_position=next_position, host=None, counts=self.known, known_of=None
        )

    def placed_as(self, host: TokenLayout) -> TokenLayout:
        """The same tokens where `host`, the layout on the CPU of the same rows, has them."""
        if self.device.type == "cpu":
            return host
        position = self.position if host.position is self.on_host.position else self._known(host.position)
        known = replace(self, position=position, host=None, counts=None)
        return replace(known, next_position=host.next_position, run_before=host.run_before, host=host)


def places_of(mask: Tensor, count: int | None = None) -> Tensor:
    """[..., K] int64: where `mask` ([..., N] bool) is true, ascending, in each of its rows.

    Args:
        mask: with as many true values in each row.
        count: how many; None: the device is asked, which waits for it.
    """
    if count is None or mask.device.type == "cpu":
        found = mask.nonzero()[:, -1]
        return found if mask.dim() == 1 else found.view(*mask.shape[:-1], -1)
    return top_places(mask, count)
