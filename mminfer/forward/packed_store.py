"""Rows of packed entries in memory: a segment for each sequence and head, and spare rows behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from mminfer_kernels import Segments
from torch import Tensor

from mminfer.forward.kv_layer import NEW
from mminfer.forward.room import LEAST_GROWTH, at_rest, growth


@dataclass(frozen=True, eq=False)
class PackedStore:
    """Segments of rows, one for each sequence and head, each with the same number of spare rows behind it.

    Args:
        lengths: of each sequence and head, how many entries it had when the layer was made.
        spare: rows behind these, of each segment.
        buffers: the columns, [R, ...] each.
        device: where they are.
    """

    lengths: tuple[tuple[int, ...], ...]
    spare: int
    buffers: Mapping[str, Tensor | None]
    device: torch.device

    @cached_property
    def longest(self) -> int:
        return max(map(max, self.lengths))

    @cached_property
    def starts(self) -> list[list[int]]:
        """Of each sequence and head, the row at which its segment begins; behind the last head, where all end."""
        heads, sizes = len(self.lengths[0]), [n + self.spare for lengths in self.lengths for n in lengths]
        rows = list(accumulate(sizes, initial=0))
        return [rows[b * heads : (b + 1) * heads + 1] for b in range(len(self.lengths))]

    @cached_property
    def first(self) -> Tensor:
        """[B, G] int64: `starts`."""
        return torch.tensor([starts[:-1] for starts in self.starts]).to(self.device, non_blocking=True)

    @cached_property
    def segments(self) -> Segments:
        """The same for the fused step, which looks at them once."""
        return Segments(self.first, self.base, there(self.buffers["keys"]).shape[0])

    @cached_property
    def base(self) -> Tensor:
        """[B, G] int64: `lengths`."""
        return torch.tensor(self.lengths).to(self.device, non_blocking=True)

    def stretches(self, column: Tensor, sequence: int, new: int) -> list[Tensor]:
        """The rows of a column in use in each head of a sequence, as views; new: entries since the layer was made."""
        of_heads = zip(self.starts[sequence], self.lengths[sequence], strict=False)
        return [column[start : start + length + new] for start, length in of_heads]

    def resized(self, new: int, more: int) -> PackedStore:
        """The same entries, `new` of each segment made since, with `more` spare rows behind them."""
        sequences = range(len(self.lengths))
        buffers = {
            name: None if x is None else joined([p for b in sequences for p in self.stretches(x, b, new)], more, name)
            for name, x in self.buffers.items()
        }
        return PackedStore(self.lengths, new + more, buffers, self.device)

    def select(self, rows: Sequence[int]) -> PackedStore:
        """Of these sequences."""
        ends = [(self.starts[b][0], self.starts[b][-1]) for b in rows]
        buffers = {
            name: None if x is None else torch.cat([x[start:stop] for start, stop in ends])
            for name, x in self.buffers.items()
        }
        return PackedStore(tuple(self.lengths[b] for b in rows), self.spare, buffers, self.device)


def mean_of(lengths: Sequence[Sequence[int]]) -> int:
    """Entries of a segment, on average, rounded down."""
    return sum(map(sum, lengths)) // sum(map(len, lengths))


def room_for(lengths: Sequence[Sequence[int]], headroom: int | None) -> int:
    """Spare rows of new segments of these lengths; headroom: as of `CompressedCache`."""
    mean = mean_of(lengths)
    return min(headroom, growth(mean, LEAST_GROWTH)) if headroom else at_rest(mean)


def laid_out(
    sequences: Sequence[Tensor | None], lengths: Sequence[tuple[int, ...]], spare: int, name: str
) -> Tensor | None:
    """[1, 1, S_b, ...] each, of one column -> [R, ...]."""
    tensors = [x[0, 0] for x in sequences if x is not None]
    if len(tensors) < len(sequences):
        return None
    of_all = zip(tensors, lengths, strict=True)
    return joined([part for own, of_heads in of_all for part in own.split(of_heads)], spare, name)


def laid_out_together(
    layers: Sequence[Sequence[Mapping[str, Tensor | None]]],
    lengths: Sequence[Sequence[tuple[int, ...]]],
    spare: Sequence[int],
) -> list[dict[str, Tensor]]:
    """`laid_out` of the columns of several layers, but keys and values, by a gather for each column.

    The layers' buffers are parts of one stretch of memory, which is let go when all of them have left it: they are
    small beside keys and values, and layers grow at about the same time.

    Args:
        layers: of each layer the columns of each sequence, [1, 1, S_b, ...] each.
        lengths: of each layer and sequence, entries of each head.
        spare: of each layer, spare rows behind the entries of each head.
    """
    sizes = [(n, more) for own, more in zip(lengths, spare, strict=True) for heads in own for n in heads]
    rows = [sum(map(sum, own)) + more * sum(map(len, own)) for own, more in zip(lengths, spare, strict=True)]
    device = there(layers[0][0]["keys"]).device
    places = _with_spare_places(sizes).to(device, non_blocking=True) if any(spare) else None
    out: list[dict[str, Tensor]] = [{} for _ in layers]
    for name in (name for name in layers[0][0] if name not in ("keys", "values")):
        parts = [x[0, 0] for of_layer in layers for columns in of_layer if (x := columns[name]) is not None]
        if len(parts) < sum(map(len, layers)) or any(x.device != device or x.dtype != parts[0].dtype for x in parts):
            continue
        if places is not None:
            parts.append(parts[0].new_full((1,), NEW.get(name, 0)))
        flat = torch.cat(parts)
        for own, column in zip(out, (flat if places is None else flat[places]).split(rows), strict=True):
            own[name] = column
    return out


def _with_spare_places(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """[R] int64: places of entries of segments behind each other, and of what is behind all of them for spare rows.

    Args:
        sizes: entries and spare rows of each segment.
    """
    ends, total = accumulate(n for n, _ in sizes), sum(n for n, _ in sizes)
    pieces = [
        x
        for end, (n, more) in zip(ends, sizes, strict=True)
        for x in (torch.arange(end - n, end), torch.full((more,), total))
    ]
    return torch.cat(pieces)


def joined(parts: Sequence[Tensor], spare: int, name: str) -> Tensor:
    """Segments of one column behind each other, each with so many spare rows behind it."""
    if not spare:
        return torch.cat(list(parts))
    block = parts[0].new_full((spare, *parts[0].shape[1:]), NEW.get(name, 0))
    return torch.cat([piece for part in parts for piece in (part, block)])


def there(column: Tensor | None) -> Tensor:
    if column is None:
        raise ValueError("a layer without keys or values")
    return column
