"""A decoding step over one cache as it lies in memory, in which all that changes from step to step is in tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from mminfer.forward.attention import routed_attention
from mminfer.forward.cuda_graph import Recording
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.rotary import Tables
from mminfer.forward.static_rows import StaticRows
from mminfer.models.adapter import ModelAdapter


class StepInputs(NamedTuple):
    """What a step is given beside its cache.

    Args:
        hidden_states: [B, 1, C].
        tables: rotary, of each kind of layer.
        arguments: what else the layers are given.
    """

    hidden_states: Tensor
    tables: Tables
    arguments: dict[str, Tensor]

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All of them, in one order."""
        yield self.hidden_states
        for table in self.tables.values():
            yield from table
        yield from self.arguments.values()

    @property
    def kinds(self) -> list[tuple[Any, ...]]:
        """What must be the same of two steps' inputs for one recording to serve both."""
        names = *self.tables, *self.arguments, torch.is_inference_mode_enabled()
        return [names, *((x.shape, x.dtype, x.device) for x in self.tensors)]

    def copied(self) -> StepInputs:
        """At places of their own."""
        tables = {kind: (cos.clone(), sin.clone()) for kind, (cos, sin) in self.tables.items()}
        return StepInputs(self.hidden_states.clone(), tables, {name: x.clone() for name, x in self.arguments.items()})


class Places(NamedTuple):
    """Where a cache lies.

    Args:
        holders: what holds the entries of each layer, another object wherever they lie elsewhere.
        counts: of each layer, what grows by one with each step.
    """

    holders: tuple[object, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, cache: CompressedCache) -> Places:
        """After making room for a new entry."""
        return cls(*zip(*(layer.with_room() for layer in cache.layers), strict=True))


class Moorings:
    """Whether everything is still where it was: a cache's entries, and the weights of the host's layers.

    Args:
        adapter: the host model.
        places: of the cache, of whose memory nothing is kept alive.
    """

    def __init__(self, adapter: ModelAdapter, places: Places) -> None:
        modules = [m for part in adapter.step_modules for m in part.modules()]
        self._own = [own for m in modules for own in (m._parameters, m._buffers) if own]
        self._holders, self._begin, self._addresses = [ref(x) for x in places.holders], places.counts, self._found()

    def steps(self, places: Places) -> int | None:
        """How many steps the cache has gone on since; None: something is elsewhere."""
        moved = any(old() is not new for old, new in zip(self._holders, places.holders, strict=True))
        steps = {now - then for now, then in zip(places.counts, self._begin, strict=True)}
        return None if moved or len(steps) > 1 or self._addresses != self._found() else steps.pop()

    def _found(self) -> list[int]:
        return [x.data_ptr() for own in self._own for x in own.values() if x is not None]


class StaticStep:
    """A step over one cache as it lies in memory: it runs as it is once, is then recorded, and from then on replayed.

    Lengths, and the rows into which new entries go, follow from one number on the device, of the steps taken, which the
    step itself counts up.

    Args:
        adapter: the host model.
        cache: with room for an entry.
        places: of that cache.
        inputs: like those that `run` is to be given.
    """

    def __init__(self, adapter: ModelAdapter, cache: CompressedCache, places: Places, inputs: StepInputs) -> None:
        device = inputs.hidden_states.device
        self._adapter, self._kinds, self._inputs = adapter, inputs.kinds, inputs.copied()
        self._moorings, self._recording = Moorings(adapter, places), Recording(device)
        self._taken = torch.zeros(1, dtype=torch.int64, device=device)
        self._told = 0  # what is in `_taken` as soon as the device comes to it
        self._has_run = False
        self._rows = [layer.static_rows() for layer in cache.layers]  # until the step is recorded
        self._lengths = torch.stack([_level(x.lengths) for x in self._rows]) + 1
        self._new_rows = torch.stack([_level(x.first) for x in self._rows]) + self._lengths - 1

    @property
    def is_recorded(self) -> bool:
        """Whether the next step is replayed."""
        return self._recording.is_there

    def steps(self, places: Places, inputs: StepInputs) -> int | None:
        """How many steps the cache has gone on since the first; None: this is no step of such a cache or inputs."""
        if inputs.kinds != self._kinds or not self._recording.is_of_this_stream:
            return None
        return self._moorings.steps(places)

    def run(self, taken: int, inputs: StepInputs) -> Tensor:
        """Logits [B, 1, vocabulary], the new entries written ahead in the cache.

        Args:
            taken: what `steps` says.
            inputs: of this step.
        """
        for place, x in zip(self._inputs.tensors, inputs.tensors, strict=True):
            place.copy_(x)
        if taken != self._told:  # steps were taken back
            self._taken.fill_(taken)
        self._told = taken + 1
        if self._has_run and not self.is_recorded:
            self._recording.record(self._step)
            self._rows = []
        if self.is_recorded:
            return self._recording.replay().clone()
        logits = self._recording.run_aside(self._step)
        self._has_run = True
        return logits

    def _step(self) -> Tensor:
        adapter, (hidden_states, tables, arguments) = self._adapter, self._inputs
        lengths, new_rows = self._lengths + self._taken, self._new_rows + self._taken
        with routed_attention(adapter.text_config):
            for i, (layer, kind) in enumerate(zip(adapter.layers, adapter.layer_kinds, strict=True)):
                own, count = self._rows[i], self._rows[i].first.numel()
                rows = own._replace(lengths=lengths[i, :count].view(own.first.shape))
                hidden_states = layer(
                    hidden_states,
                    position_embeddings=tables[kind],
                    attention_mask=None,
                    use_cache=False,
                    attend=partial(StaticRows.attend, rows, new_rows[i, :count]),
                    **arguments,
                )
        logits = adapter.logits(hidden_states)
        self._taken.add_(1)
        return logits


def _level(x: Tensor) -> Tensor:
    """[B, G] -> [B * G], or one more, so that each layer's part begins at 16 bytes: kernels ask whether it does."""
    return torch.nn.functional.pad(x.flatten(), (0, x.numel() % 2))
