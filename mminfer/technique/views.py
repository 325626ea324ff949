"""What a technique is shown of a layer: one view of all that is at hand, and the work that was done."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mminfer.technique.entries import CacheEntries


@dataclass(frozen=True, eq=False)
class KnownRows:
    """What the host knows of one sequence's rows on a GPU, so that it need not wait for that to ask.

    Args:
        visual: how many are visual.
        ends_visual: whether the last one is.
        is_visual: [R] bool, on the CPU; None: which of them are visual is not known there.
    """

    visual: int
    ends_visual: bool
    is_visual: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerView:
    """One sequence in one layer of a prompt pass, right behind its attention: all that a technique may look at.

    Args:
        queries: [1, H, S, D], rotated, of this pass.
        entries: what the layer holds of the sequence, [1, G, N, D]; those of this pass come last. Where an earlier pass
            left heads of different lengths they are packed, and those of this pass come last in each head.
        is_visual: [R] bool, of the rows of this pass, whose keys are the last R.
        query_index: [S] int64, the place of each query among the entries, of the longest head where they differ; None:
            the last S places.
        scale: factor of the attention's logits.
        layer_idx: which layer.
        num_layers: depth of the model.
        prompt_tokens: with how many tokens the sequence entered the language model in this pass.
        tokens_seen: tokens that the layer has taken in over all passes, this one included.
        attention_mass: [1, H, N] float32, the attention that each entry receives from all queries; None unless the
            cache technique asks for it, and there too where a layer's attention cannot give it.
        known: what of `is_visual` the host knows without asking; None: it is asked.
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
    known: KnownRows | None = None

    @property
    def rows(self) -> KnownRows:
        """What the host knows of the rows of this pass; it waits for what it does not know yet."""
        if self.known is not None:
            return self.known
        here = self.is_visual.cpu()
        return KnownRows(int(here.sum()), len(here) > 0 and bool(here[-1]), here)

    @property
    def keys(self) -> Tensor:
        """[1, G, N, D], rotated."""
        return self.entries.keys

    @property
    def query_places(self) -> Tensor:
        """[S] int64: the place of each query among the entries, of the longest head where they differ."""
        if self.query_index is not None:
            return self.query_index
        longest = max(self.entries.lengths)
        return torch.arange(longest - self.queries.shape[2], longest, device=self.queries.device)

    @property
    def kind(self) -> Hashable:
        """What views must have in common to be `stacked`; packed ones have it in common with no other."""
        entries, mass, index = self.entries, self.attention_mass, self.query_index
        own = (id(entries) if entries.is_packed else None, None if index is None else id(index), mass is None)
        columns = tuple(name for name, x in entries.columns.items() if x is not None)
        shapes = (entries.keys.shape, entries.keys.dtype, self.queries.shape, self.queries.dtype, self.is_visual.shape)
        return (entries.keys.device, own, columns, shapes, self.scale, self.tokens_seen, self.prompt_tokens)

    @classmethod
    def stacked(cls, views: Sequence[LayerView]) -> LayerView:
        """One view of several layers or sequences of one `kind`, side by side along the first axis of its columns.

        What is no column, such as `is_visual` and `layer_idx`, is the first one's; what the host knows is forgotten.
        """
        first = views[0]
        if len(views) == 1:
            return first
        masses = [view.attention_mass for view in views if view.attention_mass is not None]
        return replace(
            first,
            queries=torch.cat([view.queries for view in views]) if first.queries.numel() else first.queries,
            entries=CacheEntries.stacked([view.entries for view in views]),
            attention_mass=torch.cat(masses) if masses else None,
            known=None,
        )

    def heads(self) -> list[LayerView]:
        """The view of each key/value head by itself, with the queries of its group."""
        lengths, parts = self.entries.lengths, self.entries.heads()
        groups = zip(self.queries.chunk(len(parts), 1), parts, lengths, strict=True)
        longest, places, mass = max(lengths), self.query_index, self.attention_mass
        masses = [None] * len(parts) if mass is None or self.entries.is_packed else mass.chunk(len(parts), 1)
        return [
            replace(
                self,
                queries=queries,
                entries=entries,
                query_index=None if places is None else places - (longest - length),
                attention_mass=of_head,
            )
            for (queries, entries, length), of_head in zip(groups, masses, strict=True)
        ]


@dataclass(frozen=True)
class LayerWork:
    """What a technique worked on in one layer, one sequence: a cost follows from it.

    Args:
        layer_idx: which layer.
        seen: tokens the layer has taken in over all passes, this one included.
        visual: visual rows of this pass.
        queries: rows that issued a query.
        keys: entries a head they looked among, in the end with the last queries' own.
        pairs: query-key pairs a head that the attention looked at.
        kept: entries a head that stayed in the cache; like these two the mean over the heads where they differ.
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
