"""One layer of a compressed cache: sequences of lengths of their own in one pair of buffers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from mminfer_kernels import LayerCache, PackedLayerCache
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from mminfer.errors import InputError
from mminfer.forward.room import HEADROOM, at_rest, growth
from mminfer.forward.static_rows import StaticRows
from mminfer.technique import CacheEntries

if TYPE_CHECKING:
    from mminfer.forward.kv_cache import CompressedCache


NEW = {"size": 1}  # what a column holds of a generated token; 0 in all others


class CompressedLayer(CacheLayerMixin):
    """One layer: the entries of each sequence, and spare room behind them for the tokens to come.

    Args:
        tokens_seen: how many tokens of each sequence this layer has taken in over all passes, evicted ones included.
        cache: the cache it belongs to, which knows the logical length and how much spare room there should be.
        keys: of which type and where all of them are.

    Attributes:
        num_columns: entries of the longest head of all.
    """

    is_sliding = False
    num_columns: int

    def __init__(self, tokens_seen: Sequence[int], cache: CompressedCache, keys: Tensor) -> None:
        self._cache: ref[CompressedCache] | None = ref(cache)  # else only a garbage collection would free their memory
        self.tokens_seen = tuple(tokens_seen)
        self.is_initialized = True
        self.dtype, self.device = keys.dtype, keys.device

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """How many sequences there are."""

    @property
    @abstractmethod
    def head_lengths(self) -> list[tuple[int, ...]]:
        """Of each sequence, the entries of each head."""

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """How many entries a head each sequence has: the mean, rounded, where its heads differ."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys and values held, and of log-masses; padding and spare room are not counted."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all columns as they lie in memory, padding and spare room included."""
        return sum(x.nbytes for x in self.buffers.values() if x is not None)

    @property
    @abstractmethod
    def buffers(self) -> Mapping[str, Tensor | None]:
        """Every column as it lies in memory."""

    @abstractmethod
    def settle(self) -> None:
        """Gives room for entries to come back, beyond what a layer at rest has."""

    @abstractmethod
    def row(self, sequence: int) -> CacheEntries:
        """One sequence's entries."""

    def extended(self, sequence: int, new: CacheEntries) -> CacheEntries:
        """One sequence's entries, then the new ones in each head."""
        return self.row(sequence).extend(new)

    @abstractmethod
    def step_cache(self) -> LayerCache | PackedLayerCache:
        """Keys and values as the fused decoding step takes them, with room for the new entry."""

    @abstractmethod
    def with_room(self) -> tuple[object, int]:
        """Makes room for one new entry of each head.

        Returns:
            What holds the entries, another object wherever they lie elsewhere; and a count of the entries that came.
        """

    @abstractmethod
    def static_rows(self) -> StaticRows:
        """The entries as rows, with room for a new one of each head."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Makes row `rows[i]` row i, as beams, repeats and sequences that leave the batch need it."""

    def advance(self, num_columns: int) -> None:
        """Makes entries that were written ahead part of the layer."""
        self.num_columns += num_columns
        self.tokens_seen = tuple(n + num_columns for n in self.tokens_seen)

    def snapshot(self) -> Callable[[], None]:
        """A function that takes back what was added since; it costs no copy, since entries are never overwritten."""
        num_columns, tokens_seen = self.num_columns, self.tokens_seen

        def restore() -> None:
            self.num_columns, self.tokens_seen = num_columns, tokens_seen

        return restore

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: a layer is made by the prompt pass, whole."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Refused: the host's own attention cannot go on from sequences of different lengths."""
        raise InputError(
            "this cache was compressed by mminfer and its rows have lengths of their own: go on with the patched "
            "model or the engine that made it"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose cache will say that they are its own."""
        return {**vars(self), "_cache": None}

    @property
    def cache(self) -> CompressedCache | None:
        """The cache it belongs to; None: that is gone."""
        return None if self._cache is None else self._cache()

    def belong_to(self, cache: CompressedCache, wherever: bool = True) -> None:
        """Makes it a layer of this cache; else only if it is of none."""
        if wherever or self._cache is None:
            self._cache = ref(cache)

    def get_seq_length(self) -> int:
        """Tokens the host believes to be in the cache."""
        return self.num_columns if self.cache is None else self.cache.logical_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_columns + query_length, self.get_seq_length() - self.num_columns

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """What host versions before 5.20 or so ask instead."""
        return -1


class PaddedLayer(CompressedLayer):
    """A layer whose heads are alike: sequences end at the same column and are padded on the left to the longest.

    Behind the columns in use the buffers have spare ones, so that a decoding step copies nothing.

    Args:
        entries: one `CacheEntries` for each sequence; none is packed, and none has log-masses.
        tokens_seen: as of `CompressedLayer`.
        cache: likewise.

    Attributes:
        num_columns: columns in use, which is the length of the longest sequence.
        left_padding: [B] int64, columns of padding before each sequence; None: there is none.
    """

    def __init__(self, entries: Sequence[CacheEntries], tokens_seen: Sequence[int], cache: CompressedCache) -> None:
        lengths, keys = [len(e) for e in entries], entries[0].keys
        super().__init__(tokens_seen, cache, keys)
        self.num_columns = max(lengths)
        self.left_padding = None
        if len(set(lengths)) > 1:
            self.left_padding = torch.tensor([self.num_columns - n for n in lengths], device=keys.device)
        columns = [e.columns for e in entries]
        self._spare_is_written = False
        headroom = HEADROOM if cache.headroom is None else cache.headroom
        capacity = self.num_columns + (headroom or at_rest(self.num_columns))
        self._buffers = {
            name: self._padded([of_one[name] for of_one in columns], capacity, NEW.get(name, 0)) for name in columns[0]
        }

    @property
    def buffers(self) -> Mapping[str, Tensor | None]:
        """[B, G, capacity, ...] each."""
        return self._buffers

    def _padded(self, sequences: Sequence[Tensor | None], capacity: int, spare: int) -> Tensor | None:
        """[1, G, S_b, ...] each -> [B, G, columns in use and spare ones, ...], padded on the left.

        This is always one copy: what attention hands over lies in the order of its projection, and with the spare
        columns made here the first step copies nothing.
        """
        tensors = [x for x in sequences if x is not None]
        if len(tensors) < len(sequences):
            return None
        first = tensors[0]
        out = first.new_empty(len(tensors), first.shape[1], capacity, *first.shape[3:])
        if first.dim() == 3:  # spare keys and values stay as memory has them: see `reserve_written`
            out[:, :, self.num_columns :] = spare
        for row, own in zip(out, tensors, strict=True):
            padding = self.num_columns - own.shape[2]
            if padding:
                row[:, :padding] = 0
            row[:, padding : self.num_columns] = own[0]
        return out

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """[B, G, columns in use, D]."""
        return self.reserve(0)[0][:, :, : self.num_columns]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """[B, G, columns in use, D]."""
        return self.reserve(0)[1][:, :, : self.num_columns]

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0]

    @property
    def lengths(self) -> list[int]:
        padding = [0] * self.batch_size if self.left_padding is None else self.left_padding.tolist()
        return [self.num_columns - n for n in padding]

    @property
    def head_lengths(self) -> list[tuple[int, ...]]:
        return [(length,) * self.keys.shape[1] for length in self.lengths]

    @property
    def nbytes(self) -> int:
        return 2 * sum(self.lengths) * self.keys.shape[1] * self.keys.shape[3] * self.keys.element_size()

    def row(self, sequence: int) -> CacheEntries:
        """One sequence's entries, as views of the buffers."""
        rows, columns = (
            slice(sequence, sequence + 1),
            slice(self.num_columns - self.lengths[sequence], self.num_columns),
        )
        return CacheEntries.of({name: None if x is None else x[rows, :, columns] for name, x in self._buffers.items()})

    def write_ahead(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes S new columns ([B, G, S, D]) behind those in use; `advance` makes them count.

        Returns:
            All keys and all values, the new ones included.
        """
        stop = self.num_columns + k.shape[2]
        keys, values = self.reserve(k.shape[2])
        keys[:, :, self.num_columns : stop], values[:, :, self.num_columns : stop] = k, v
        return keys[:, :, :stop], values[:, :, :stop]

    def reserve(self, spare_columns: int) -> tuple[Tensor, Tensor]:
        """The whole buffers of keys and values, [B, G, capacity, D], with at least so many spare columns."""
        keys, values = self._buffers["keys"], self._buffers["values"]
        if keys is None or values is None:
            raise ValueError("a layer without keys or values")
        if self.num_columns + spare_columns > keys.shape[2]:
            needed = self.num_columns + spare_columns
            headroom = None if self.cache is None else self.cache.headroom
            self._resize(needed + growth(needed, headroom or HEADROOM))
            return self.reserve(spare_columns)
        return keys, values

    def reserve_written(self, spare_columns: int) -> tuple[Tensor, Tensor]:
        """`reserve`, for those who read spare columns under a mask: nan that memory happens to hold would show."""
        keys, values = self.reserve(spare_columns)
        if not self._spare_is_written:
            keys[:, :, self.num_columns :], values[:, :, self.num_columns :] = 0, 0
            self._spare_is_written = True
        return keys, values

    def step_cache(self) -> LayerCache:
        return LayerCache(*self.reserve(1), self.left_padding, self.num_columns)

    def with_room(self) -> tuple[Tensor, int]:
        return self.reserve(1)[0], self.num_columns

    def static_rows(self) -> StaticRows:
        keys, values = self.reserve(1)
        batch, heads, capacity, size = keys.shape
        first = torch.arange(0, batch * heads * capacity, capacity, device=keys.device).view(batch, heads)
        lengths = torch.full_like(first, self.num_columns)
        if self.left_padding is not None:
            first, lengths = first + self.left_padding[:, None], lengths - self.left_padding[:, None]
        return StaticRows(keys.view(-1, size), values.view(-1, size), first, lengths, None, capacity)

    def settle(self) -> None:
        capacity = self.num_columns + at_rest(self.num_columns)
        if self.reserve(0)[0].shape[2] > capacity:
            self._resize(capacity)

    def _resize(self, capacity: int) -> None:
        used, resized = self.num_columns, {}
        for name, old in self._buffers.items():
            if old is not None:
                new = old.new_empty(*old.shape[:2], capacity, *old.shape[3:])
                new[:, :, :used] = old[:, :, :used]
                new[:, :, used:] = NEW.get(name, 0)
                resized[name] = new
        self._buffers = {**self._buffers, **resized}  # all at once, so that an interrupt leaves none behind the others
        self._spare_is_written = True

    def select_rows(self, rows: Tensor) -> None:
        if rows.tolist() == list(range(self.batch_size)):
            return
        self._buffers = {name: None if x is None else x[rows.to(x.device)] for name, x in self._buffers.items()}
        padding = self.left_padding
        self.left_padding = None if padding is None else padding[rows.to(padding.device)]
        self.tokens_seen = tuple(self.tokens_seen[i] for i in rows.tolist())
