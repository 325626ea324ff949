"""Where the keys and values of a layer lie for the decode step: padded to one length, or packed head by head."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mminfer_kernels.checks import LARGEST_SIZE, check_segments, check_tensors, check_whole, described

if TYPE_CHECKING:
    from mminfer_kernels.decode_step import DecoderWeights


class LayerCache(NamedTuple):
    """Where one layer's keys and values lie.

    Args:
        keys: [B, G, capacity, D].
        values: [B, G, capacity, D].
        starts: [B] int64, the first entry of each row that counts, the new one at most; None: all do.
        end: entries so far; the new one goes to this column.
    """

    keys: Tensor
    values: Tensor
    starts: Tensor | None
    end: int


@dataclass(frozen=True, eq=False)
class Segments:
    """Which rows of a packed cache belong to each head, checked once; later steps only count up `added`.

    Args:
        first: [B, G] int64, the segment's first row. A copy is kept.
        lengths: [B, G] int64, rows in use, 0 or more; what lies behind them up to the next segment is room. A copy is
            kept.
        rows: of the cache.

    Raises:
        ValueError: segments that overlap, or rows that are not there.
    """

    first: Tensor
    lengths: Tensor
    rows: int
    _table: tuple[list[int], list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_tensors({"first": self.first, "lengths": self.lengths})
        check_whole("rows", self.rows, least=0)
        for name in ("first", "lengths"):  # whoever changes the tensors must not move what was checked
            object.__setattr__(self, name, getattr(self, name).detach().clone(memory_format=torch.contiguous_format))
        on_cpu = self.first.cpu(), self.lengths.cpu()
        check_segments(*on_cpu, self.rows, least=0)
        object.__setattr__(self, "_table", tuple(x.flatten().tolist() for x in on_cpu))
        _ = self.room

    @functools.cached_property
    def room(self) -> int:
        """Rows that every segment has behind its length."""
        segments = sorted(zip(*self._table, strict=True))
        behind = [first for first, _ in segments[1:]] + [self.rows]
        room = LARGEST_SIZE
        for (first, length), end in zip(segments, behind, strict=True):
            if first + length > end:
                raise ValueError(
                    f"a segment of {length} rows begins at row {first} and the next one at row {end}, wanted no overlap"
                )
            room = min(room, end - first - length)
        return room

    @functools.cached_property
    def words(self) -> tuple[ctypes.Array[ctypes.c_int64], ...]:
        """First rows and lengths as the C++ step reads them: what was checked, whatever becomes of the tensors."""
        return tuple((ctypes.c_int64 * len(x))(*x) for x in self._table)

    @property
    def pointers(self) -> tuple[int, int]:
        """Their addresses; not kept, since a copy has other ones."""
        first, lengths = self.words
        return ctypes.addressof(first), ctypes.addressof(lengths)


class PackedLayerCache(NamedTuple):
    """Where one layer's keys and values lie if heads have lengths of their own.

    Args:
        keys: [R, D].
        values: [R, D].
        segments: of each sequence's heads.
        added: rows that each segment got since; the new entry goes to row first + lengths + added.
        log_mass: [R] float32, added to each entry's logit, 0 for the new one, which is written; None: 0 for all.
    """

    keys: Tensor
    values: Tensor
    segments: Segments
    added: int
    log_mass: Tensor | None = None


def check_caches(
    hidden_states: Tensor, weights: DecoderWeights, caches: Sequence[LayerCache | PackedLayerCache]
) -> None:
    """Raises unless each cache has room for one more entry of the layer's keys and values.

    Raises:
        ValueError: what it has does not fit.
        TypeError: it is no cache.
    """
    for i, cache in enumerate(caches):
        if isinstance(cache, PackedLayerCache):
            _check_packed(i, cache, hidden_states, weights)
        elif isinstance(cache, LayerCache):
            _check_padded(i, cache, hidden_states, weights)
        else:
            raise TypeError(f"cache {i} is {type(cache).__name__}, wanted LayerCache or PackedLayerCache")


def _check_padded(i: int, cache: LayerCache, hidden_states: Tensor, weights: DecoderWeights) -> None:
    keys, values, starts, end = cache
    batch, device = len(hidden_states), hidden_states.device
    _check_pair(i, keys, values, hidden_states)
    shape = keys.shape
    fits = len(shape) == 4 and shape == values.shape and shape[0] == batch and type(end) is int
    if (
        not fits
        or shape[1] != weights.groups
        or shape[3] != weights.head_dim
        or not 0 <= end < shape[2] <= LARGEST_SIZE
    ):
        raise ValueError(
            f"cache {i}: keys {list(shape)}, values {list(values.shape)}, end {end}: wanted twice "
            f"[{batch}, {weights.groups}, capacity, {weights.head_dim}] with room for a column behind the end"
        )
    of_rows = starts is None or isinstance(starts, Tensor)
    if not of_rows or (starts is not None and (starts.shape != (batch,) or starts.dtype != torch.int64)):
        raise ValueError(f"cache {i}: starts is {described(starts)}, wanted int64 [{batch}]")
    if starts is not None and starts.device != device:
        raise ValueError(f"cache {i}: not all on {device}, wanted all where hidden_states is")


def _check_packed(i: int, cache: PackedLayerCache, hidden_states: Tensor, weights: DecoderWeights) -> None:
    keys, values, segments, added, log_mass = cache
    _check_pair(i, keys, values, hidden_states)
    if not isinstance(segments, Segments):
        raise ValueError(f"cache {i}: segments is {described(segments)}, wanted Segments")
    shape, of_heads = (segments.rows, weights.head_dim), (len(hidden_states), weights.groups)
    if keys.shape != shape or values.shape != shape or segments.first.shape != of_heads:
        raise ValueError(
            f"cache {i}: keys {list(keys.shape)}, values {list(values.shape)}, segments of "
            f"{list(segments.first.shape)}: wanted twice {list(shape)} and {list(of_heads)}"
        )
    if type(added) is not int or not 0 <= added < segments.room:
        raise ValueError(f"cache {i}: {described(added)} rows added, wanted room for one more of {segments.room}")
    if log_mass is not None:
        wide = isinstance(log_mass, Tensor) and log_mass.dtype in (torch.float32, hidden_states.dtype)
        if not wide or log_mass.shape != shape[:1] or log_mass.device != keys.device:
            raise ValueError(f"cache {i}: log_mass is {described(log_mass)}, wanted float32 [{shape[0]}]")


def _check_pair(i: int, keys: Tensor, values: Tensor, hidden_states: Tensor) -> None:
    """Raises `ValueError` unless keys and values are tensors where the hidden states are, and as they are."""
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        raise ValueError(f"cache {i}: keys are {described(keys)}, values {described(values)}, wanted tensors")
    dtype, device = hidden_states.dtype, hidden_states.device
    if not keys.dtype == values.dtype == dtype:
        raise ValueError(f"cache {i}: keys {keys.dtype}, values {values.dtype}, wanted {dtype}")
    if keys.device != device or values.device != device:
        raise ValueError(f"cache {i}: not all on {device}, wanted all where hidden_states is")
