"""The key/value cache of compressed prompts: every layer and every sequence as long as it needs, no longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from mminfer.errors import InputError
from mminfer.technique import COLUMNS, CacheEntries

ROOM = 64
# What the host calls a cache, as an argument and in its outputs: it has changed the name.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class CompressedLayer(CacheLayerMixin):
    """One layer: sequences end at the same column and start where their own length puts them.

    Args:
        entries: one `CacheEntries` a sequence.
        seen: tokens of each sequence this layer has ever taken in.
        cache: the cache it belongs to, which knows the logical length.
    """

    is_sliding = False

    def __init__(self, entries: Sequence[CacheEntries], seen: Sequence[int], cache: CompressedCache) -> None:
        self.cache = cache
        self.seen = tuple(seen)
        lengths = [len(e) for e in entries]
        self.end = max(lengths)
        self.starts = None
        if len(set(lengths)) > 1:
            self.starts = torch.tensor([self.end - n for n in lengths], device=entries[0].keys.device)
        columns = [e.columns for e in entries]
        self._buffers = {name: self._pad([of[name] for of in columns]) for name in COLUMNS}
        self.is_initialized = True
        self.dtype, self.device = entries[0].keys.dtype, entries[0].keys.device

    def _pad(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        """[1, G, S_b, ...] each -> [B, G, end + room, ...], right-aligned at the end.

        Always one copy: what attention hands over lies in the order of its projection, and with the room made here the
        first step copies nothing.
        """
        tensors = [p for p in parts if p is not None]
        if not tensors:
            return None
        first = tensors[0]
        out = first.new_empty(len(tensors), first.shape[1], self.end + self.cache.room, *first.shape[3:])
        out[:, :, self.end :] = 0
        for row, part in zip(out, tensors, strict=True):
            start = self.end - part.shape[2]
            row[:, :start] = 0
            row[:, start : self.end] = part[0]
        return out

    def _held(self, name: str) -> Tensor:
        """A column's buffer."""
        buffer = self._buffers[name]
        if buffer is None:
            raise ValueError(f"a layer without {name}")
        return buffer

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """[B, G, longest row, D]: what is held, without the spare room."""
        return self._held("keys")[:, :, : self.end]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """[B, G, longest row, D]."""
        return self._held("values")[:, :, : self.end]

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Entries a head of each sequence."""
        starts = [0] * self.batch_size if self.starts is None else self.starts.tolist()
        return [self.end - start for start in starts]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held, padding between sequences not counted."""
        return 2 * sum(self.lengths) * self.keys.shape[1] * self.keys.shape[3] * self.keys.element_size()

    def row(self, sequence: int) -> CacheEntries:
        """One sequence's entries, as views."""
        start = self.end - self.lengths[sequence]
        rows = slice(sequence, sequence + 1)
        return CacheEntries.of(
            {n: None if x is None else x[rows, :, start : self.end] for n, x in self._buffers.items()}
        )

    def stage(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes S new columns ([B, G, S, D]) behind the last; they count once the cache advances.

        Returns:
            All keys and all values, the new ones included.
        """
        stop = self.end + k.shape[2]
        keys, values = self.reserve(k.shape[2])
        keys[:, :, self.end : stop], values[:, :, self.end : stop] = k, v
        return keys[:, :, :stop], values[:, :, :stop]

    def reserve(self, columns: int) -> tuple[Tensor, Tensor]:
        """The buffers of keys and values, [B, G, capacity, D], with room for so many columns behind the last."""
        keys, values = self._held("keys"), self._held("values")
        if self.end + columns > keys.shape[2]:
            self._grow(self.end + columns)
            return self.reserve(columns)
        return keys, values

    def _grow(self, columns: int) -> None:
        capacity = columns + max(self.cache.room, columns // 8)
        for name, old in self._buffers.items():
            if old is not None:
                new = old.new_empty(*old.shape[:2], capacity, *old.shape[3:])
                new[:, :, : self.end] = old[:, :, : self.end]
                new[:, :, self.end :] = 0
                self._buffers[name] = new

    def advance(self, columns: int) -> None:
        """Makes the staged columns part of the layer."""
        self.end += columns
        self.seen = tuple(n + columns for n in self.seen)

    def map_rows(self, change: torch.Tensor) -> None:
        """Takes row `change[i]` as row i, as beams and repeats do."""
        if change.tolist() == list(range(self.batch_size)):
            return
        self._buffers = {n: None if x is None else x[change.to(x.device)] for n, x in self._buffers.items()}
        self.starts = None if self.starts is None else self.starts[change.to(self.starts.device)]
        self.seen = tuple(self.seen[i] for i in change.tolist())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: a layer is made by the prompt pass, whole."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise InputError(
            "this cache was compressed by mminfer and its rows have lengths of their own: go on with the patched "
            "model or the engine that made it"
        )

    def get_seq_length(self) -> int:
        """Tokens the host believes to be in the cache."""
        return self.cache.logical_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end + query_length, self.cache.logical_length - self.end

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """What host versions before 5.20 or so ask instead."""
        return -1


@dataclass(frozen=True, eq=False)
class Places:
    """Where the sequences of a cache go on, [B] float64 each.

    Args:
        decode: with a generated token: behind everything.
        resume: with the next stretch of the prompt: behind the last token. It differs from `decode` where a video
            reaches further on the axis of time than the text behind it.
        run: where the last token stands if that is visual, so that a run of visual tokens may go on; else nan.
    """

    decode: Tensor
    resume: Tensor
    run: Tensor

    @classmethod
    def after(cls, position: Tensor) -> Places:
        """Behind text."""
        return cls(position, position, torch.full_like(position, torch.nan))

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.decode, self.resume, self.run


class CompressedCache(Cache):
    """What a prompt left behind: per layer its entries, and where the sequences go on.

    `get_seq_length()` is the logical length, in tokens of the prompt as it was (padding included), because that is
    what `generate` slices its inputs by. What is held is in `lengths` and `nbytes`.

    Attributes:
        logical_length: the length the host believes in.
        tokens: tokens of each sequence taken in so far, padding not counted.
        places: where the sequences go on.
        rotary_length: positions that the first pass into it reached; 0.0 before. Techniques that scale rotary
            frequencies by the length keep to it, since the keys held were rotated so.
        room: columns that a prompt pass leaves free behind its entries, for the tokens to come.
    """

    layers: list[CompressedLayer]  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.logical_length = 0
        self.tokens: tuple[int, ...] = ()
        self.places = Places.after(torch.empty(0, dtype=torch.float64))
        self.rotary_length = 0.0
        self.room = ROOM

    def commit(
        self,
        layers: list[CompressedLayer],
        columns: int,
        tokens: Sequence[int],
        places: Places,
        rotary_length: float | None = None,
    ) -> None:
        """Takes over what a whole pass made."""
        self.layers = layers
        self.logical_length += columns
        self.tokens = tuple(tokens)
        self.places = places
        if rotary_length is not None:
            self.rotary_length = rotary_length

    def snapshot(self) -> Callable[[], None]:
        """A function that puts the cache back as it is now; it costs no copy, since entries are never overwritten."""
        state = {name: value for name, value in vars(self).items() if name != "room"}
        ends = [(layer, layer.end, layer.seen) for layer in self.layers]

        def restore() -> None:
            vars(self).update(state)
            for layer, end, seen in ends:
                layer.end, layer.seen = end, seen

        return restore

    def advance(self, columns: int) -> None:
        """Counts the columns that every layer has staged."""
        for layer in self.layers:
            layer.advance(columns)
        self.logical_length += columns
        self.tokens = tuple(n + columns for n in self.tokens)
        self.places = Places.after(self.next_position + columns)

    @property
    def next_position(self) -> Tensor:
        """[B] float64, where each sequence's next generated token goes."""
        return self.places.decode

    @property
    def lengths(self) -> list[list[int]]:
        """Entries a head, per layer and sequence."""
        return [layer.lengths for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        return sum(layer.nbytes for layer in self.layers)

    def clone(self) -> CompressedCache:
        """An independent copy: several questions can go on from one context."""
        out = CompressedCache()
        out.room = self.room
        layers = [
            CompressedLayer([layer.row(b) for b in range(layer.batch_size)], layer.seen, out) for layer in self.layers
        ]
        out.commit(layers, self.logical_length, self.tokens, self.places, self.rotary_length)
        return out

    @classmethod
    def stack(cls, caches: Sequence[CompressedCache]) -> CompressedCache:
        """Caches of single sequences as one of their batch; the host believes it as long as the longest."""
        if len(caches) == 1:
            return caches[0]
        out = cls()
        out.room = caches[0].room
        layers = [
            CompressedLayer([layer.row(0) for layer in of_all], [layer.seen[0] for layer in of_all], out)
            for of_all in zip(*(c.layers for c in caches), strict=True)
        ]
        out.commit(
            layers,
            max(c.logical_length for c in caches),
            [c.tokens[0] for c in caches],
            Places(*map(torch.cat, zip(*(c.places.columns for c in caches), strict=True))),
            max(c.rotary_length for c in caches),
        )
        return out

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of the beams they go on from."""
        for layer in self.layers:
            layer.map_rows(beam_idx)
        rows = beam_idx.to(self.next_position.device)
        self.places = Places(*(column[rows] for column in self.places.columns))
        self.tokens = tuple(self.tokens[i] for i in beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.next_position)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise InputError("a compressed cache cannot be rolled back: assisted decoding is not supported")
