"""One layer of a compressed cache whose heads hold different numbers of entries, one behind the other in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from mminfer_kernels import PackedLayerCache
from torch import Tensor

from mminfer.forward.kv_layer import CompressedLayer, PaddedLayer
from mminfer.forward.packed_store import PackedStore, laid_out, laid_out_together, mean_of, room_for, there
from mminfer.forward.room import LEAST_GROWTH, at_rest, growth
from mminfer.forward.static_rows import StaticRows
from mminfer.technique import CacheEntries, mean_length

if TYPE_CHECKING:
    from mminfer.forward.kv_cache import CompressedCache

STEPS_AHEAD = 64  # decoding steps for which lengths are made at a time


class StepSegments(NamedTuple):
    """Packed buffers of a layer in a decoding step, and where the entries of each sequence and head lie in them.

    Args:
        keys: [R, D].
        values: [R, D].
        first: [B, G] int64, the row at which each segment begins.
        lengths: [B, G] int64, its entries, the new one included.
        new_rows: [B * G] int64, the row into which the new entry of each goes.
        log_mass: [R] float32, added to the logits; None: nothing is.
        longest: the largest of `lengths`.
    """

    keys: Tensor
    values: Tensor
    first: Tensor
    lengths: Tensor
    new_rows: Tensor
    log_mass: Tensor | None
    longest: int


def layer_of(entries: Sequence[CacheEntries], tokens_seen: Sequence[int], cache: CompressedCache) -> CompressedLayer:
    """The layer that holds these entries, one `CacheEntries` for each sequence.

    It is packed where the heads of a sequence differ in length, or entries have log-masses.
    """
    if _is_padded(entries):
        return PaddedLayer([e.unpacked() for e in entries], tokens_seen, cache)
    return PackedLayer(entries, tokens_seen, cache)


def layers_of(
    entries: Sequence[Sequence[CacheEntries]], tokens_seen: Sequence[Sequence[int]], cache: CompressedCache
) -> list[CompressedLayer]:
    """`layer_of` of all layers that are made at one time.

    On a GPU, where every copy is a launch, what packed ones hold beside keys and values is laid out for all together.
    """
    packed = [own for own in entries if not _is_padded(own)]
    ready: list[dict[str, Tensor] | None] = [None] * len(packed)
    if packed and packed[0][0].keys.device.type != "cpu":
        own = [_packed_columns(of_layer) for of_layer in packed]
        spare = [room_for([e.lengths for e in of_layer], cache.headroom) for of_layer in packed]
        ready = [*laid_out_together([columns for columns, _ in own], [lengths for _, lengths in own], spare)]
    made = iter(ready)
    return [
        layer_of(own, seen, cache) if _is_padded(own) else PackedLayer(own, seen, cache, next(made))
        for own, seen in zip(entries, tokens_seen, strict=True)
    ]


def _is_padded(entries: Sequence[CacheEntries]) -> bool:
    return all(len(set(e.lengths)) == 1 and e.log_mass is None for e in entries)


def _packed_columns(
    entries: Sequence[CacheEntries],
) -> tuple[list[dict[str, Tensor | None]], tuple[tuple[int, ...], ...]]:
    """The columns of each sequence, and how many entries its heads have."""
    packed = [e.packed() for e in entries]
    if any(e.log_mass is not None for e in packed):
        packed = [e.weighed() for e in packed]
    return [e.columns for e in packed], tuple(e.lengths for e in packed)


class _Ahead(NamedTuple):
    """Lengths and rows of the steps to come.

    Args:
        store: for which they hold.
        begin: entries that every head had got since the layer was made, at the first of these steps.
        lengths: of each step, [B, G] int64: entries of each segment, the step's own included.
        rows: of each step, [B * G] int64: the rows into which it writes.
    """

    store: PackedStore
    begin: int
    lengths: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]


class PackedLayer(CompressedLayer):
    """A layer whose heads hold as many entries as each of them needs.

    Behind the entries of each segment there are spare rows, so that a decoding step, in which every head gets one new
    entry, copies nothing.

    Args:
        entries: one `CacheEntries` for each sequence.
        tokens_seen: as of `CompressedLayer`.
        cache: likewise.
        ready: columns that were laid out already, with the room that `room_for` says.
    """

    def __init__(
        self,
        entries: Sequence[CacheEntries],
        tokens_seen: Sequence[int],
        cache: CompressedCache,
        ready: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(tokens_seen, cache, entries[0].keys)
        columns, lengths = _packed_columns(entries)
        spare, ready = room_for(lengths, cache.headroom), ready or {}
        buffers = {
            name: ready[name] if name in ready else laid_out([c[name] for c in columns], lengths, spare, name)
            for name in columns[0]
        }
        self._store = PackedStore(lengths, spare, buffers, self.device)
        self._new = 0  # entries that every head got since
        self._ahead: _Ahead | None = None

    @property
    def num_columns(self) -> int:  # type: ignore[override]
        """Entries of the longest head of all."""
        return self._store.longest + self._new

    @property
    def largest_segment(self) -> int:
        """Rows of the longest head, spare ones included."""
        return self._store.longest + self._store.spare

    @property
    def buffers(self) -> Mapping[str, Tensor | None]:
        """[R, ...] each."""
        return self._store.buffers

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """[R, D], spare rows included."""
        return there(self._store.buffers["keys"])

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """[R, D], spare rows included."""
        return there(self._store.buffers["values"])

    @property
    def batch_size(self) -> int:
        return len(self._store.lengths)

    @property
    def head_lengths(self) -> list[tuple[int, ...]]:
        return [tuple(n + self._new for n in lengths) for lengths in self._store.lengths]

    @property
    def lengths(self) -> list[int]:
        return [mean_length(lengths) for lengths in self.head_lengths]

    @property
    def nbytes(self) -> int:
        of_mass = 0 if self._store.buffers["log_mass"] is None else 4
        per_entry = 2 * self.keys.shape[1] * self.keys.element_size() + of_mass
        return sum(map(sum, self.head_lengths)) * per_entry

    def row(self, sequence: int) -> CacheEntries:
        """One sequence's entries, packed; a copy."""
        columns = {
            name: None if x is None else torch.cat(self._store.stretches(x, sequence, self._new))[None, None]
            for name, x in self._store.buffers.items()
        }
        return CacheEntries.of(columns, self.head_lengths[sequence])

    def extended(self, sequence: int, new: CacheEntries) -> CacheEntries:
        """One sequence's entries, then the new ones in each head, by one copy."""
        store = self._store
        if (store.buffers["log_mass"] is None) != (new.log_mass is None):
            return super().extended(sequence, new)
        theirs = [head.columns for head in new.heads()]
        columns: dict[str, Tensor | None] = {}
        for name, column in store.buffers.items():
            added = [of_head[name] for of_head in theirs]
            if column is None or any(x is None for x in added):
                columns[name] = None
                continue
            ours = store.stretches(column, sequence, self._new)
            pairs = zip(ours, added, strict=True)
            columns[name] = torch.cat([p for a, b in pairs if b is not None for p in (a, b[0, 0])])[None, None]
        lengths = zip(self.head_lengths[sequence], new.lengths, strict=True)
        return CacheEntries.of(columns, tuple(a + b for a, b in lengths))

    def with_room(self) -> tuple[PackedStore, int]:
        return self._with_room(), self._new

    def static_rows(self) -> StaticRows:
        store = self._with_room()
        keys, values, log_mass = there(store.buffers["keys"]), there(store.buffers["values"]), store.buffers["log_mass"]
        return StaticRows(keys, values, store.first, store.base + self._new, log_mass, self.largest_segment)

    def _with_room(self) -> PackedStore:
        """The entries, with room for one more in each head."""
        if self._new >= self._store.spare:
            self._store = self._store.resized(self._new, growth(self._mean, LEAST_GROWTH))
        return self._store

    @property
    def _mean(self) -> int:
        return mean_of(self._store.lengths) + self._new

    def settle(self) -> None:
        room, self._ahead = at_rest(self._mean), None
        if self._store.spare - self._new > room:
            self._store = self._store.resized(self._new, room)

    def step_cache(self) -> PackedLayerCache:
        store = self._with_room()
        keys, values = there(store.buffers["keys"]), there(store.buffers["values"])
        return PackedLayerCache(keys, values, store.segments, self._new, store.buffers["log_mass"])

    def step_segments(self) -> StepSegments:
        """The buffers with room for one new entry of each head, and where it goes; `advance` makes it count."""
        store, ahead = self._with_room(), self._ahead
        if ahead is None or ahead.store is not store or not 0 <= self._new - ahead.begin < STEPS_AHEAD:
            ahead = self._ahead = self._made_ahead()
        step = self._new - ahead.begin
        return StepSegments(
            there(store.buffers["keys"]),
            there(store.buffers["values"]),
            store.first,
            ahead.lengths[step],
            ahead.rows[step],
            store.buffers["log_mass"],
            store.longest + self._new + 1,
        )

    def _made_ahead(self) -> _Ahead:
        store = self._store
        steps = torch.arange(self._new, self._new + STEPS_AHEAD, device=store.device)[:, None, None]
        rows = (store.first + store.base + steps).flatten(1)
        return _Ahead(store, self._new, (store.base + 1 + steps).unbind(), rows.unbind())

    def write_ahead(self, k: Tensor, v: Tensor) -> StepSegments:
        """Writes a new entry of each sequence and head ([B, G, 1, D]); `advance` makes it count."""
        segments = self.step_segments()
        keys, values, rows = segments.keys, segments.values, segments.new_rows
        keys[rows] = k.reshape(-1, k.shape[-1]).to(keys.dtype)
        values[rows] = v.reshape(-1, v.shape[-1]).to(values.dtype)
        return segments

    def advance(self, num_columns: int) -> None:
        self._new += num_columns
        self.tokens_seen = tuple(n + num_columns for n in self.tokens_seen)

    def snapshot(self) -> Callable[[], None]:
        new, tokens_seen = self._new, self.tokens_seen

        def restore() -> None:
            self._new, self.tokens_seen = new, tokens_seen

        return restore

    def select_rows(self, rows: Tensor) -> None:
        chosen = rows.tolist()
        if chosen == list(range(self.batch_size)):
            return
        self._store = self._store.select(chosen)
        self.tokens_seen = tuple(self.tokens_seen[i] for i in chosen)
