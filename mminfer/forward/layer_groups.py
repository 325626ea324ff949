"""Layers of a prompt pass that are compressed together: what a GPU is asked for is then asked once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mminfer.forward.layer_attention import LayerAttention
from mminfer.technique import CacheTechnique, LayerView, checked_entries

PART = 4  # a layer in so many waits, at most
MOST_BYTES = 1 << 27  # of what waits; compressing takes a few times as much again

Passed = tuple[LayerAttention, Tensor | None]  # a layer behind its pass, and the rows that went through its FFN


def most_together(device: torch.device, depth: int) -> int:
    """How many layers of a model may wait to be compressed together; 1: none does.

    On a CPU a launch costs nothing, and what was just written is still in its caches.
    """
    return 1 if device.type == "cpu" else max(1, depth // PART)


class LayerGroup:
    """Layers whose entries wait until there are so many of them, or so many bytes; then they are compressed together.

    Args:
        technique: compresses them, `together`; None: each layer is done as it comes.
        most: layers that may wait.
    """

    def __init__(self, technique: CacheTechnique | None, most: int) -> None:
        self._technique, self._most = technique, most
        self._waiting: list[Passed] = []

    def add(self, attend: LayerAttention, ffn: Tensor | None) -> Sequence[Passed]:
        """Takes in a layer; gives those that are done now, in their order."""
        self._waiting.append((attend, ffn))
        held = sum(_bytes_of(view) for attend, _ in self._waiting for view in attend.views if view is not None)
        waits = self._technique is not None and len(self._waiting) < self._most and held < MOST_BYTES
        return () if waits else self.rest()

    def rest(self) -> Sequence[Passed]:
        """Those that wait, compressed."""
        done, self._waiting = self._waiting, []
        if self._technique is not None and done:
            places = [(attend, b) for attend, _ in done for b in range(len(attend.views))]
            compress_together(self._technique, places)
        return done


def compress_together(technique: CacheTechnique, places: Sequence[tuple[LayerAttention, int]]) -> None:
    """Has the technique compress what is held of these layers and sequences, at once."""
    held = [(attend, b, view) for attend, b in places if (view := attend.views[b]) is not None]
    found = technique.apply_layers([view for *_, view in held])
    for (attend, b, view), entries in zip(held, found, strict=True):
        attend.replace_entries(b, checked_entries(technique, entries, view.entries))
        attend.views[b] = None


def _bytes_of(view: LayerView) -> int:
    return view.entries.nbytes + view.queries.nbytes
