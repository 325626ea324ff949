"""What a technique is shown of a layer: its entries, and the work that was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

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
    def of(cls, columns: Mapping[str, Tensor | None]) -> CacheEntries:
        """From columns by name.

        Raises:
            KeyError: there are no keys or no values.
        """
        given = {name: column for name, column in columns.items() if column is not None}
        return cls(given.pop("keys"), given.pop("values"), **given)

    @property
    def columns(self) -> dict[str, Tensor | None]:
        """Every column by name; None for those that nobody asked for."""
        return {name: getattr(self, name) for name in COLUMNS}

    def last(self, count: int) -> CacheEntries:
        """The last `count` of these entries, or all there are."""
        start = max(0, len(self) - count)
        return CacheEntries.of({n: None if x is None else x[:, :, start:] for n, x in self.columns.items()})

    def kept(self, places: Tensor, keys: Tensor, values: Tensor) -> CacheEntries:
        """The entries at these places ([1, G, S] int64), with keys and values that others were merged into."""
        others = {n: None if x is None else x.gather(2, places) for n, x in self.columns.items() if n not in _PAIR}
        return CacheEntries.of({"keys": keys, "values": values, **others})

    def extend(self, new: CacheEntries) -> CacheEntries:
        """These entries, then the new ones."""
        theirs = new.columns
        joined = {
            name: None if x is None or (y := theirs[name]) is None else torch.cat([x, y], 2)
            for name, x in self.columns.items()
        }
        return CacheEntries.of(joined)


COLUMNS = tuple(field.name for field in fields(CacheEntries))
_PAIR = ("keys", "values")


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
