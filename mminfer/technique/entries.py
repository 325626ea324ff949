"""The entries of a layer as techniques and caches hand them to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CacheEntries:
    """One sequence's entries in one layer, in order of position.

    Every key/value head has as many, and all lie on an axis of their own (G heads, S entries each); or each head has
    its own number of them, and they are packed: on one axis, head behind head (then G is 1, and S all of them).

    Columns beyond keys and values are there where the cache technique asks for them (`CacheTechnique.columns`).

    Args:
        keys: [1, G, S, D], rotated.
        values: [1, G, S, D].
        is_visual: [1, G, S] bool.
        score: [1, G, S] float32, the attention that each entry received so far; 0 for one that is new. A
            technique may hold it in bfloat16 until the next pass.
        size: [1, G, S] float32, how many entries of the prompt each stands for; 1 for one that is new.
        source: [1, G, S] int64, the row of its pass's packed prompt that each came from.
        log_mass: [1, G, S] float32, added to the logits of attention, so that an entry counts for several; 0 for one
            that is new. None: 0 for all.
        head_lengths: entries of each head, where they are packed; None: the heads are alike.
    """

    keys: Tensor
    values: Tensor
    is_visual: Tensor | None = None
    score: Tensor | None = None
    size: Tensor | None = None
    source: Tensor | None = None
    log_mass: Tensor | None = None
    head_lengths: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Entries a head; of packed ones those of all heads, as `total` always is."""
        return self.keys.shape[2]

    @classmethod
    def of(cls, columns: Mapping[str, Tensor | None], head_lengths: tuple[int, ...] | None = None) -> CacheEntries:
        """From columns by name.

        Raises:
            KeyError: there are no keys or no values.
        """
        given = {name: column for name, column in columns.items() if column is not None}
        return cls(given.pop("keys"), given.pop("values"), **given, head_lengths=head_lengths)

    @classmethod
    def of_heads(cls, heads: Sequence[CacheEntries]) -> CacheEntries:
        """Packed, from the entries of each head by itself; see `heads`."""
        if any(head.log_mass is not None for head in heads):
            heads = [head.weighed() for head in heads]
        parts = [head.columns for head in heads]
        joined = {name: _joined([part[name] for part in parts]) for name in COLUMNS}
        return cls.of(joined, tuple(map(len, heads)))

    @property
    def columns(self) -> dict[str, Tensor | None]:
        """Every column by name; None for those that nobody asked for."""
        return {name: getattr(self, name) for name in COLUMNS}

    @property
    def is_packed(self) -> bool:
        """Whether the heads lie one behind the other, each with a number of entries of its own."""
        return self.head_lengths is not None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries of each of the G heads."""
        return (len(self),) * self.keys.shape[1] if self.head_lengths is None else self.head_lengths

    @property
    def total(self) -> int:
        """Entries of all heads together."""
        return self.keys.shape[1] * self.keys.shape[2]

    @property
    def per_head(self) -> int:
        """Entries a head: the mean over the heads, rounded, where they differ."""
        return mean_length(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, and of log-masses where there are any."""
        of_mass = 0 if self.log_mass is None else self.log_mass.nbytes
        return self.keys.nbytes + self.values.nbytes + of_mass

    def last(self, count: int) -> CacheEntries:
        """The last `count` of these entries in each head, or all there are."""
        if self.is_packed:
            return CacheEntries.of_heads([head.last(count) for head in self.heads()])
        start = max(0, len(self) - count)
        return CacheEntries.of({n: None if x is None else x[:, :, start:] for n, x in self.columns.items()})

    def select(self, places: Tensor) -> CacheEntries:
        """The entries at these places ([1, G, S] int64, ascending); all columns stay side by side.

        Raises:
            ValueError: they are packed.
        """
        self._refuse_packed("select")
        wide = places[..., None].expand(*places.shape, self.keys.shape[-1])
        return self.merged(places, self.keys.gather(2, wide), self.values.gather(2, wide))

    def select_heads(self, keep: Tensor) -> CacheEntries:
        """Those that are to stay, packed: each head keeps as many as it is told to, none at least.

        Args:
            keep: [1, G, S] bool, best on the CPU; of packed ones [1, 1, S].
        """
        here = keep.cpu()  # how many stay must be known there
        if self.head_lengths is None:
            lengths = here[0].sum(-1).tolist()
        else:
            lengths = [int(own.sum()) for own in here[0, 0].split(self.head_lengths)]
        head, place = (x.to(self.keys.device, non_blocking=True) for x in here[0].nonzero(as_tuple=True))
        kept = {n: None if x is None else x[0, head, place][None, None] for n, x in self.columns.items()}
        return CacheEntries.of(kept, tuple(lengths))

    def merged(self, places: Tensor, keys: Tensor, values: Tensor, size: Tensor | None = None) -> CacheEntries:
        """The entries at these places, with keys and values that others were merged into.

        Args:
            places: [1, G, S] int64, ascending.
            keys: [1, G, S, D].
            values: [1, G, S, D].
            size: [1, G, S] float32, how many entries each stands for now; None: as many as before.

        Raises:
            ValueError: they are packed.
        """
        self._refuse_packed("merged")
        others = {n: None if x is None else x.gather(2, places) for n, x in self.columns.items() if n not in _PAIR}
        if size is not None:
            others["size"] = size
        return CacheEntries.of({"keys": keys, "values": values, **others})

    def _refuse_packed(self, method: str) -> None:
        if self.is_packed:
            raise ValueError(
                f"CacheEntries.{method} takes heads that are alike, these have {self.head_lengths} entries: use "
                "select_heads, or heads() one by one"
            )

    def heads(self) -> list[CacheEntries]:
        """The entries of each head by itself ([1, 1, S, ...] columns), as views."""
        if self.head_lengths is None:
            parts = {n: None if x is None else x.split(1, 1) for n, x in self.columns.items()}
        else:
            parts = {n: None if x is None else x.split(self.head_lengths, 2) for n, x in self.columns.items()}
        return [
            CacheEntries.of({n: None if x is None else x[head] for n, x in parts.items()})
            for head in range(len(self.lengths))
        ]

    def packed(self) -> CacheEntries:
        """The same with the heads one behind the other, be they alike or not."""
        if self.is_packed:
            return self
        flat = {n: None if x is None else x.flatten(1, 2)[:, None] for n, x in self.columns.items()}
        return CacheEntries.of(flat, self.lengths)

    def unpacked(self) -> CacheEntries:
        """The same with an axis for the heads.

        Raises:
            ValueError: they differ in length.
        """
        if self.head_lengths is None:
            return self
        if len(set(self.head_lengths)) > 1:
            raise ValueError(f"heads of {self.head_lengths} entries have no axis of their own")
        shape = (len(self.head_lengths), self.head_lengths[0])
        return CacheEntries.of({n: None if x is None else x[0].unflatten(1, shape) for n, x in self.columns.items()})

    def weighed(self) -> CacheEntries:
        """The same with log-masses: 0 for all where there are none."""
        if self.log_mass is not None:
            return self
        return replace(self, log_mass=self.keys.new_zeros(self.keys.shape[:3], dtype=torch.float32))

    @classmethod
    def stacked(cls, layers: Sequence[CacheEntries]) -> CacheEntries:
        """Entries of several layers side by side along the first axis: [L, G, S, ...] columns.

        Args:
            layers: none is packed; all are alike in shape, columns and place.
        """
        if len(layers) == 1:
            return layers[0]
        columns = zip(*(entries.columns.values() for entries in layers), strict=True)
        return cls.of({name: _joined(own, 0) for name, own in zip(COLUMNS, columns, strict=True)})

    def unstacked(self) -> list[CacheEntries]:
        """Of each layer by itself, as views: what `stacked` put side by side."""
        parts = {n: None if x is None else x.split(1) for n, x in self.columns.items()}
        return [
            CacheEntries.of({n: None if x is None else x[i] for n, x in parts.items()})
            for i in range(self.keys.shape[0])
        ]

    def extend(self, new: CacheEntries) -> CacheEntries:
        """These entries, then the new ones, in each head; packed where one of both is."""
        if (self.log_mass is None) != (new.log_mass is None):
            return self.weighed().extend(new.weighed())
        ours, theirs = self.columns, new.columns
        if not (self.is_packed or new.is_packed):
            return CacheEntries.of({name: _joined([x, theirs[name]]) for name, x in ours.items()})
        joined = {
            name: _interleaved(_by_heads(x, self.head_lengths), _by_heads(theirs[name], new.head_lengths))
            for name, x in ours.items()
        }
        return CacheEntries.of(joined, tuple(a + b for a, b in zip(self.lengths, new.lengths, strict=True)))


def by_device(layers: Sequence[CacheEntries]) -> list[list[int]]:
    """Which layers have their entries on one device, in turn: all of them, where the model is not spread over several.

    Args:
        layers: entries of each.
    """
    places: dict[torch.device, list[int]] = {}
    for i, entries in enumerate(layers):
        places.setdefault(entries.keys.device, []).append(i)
    return list(places.values())


def mean_length(lengths: Sequence[int]) -> int:
    """The mean of the heads' lengths, rounded half up."""
    return (2 * sum(lengths) + len(lengths)) // (2 * len(lengths))


def _joined(parts: Sequence[Tensor | None], dim: int = 2) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors, dim) if len(tensors) == len(parts) else None


def _by_heads(column: Tensor | None, head_lengths: tuple[int, ...] | None) -> tuple[Tensor, ...] | None:
    if column is None:
        return None
    return column.split(1, 1) if head_lengths is None else column.split(head_lengths, 2)


def _interleaved(ours: tuple[Tensor, ...] | None, theirs: tuple[Tensor, ...] | None) -> Tensor | None:
    """Head by head, theirs behind ours, all on one axis."""
    if ours is None or theirs is None:
        return None
    return torch.cat([part for pair in zip(ours, theirs, strict=True) for part in pair], 2)


COLUMNS = tuple(field.name for field in fields(CacheEntries) if field.name != "head_lengths")
_PAIR = ("keys", "values")
