"""What a technique is shown of a layer: its entries, and the work that was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CacheEntries:
    """One sequence's entries in one layer, in order of position.

    Args:
        keys: [1, G, S, D], rotated.
        values: [1, G, S, D].
        is_visual: [1, G, S] bool; None where no cache technique will ask.
        score: [1, G, S] float32, attention received so far; None where no cache technique will ask.
        source: [1, G, S] int64, the row of its pass's packed prompt that each came from; None unless the cache
            technique traces entries.
    """

    keys: Tensor
    values: Tensor
    is_visual: Tensor | None = None
    score: Tensor | None = None
    source: Tensor | None = None

    def __len__(self) -> int:
        return self.keys.shape[2]

    @classmethod
    def of(cls, columns: Sequence[Tensor | None]) -> CacheEntries:
        """From keys, values, is_visual, score and source in this order."""
        keys, values, *others = columns
        if keys is None or values is None:
            raise ValueError("entries without keys or values")
        return cls(keys, values, *others)

    @property
    def columns(self) -> list[Tensor | None]:
        """Keys, values, is_visual, score and source."""
        return [self.keys, self.values, self.is_visual, self.score, self.source]

    def last(self, count: int) -> CacheEntries:
        """The last `count` of these entries, or all there are."""
        start = max(0, len(self) - count)
        return CacheEntries.of([None if x is None else x[:, :, start:] for x in self.columns])

    def kept(self, places: Tensor, keys: Tensor, values: Tensor) -> CacheEntries:
        """The entries at these places ([1, G, S] int64), with keys and values that others were merged into."""
        others = (None if x is None else x.gather(2, places) for x in self.columns[2:])
        return CacheEntries.of([keys, values, *others])

    def extend(self, new: CacheEntries) -> CacheEntries:
        """These entries, then the new ones."""
        pairs = zip(self.columns, new.columns, strict=True)
        return CacheEntries.of([None if a is None or b is None else torch.cat([a, b], 2) for a, b in pairs])


@dataclass(frozen=True)
class LayerWork:
    """What a technique worked on in one layer, one sequence: a cost follows from it.

    Args:
        layer_idx: which layer.
        seen: tokens the layer has taken in over all passes, this one included.
        visual: visual rows of this pass.
        queries: rows that issued a query.
        keys: entries they looked among, in the end with the last queries' own.
        pairs: query-key pairs that the attention looked at.
        kept: entries a head that stayed in the cache.
        mass_given: whether the attention handed over what each entry receives, and its cost is counted with it.
    """

    layer_idx: int
    seen: int
    visual: int
    queries: int
    keys: int
    pairs: int
    kept: int
    mass_given: bool = False
