"""Decoding steps over the host's modules as CUDA graphs: one for a cache, recorded once and replayed for each token."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from mminfer_kernels.tracing import watched
from torch import Tensor, nn

from mminfer.errors import shortened
from mminfer.forward.cuda_graph import can_record
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.rotary import Tables
from mminfer.forward.static_step import Places, StaticStep, StepInputs
from mminfer.forward.waits import Unwaiting
from mminfer.models.adapter import ModelAdapter

logger = logging.getLogger(__name__)

SWITCH = "MMINFER_CUDA_GRAPHS"  # of the environment: 0 turns all of it off
MOST_GRAPHS = 4  # at a time, of one engine's call or one patch; beyond, the oldest goes

# What is known of language models: why their steps cannot be recorded; "" where one was seen to wait for nothing.
_verdicts: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class _Seen(NamedTuple):
    """What is known of a cache.

    Args:
        holder: of its first layer's entries, which tells whether they were copied since.
        step: over it; None: it was at other places a step ago, and may be at others in a step.
    """

    holder: ref[object]
    step: StaticStep | None


class GraphedSteps:
    """Runs steps as graphs where a model's can be recorded; elsewhere, and in between, the caller goes another way.

    A cache that lies elsewhere than a step ago gets a new graph once it stayed for a step: beams copy it each time.

    Args:
        adapter: the host model.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self._on = os.environ.get(SWITCH, "1") != "0"
        self._caches: WeakKeyDictionary[CompressedCache, _Seen] = WeakKeyDictionary()
        self._devices: set[torch.device] = set()

    def refresh(self) -> None:
        """Forgets all graphs, and looks afresh where the weights are."""
        self._caches.clear()
        self._devices = set()

    def takes(self, device: torch.device) -> bool:
        """Whether steps of the model on this device may be recorded, as far as is known."""
        if not self._on or watched() or not can_record(device) or torch.is_autocast_enabled(device.type):
            return False
        if not self._devices:
            modules = self._adapter.step_modules
            self._devices = {x.device for m in modules for x in (*m.parameters(), *m.buffers())}
        return self._devices == {device} and not _verdicts.get(self._adapter.language_model)

    def has(self, cache: CompressedCache) -> bool:
        """Whether there is a graph of this cache."""
        seen = self._caches.get(cache)
        return seen is not None and seen.step is not None and seen.step.is_recorded

    def __call__(self, hidden_states: Tensor, tables: Tables, cache: CompressedCache) -> Tensor | None:
        """Logits [B, 1, vocabulary], the new entries written ahead in the cache; None: this step goes another way."""
        arguments = self._adapter.layer_arguments(cache.next_position[:, None], hidden_states.device)
        inputs, places = StepInputs(hidden_states, tables, arguments), Places.of(cache)
        try:
            step, taken = self._step_over(cache, places, inputs)
            if step is None:
                return None
            is_known = self._adapter.language_model in _verdicts
            with nullcontext() if is_known else Unwaiting():
                logits = step.run(taken, inputs)
        except Exception as error:  # modules raise anything, and a step that is wrong in itself fails again without
            self._on = False
            if not isinstance(error, torch.OutOfMemoryError):  # another time there may be enough
                refuse(self._adapter, str(error).strip().partition("\n")[0])
            self._caches.clear()
            return None
        _verdicts.setdefault(self._adapter.language_model, "")
        return logits

    def _step_over(self, cache: CompressedCache, places: Places, inputs: StepInputs) -> tuple[StaticStep | None, int]:
        """The step over this cache, made if need be, and how many were taken since; None: it has just come there."""
        seen = self._caches.get(cache)
        taken = None if seen is None or seen.step is None else seen.step.steps(places, inputs)
        if seen is not None and taken is not None:
            return seen.step, taken
        settled = seen is None or seen.holder() is places.holders[0]
        step = StaticStep(self._adapter, cache, places, inputs) if settled else None
        while len(self._caches) >= MOST_GRAPHS and cache not in self._caches:
            del self._caches[next(iter(self._caches.keys()))]
        self._caches[cache] = _Seen(ref(places.holders[0]), step)
        return step, 0


def refuse(adapter: ModelAdapter, reason: str) -> None:
    """Records no step of this model any more, and says so once."""
    if not _verdicts.get(adapter.language_model):
        _verdicts[adapter.language_model] = reason or "no reason given"
        logger.warning("mminfer: decoding goes on without CUDA graphs: %s", shortened(reason))
