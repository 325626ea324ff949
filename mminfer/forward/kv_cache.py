"""The key/value cache of compressed prompts: every layer and every sequence as long as it needs, no longer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from mminfer.errors import InputError
from mminfer.forward.kv_layer import CompressedLayer
from mminfer.forward.packed_layer import PackedLayer, layer_of
from mminfer.technique import CacheTechnique, PositionTechnique

# What the host calls a cache, as an argument and in its outputs: it has changed the name.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


@dataclass(frozen=True, eq=False)
class Continuation:
    """At which positions the sequences of a cache go on, [B] float64 each.

    Args:
        decode: of the next generated token, which stands behind everything.
        prefill: of the next stretch of the prompt, which stands behind the last token. It differs from `decode` where
            a video extends further on the axis of time than the text behind it.
        visual_run: of the last token if that is visual, so that a run of visual tokens may go on; else nan.
    """

    decode: Tensor
    prefill: Tensor
    visual_run: Tensor

    @classmethod
    def behind_text(cls, position: Tensor) -> Continuation:
        """Where sequences go on whose last token is text; position: [B] float64, of the next token."""
        return cls(position, position, torch.full_like(position, torch.nan))

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.decode, self.prefill, self.visual_run

    def select(self, rows: Tensor) -> Continuation:
        """Of these sequences, [K] int64."""
        return Continuation(*(column[rows] for column in self.columns))

    @classmethod
    def stack(cls, parts: Sequence[Continuation]) -> Continuation:
        """Of the sequences of all parts, one part behind the other."""
        return cls(*map(torch.cat, zip(*(part.columns for part in parts), strict=True)))


@dataclass(frozen=True)
class Origin:
    """By what the keys of a cache were made, so that no other goes on from them.

    Args:
        model: a number of the language model.
        positions: the technique that placed and rotated them.
        replayed: whether scores of entries are shares of a replay's attention; None: they have no scores.
    """

    model: int
    positions: PositionTechnique | None
    replayed: bool | None = None

    @classmethod
    def of(
        cls, language_model: nn.Module, positions: PositionTechnique | None, cache: CacheTechnique | None = None
    ) -> Origin:
        """Of what this language model makes."""
        replayed = None if cache is None or "score" not in cache.columns else cache.replay is not None
        return cls(_model_numbers.setdefault(language_model, next(_numbers)), positions, replayed)

    def check(self, cache: CompressedCache) -> None:
        """Raises `InputError` if another model, other positions or other scores made a cache to go on from."""
        held = cache.origin
        if held is None or held == self:
            return
        if held.model != self.model:
            raise InputError(f"{CACHE_NAME} was filled by another model: go on with the one that made it")
        if held.positions == self.positions:
            if None in (held.replayed, self.replayed) or held.replayed == self.replayed:
                return
            raise InputError(
                f"{CACHE_NAME} holds entries {'' if held.replayed else 'not '}scored by a replay, and the patch scores "
                "otherwise: go on with the settings that made it, or begin with an empty cache"
            )
        raise InputError(
            f"{CACHE_NAME} was filled with positions={held.positions}, the patch has {self.positions}: go on "
            "with the same positions"
        )


_model_numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_numbers = itertools.count()


class CompressedCache(Cache):
    """What a prompt left behind: its entries in every layer, and where the sequences go on.

    `get_seq_length()` is the logical length, in tokens of the prompt as it was (padding included), because that is
    what `generate` slices its inputs by. What is held is in `lengths` and `nbytes`.

    Attributes:
        logical_length: the length the host believes in.
        tokens: tokens of each sequence taken in so far, padding not counted.
        continuation: at which positions the sequences go on.
        rotary_length: positions that the first pass into it reached; 0.0 before. Techniques that scale rotary
            frequencies by the length keep to it, since the keys held were rotated so.
        headroom: how many tokens are to come, so that a prompt pass leaves room for them behind its entries; 0: none
            for now; None: nobody says.
        origin: by what it was filled; None: nobody knows.
        ends_in_padding: whether a row's last column is padding, from which the host would go on.
    """

    layers: list[CompressedLayer]  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.logical_length = 0
        self.tokens: tuple[int, ...] = ()
        self.continuation = Continuation.behind_text(torch.empty(0, dtype=torch.float64))
        self.rotary_length = 0.0
        self.headroom: int | None = None
        self.origin: Origin | None = None
        self.ends_in_padding = False

    def commit(
        self,
        layers: list[CompressedLayer],
        columns: int,
        tokens: Sequence[int],
        continuation: Continuation,
        rotary_length: float | None = None,
    ) -> None:
        """Takes over what a whole pass made.

        Args:
            layers: with the entries of this pass.
            columns: by how much the logical length grows.
            tokens: of each sequence, those of earlier passes included.
            continuation: at which positions the sequences go on.
            rotary_length: as the attribute; None: as it was.
        """
        self.layers = layers
        self.logical_length += columns
        self.tokens = tuple(tokens)
        self.continuation = continuation
        if rotary_length is not None:
            self.rotary_length = rotary_length

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose layers are copies too."""
        vars(self).update(state)
        for layer in self.layers:
            layer.belong_to(self, wherever=False)

    def snapshot(self) -> Callable[[], None]:
        """A function that puts the cache back as it is now; it costs no copy, since entries are never overwritten."""
        state = {name: value for name, value in vars(self).items() if name != "headroom"}
        of_layers = [layer.snapshot() for layer in self.layers]

        def restore() -> None:
            vars(self).update(state)
            for restore_layer in of_layers:
                restore_layer()

        return restore

    def move_into(self, other: Cache) -> CompressedCache:
        """Makes an empty cache of the host's this one, so that whoever holds it finds it filled; gives that."""
        for layer in self.layers:
            layer.belong_to(other)  # type: ignore[arg-type]
        other.__class__, other.__dict__ = CompressedCache, vars(self)
        return other  # type: ignore[return-value]

    def advance(self, num_columns: int) -> None:
        """Makes columns that were written ahead in every layer part of the cache."""
        for layer in self.layers:
            layer.advance(num_columns)
        self.logical_length += num_columns
        self.tokens = tuple(n + num_columns for n in self.tokens)
        self.continuation = Continuation.behind_text(self.next_position + num_columns)

    @property
    def next_position(self) -> Tensor:
        """[B] float64, the position of each sequence's next generated token."""
        return self.continuation.decode

    @property
    def lengths(self) -> list[list[int]]:
        """How many entries a head there are, for every layer and sequence: the mean, rounded, where heads differ."""
        return [layer.lengths for layer in self.layers]

    @property
    def head_lengths(self) -> list[list[tuple[int, ...]]]:
        """How many entries each head has, for every layer and sequence."""
        return [layer.head_lengths for layer in self.layers]

    @property
    def is_packed(self) -> bool:
        """Whether any layer holds heads of different lengths, or entries that count for several."""
        return any(isinstance(layer, PackedLayer) for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held, and of log-masses."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all that lies in memory: what cache techniques note of each entry, padding and spare room too."""
        return sum(layer.allocated_bytes for layer in self.layers)

    def settle(self) -> None:
        """No more tokens are to come for now: gives most of the room for them back."""
        self.headroom = 0
        for layer in self.layers:
            layer.settle()

    def clone(self) -> CompressedCache:
        """An independent copy, at rest: several questions can go on from one context."""
        out = CompressedCache()
        out.headroom, out.origin, out.ends_in_padding = 0, self.origin, self.ends_in_padding
        layers = [
            layer_of([layer.row(b) for b in range(layer.batch_size)], layer.tokens_seen, out) for layer in self.layers
        ]
        out.commit(layers, self.logical_length, self.tokens, self.continuation, self.rotary_length)
        return out

    @classmethod
    def stack(cls, caches: Sequence[CompressedCache]) -> CompressedCache:
        """Caches of single sequences as one of their batch; the host believes it as long as the longest.

        A single cache comes back itself.
        """
        if len(caches) == 1:
            return caches[0]
        out = cls.of_rows([(cache, 0) for cache in caches])
        out.logical_length = max(c.logical_length for c in caches)
        return out

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[CompressedCache, int]]) -> CompressedCache:
        """A new cache of sequences that other caches hold, which stay as they are.

        Args:
            rows: each sequence's cache, and its place there; the keys of all were made by one origin's model and
                positions, as `Origin.check` has it.
        """
        out, first = cls(), rows[0][0]
        out.headroom = max((c.headroom for c, _ in rows if c.headroom is not None), default=None)
        out.origin = first.origin
        layers = [
            layer_of([c.layers[i].row(b) for c, b in rows], [c.layers[i].tokens_seen[b] for c, b in rows], out)
            for i in range(len(first.layers))
        ]
        tokens = [c.tokens[b] for c, b in rows]
        places = Continuation.stack([c.continuation.select(c.next_position.new_tensor([b]).long()) for c, b in rows])
        out.commit(layers, max(tokens), tokens, places, max(c.rotary_length for c, _ in rows))
        return out

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row `beam_idx[i]` row i, as the host does with beams."""
        for layer in self.layers:
            layer.select_rows(beam_idx)
        self.continuation = self.continuation.select(beam_idx.to(self.next_position.device))
        self.tokens = tuple(self.tokens[i] for i in beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.next_position)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless there is nothing to remove: evicted entries cannot come back."""
        if tokens_to_remove != 0:
            raise InputError("a compressed cache cannot be rolled back: assisted decoding is not supported")
