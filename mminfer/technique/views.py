"""What a technique is shown of a layer: its entries, one view of all that is at hand, and the work that was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CacheEntries:
    """One sequence's entries in one layer, in order of position.

    Columns beyond keys and values are there where the cache technique asks for them (`CacheTechnique.columns`).

    Args:
        keys: [1, G, S, D], rotated.
        values: [1, G, S, D].
        is_visual: [1, G, S] bool.
        score: [1, G, S] float32, the attention that each entry received so far; 0 for one that is new.
        size: [1, G, S] float32, how many entries of the prompt each stands for; 1 for one that is new.
        source: [1, G, S] int64, the row of its pass's packed prompt that each came from.
    """

    keys: Tensor
    values: Tensor
    is_visual: Tensor | None = None
    score: Tensor | None = None
    size: Tensor | None = None
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

    def select(self, places: Tensor) -> CacheEntries:
        """The entries at these places ([1, G, S] int64, ascending); all columns stay side by side."""
        wide = places[..., None].expand(*places.shape, self.keys.shape[-1])
        return self.merged(places, self.keys.gather(2, wide), self.values.gather(2, wide))

    def merged(self, places: Tensor, keys: Tensor, values: Tensor, size: Tensor | None = None) -> CacheEntries:
        """The entries at these places, with keys and values that others were merged into.

        Args:
            places: [1, G, S] int64, ascending.
            keys: [1, G, S, D].
            values: [1, G, S, D].
            size: [1, G, S] float32, how many entries each stands for now; None: as many as before.
        """
        others = {n: None if x is None else x.gather(2, places) for n, x in self.columns.items() if n not in _PAIR}
        if size is not None:
            others["size"] = size
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


@dataclass(frozen=True, eq=False)
class LayerView:
    """One sequence in one layer of a prompt pass, right behind its attention: all that a technique may look at.

    Args:
        queries: [1, H, S, D], rotated, of this pass.
        entries: what the layer holds of the sequence, [1, G, N, D]; those of this pass come last.
        is_visual: [R] bool, of the rows of this pass, whose keys are the last R.
        query_index: [S] int64, the place of each query among the entries; None: the last S places.
        scale: factor of the attention's logits.
        layer_idx: which layer.
        num_layers: depth of the model.
        prompt_tokens: with how many tokens the sequence entered the language model in this pass.
        tokens_seen: tokens that the layer has taken in over all passes, this one included.
        attention_mass: [1, H, N] float32, the attention that each entry receives from all queries; None unless the
            cache technique asks for it, and there too where a layer's attention cannot give it.
    """

    queries: Tensor
    entries: CacheEntries
    is_visual: Tensor
    query_index: Tensor | None
    scale: float
    layer_idx: int
    num_layers: int
    prompt_tokens: int
    tokens_seen: int
    attention_mass: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """[1, G, N, D], rotated."""
        return self.entries.keys

    @property
    def query_places(self) -> Tensor:
        """[S] int64: the place of each query among the entries."""
        if self.query_index is not None:
            return self.query_index
        return torch.arange(len(self.entries) - self.queries.shape[2], len(self.entries), device=self.queries.device)


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
