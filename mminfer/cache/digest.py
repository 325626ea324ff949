"""A cache for questions yet to come: every picture keeps a digest of itself, as detailed as each layer is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from mminfer.cache.digest_demand import (
    asking,
    change_of_readings,
    demands,
    narrowed,
    quartile,
    query_places_on_host,
    visual_of,
    visual_on_host,
)
from mminfer.cache.digest_pieces import digested
from mminfer.cache.digest_rules import PIECE, SPREADS, Piece, Rule, pieces_of, runs_of, share_out, sizes_of
from mminfer.errors import ConfigError, shown
from mminfer.technique import (
    CACHE_SHARES,
    CacheEntries,
    CacheTechnique,
    LayerView,
    LayerWork,
    by_device,
    check_fraction,
    is_bundled,
    is_number,
    is_whole,
)

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec

MOST_CONTRAST = 100  # beyond, the neediest layer has all there is anyway


@dataclass(frozen=True)
class Digest(CacheTechnique):
    """Entries are shared out over layers by need, over pictures evenly, and what is alike becomes one.

    A layer needs detail where a picture's entries, replaced by their mean standing for all of them, would change what
    text reads out of them from token to token. Layers that read a mean anyway keep a few entries a picture. Within a
    picture entries spread over its keys and values, farthest first; each other one is averaged into the nearest. Text
    stays, unless it takes more than its share of the budget: then it is digested likewise, but for the last of it
    behind the last picture, which is what was asked. All layers are compressed together, behind the last one, in each
    pass anew.

    Args:
        ratio: entries kept, as a fraction of the tokens that the layers took in, in (0, 1].
        budget: entries a head of the average layer, in place of the ratio.
        text_share: of all entries, what text may take at most, in (0, 1]; less where pictures would not get one each.
        recent: entries of text behind the last picture that stay as they are, if they fit in half of the budget.
        contrast: power of the need by which layers share; 0 shares evenly.
        queries: text queries whose reading tells the need, evenly spread over those of a pass.
        spread: which entries of a picture stay: "farthest" apart, or "even" along it.
        join: whether those that do not stay are averaged into the nearest that does, or dropped.

    Raises:
        ConfigError: a setting is out of range.

    Reference:
        Ours. Standing in for many by the logarithm of their number is proportional attention (ToMe, arXiv 2210.09461);
        layers with budgets of their own are in PyramidKV (arXiv 2406.02069) and VL-Cache (arXiv 2410.23317), by other
        measures; spreading by the farthest point is the greedy k-centre rule.
    """

    ratio: float = 0.2
    budget: int | None = None
    text_share: float = 0.5
    recent: int = 64
    contrast: float = 2.0
    queries: int = 64
    spread: str = "farthest"
    join: bool = True

    across_layers: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("is_visual", "size")

    def __post_init__(self) -> None:
        check_fraction("Digest.ratio", self.ratio)
        check_fraction("Digest.text_share", self.text_share)
        if self.budget is not None and not is_whole(self.budget, least=1):
            raise ConfigError(f"Digest.budget={shown(self.budget)}, wanted a number of entries, 1 or more, or None")
        if not is_whole(self.recent, least=0):
            raise ConfigError(f"Digest.recent={shown(self.recent)}, wanted a number of entries, 0 or more")
        power = is_number(self.contrast, most=MOST_CONTRAST) and self.contrast >= 0
        if not power or not is_whole(self.queries, least=1):
            raise ConfigError(
                f"Digest(contrast={shown(self.contrast)}, queries={shown(self.queries)}): wanted a power of 0 or more, "
                f"{MOST_CONTRAST} at most, and at least one query"
            )
        if self.spread not in SPREADS or not isinstance(self.join, bool):
            raise ConfigError(
                f"Digest(spread={shown(self.spread)}, join={shown(self.join)}): wanted one of {', '.join(SPREADS)}, "
                "and True or False"
            )

    def apply(self, view: LayerView) -> CacheEntries:
        """One layer by itself."""
        return self.compress_layers([view.entries], [1.0], [view.tokens_seen])[0]

    def layer_demand(self, view: LayerView) -> float | Tensor:
        """How much of what text reads in this layer is detail of pictures: 0 where a mean of each would do.

        The first quartile over text queries of |o - o'| / |o|, where o is what the heads read among all entries, o'
        the same with each picture as one entry, and what all queries have in common is taken off the difference.
        """
        entries, queries = view.entries, view.queries
        is_visual = visual_on_host(view)
        if is_visual is None or queries.shape[2] == 0 or not bool(is_visual.any()):
            return 0.0
        chosen = asking(is_visual[query_places_on_host(view)], self.queries).to(queries.device, non_blocking=True)
        demand = quartile(change_of_readings(queries[:, :, chosen], entries, is_visual, view.scale))[0]
        return float(demand) if demand.device.type == "cpu" else demand  # on a GPU read with those of all layers

    @property
    def together(self) -> bool:
        return is_bundled(type(self))

    def held(self, view: LayerView) -> LayerView:
        return replace(view, queries=narrowed(view, self.queries), query_index=None)

    def apply_layers(self, views: Sequence[LayerView]) -> list[CacheEntries]:
        layers, tokens_seen = [view.entries for view in views], [view.tokens_seen for view in views]
        if self._keeps_all(layers, tokens_seen):
            return layers
        facts = _known_on_host(views) or _on_host(layers)
        return self._shared_out(layers, demands(views, facts.is_visual), tokens_seen, facts)

    def compress_layers(
        self, layers: Sequence[CacheEntries], demands: Sequence[float], tokens_seen: Sequence[int]
    ) -> list[CacheEntries]:
        if self._keeps_all(layers, tokens_seen):
            return list(layers)
        return self._shared_out(layers, demands, tokens_seen, _on_host(layers))

    def _keeps_all(self, layers: Sequence[CacheEntries], tokens_seen: Sequence[int]) -> bool:
        """Whether nothing has to leave, or nobody knows what is visual."""
        unknown = any(entries.is_visual is None for entries in layers)
        return unknown or sum(map(len, layers)) <= self._total(tokens_seen)

    def _total(self, tokens_seen: Sequence[int]) -> float:
        """Entries of all layers together."""
        return sum(tokens_seen) * self.ratio if self.budget is None else self.budget * len(tokens_seen)

    def _shared_out(
        self, layers: Sequence[CacheEntries], demands: Sequence[float], tokens_seen: Sequence[int], facts: _Facts
    ) -> list[CacheEntries]:
        """What is left of all layers' entries, more of them than there may be."""
        total, flags = self._total(tokens_seen), facts.is_visual
        runs = [len(runs_of(v)) for v in flags]
        tails = [
            min(self.recent, _most_recent(int(total / len(layers)), n), _text_behind_pictures(v))
            for v, n in zip(flags, runs, strict=True)
        ]
        total -= sum(tails)
        texts = [int((~v).sum()) - tail for v, tail in zip(flags, tails, strict=True)]
        pictures = [int(v.sum()) for v in flags]
        of_text = max(min(sum(texts), self.text_share * total, total - sum(runs)), total - sum(pictures))
        text = share_out(texts, [1.0] * len(layers), max(int(of_text), len(layers)))
        weights = [demand**self.contrast for demand in demands]
        left = max(int(total) - sum(text), 0)
        image = share_out(pictures, weights, left, share_out(runs, runs, left))
        kept = zip(text, image, tails, strict=True)
        pieces = [_pieces(*parts) for parts in zip(flags, facts.sizes, kept, strict=True)]
        out = list(layers)
        for own in by_device(layers):
            found = digested([layers[i] for i in own], [pieces[i] for i in own], Rule(self.spread, self.join))
            for i, entries in zip(own, found, strict=True):
                out[i] = entries
        return out

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        """Logits and readings of so many pairs of a query and an entry."""
        return 4 * spec.num_attention_heads * spec.head_dim * sum(lengths)

    def layer_cost(self, spec: ModelSpec, work: LayerWork) -> int:
        """What the need reads, and distances of entries to those that stay, twice: to choose them and to join them."""
        read = self.cost(spec, [min(self.queries, work.queries) * work.keys])
        near = min(PIECE, work.keys) * work.kept if work.kept < work.keys else 0
        return read + 8 * spec.num_key_value_heads * spec.head_dim * near

    def describe(self) -> str:
        entries = f"{100 * self.ratio:g} % of the entries" if self.budget is None else f"{self.budget:,} entries a head"
        return (
            f"Keeps {entries}, shared out over layers by the detail that each reads and evenly over pictures; "
            f"{self.describe_evicted()}."
        )

    def describe_evicted(self) -> str:
        return "the rest was joined to the nearest in its picture" if self.join else "the rest was dropped"

    @classmethod
    def presets(cls) -> dict[str, Self]:
        # For chats, streams and cached documents, whose questions come later.
        return {"digest-50": cls(ratio=0.5), "digest-20": cls(ratio=0.2), "digest-8k": cls(budget=8192)}

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        return {"Digest": {f"{share} %": cls(share / 100) for share in CACHE_SHARES}}


class _Facts(NamedTuple):
    """What the host knows of the entries of all layers.

    Args:
        is_visual: of each layer [N] bool, on the CPU.
        sizes: of each layer [N] float32, on the CPU: how many entries of the prompt each stands for.
    """

    is_visual: Sequence[Tensor]
    sizes: Sequence[Tensor]


def _known_on_host(views: Sequence[LayerView]) -> _Facts | None:
    """What is known without asking the device: where all entries are of this pass. None: it is not."""
    known = [None if view.known is None else view.known.is_visual for view in views]
    flags = [v for v, view in zip(known, views, strict=True) if v is not None and len(v) == len(view.entries)]
    return None if len(flags) < len(views) else _Facts(flags, [torch.ones(len(v)) for v in flags])


def _on_host(layers: Sequence[CacheEntries]) -> _Facts:
    """The same of any entries that know what is visual, fetched together."""
    flags = [v for v in map(visual_of, layers) if v is not None]
    columns = [*flags, *(sizes_of(entries)[0] for entries in layers)]
    if columns[0].device.type == "cpu" or len({column.device for column in columns}) > 1:
        here = [column.cpu() for column in columns]
    else:
        here = list(torch.cat([x.float() for x in columns]).cpu().split([len(column) for column in columns]))
    return _Facts([v.bool() for v in here[: len(layers)]], here[len(layers) :])


def _pieces(is_visual: Tensor, sizes: Tensor, kept: tuple[int, int, int]) -> list[Piece]:
    """Pieces of one layer's entries, and how many of each are to be left.

    Args:
        is_visual: [N] bool, on the CPU, of the layer's entries.
        sizes: [N] float32, on the CPU, how many each stands for.
        kept: how many of text and of pictures, and how many last ones stay as they are.
    """
    text, image, tail = kept
    tail = tail or int(text + image == 0)  # a layer is never left empty
    places = torch.arange(len(is_visual))
    end = len(is_visual) - tail
    older = places < end
    parts = ((places[~is_visual & older], text, False), (places[is_visual], image, True), (places[end:], tail, False))
    return [piece for rows, n, each in parts if n > 0 for piece in pieces_of(rows, sizes[rows], n, each)]


def _most_recent(budget: int, pictures: int) -> int:
    """How many entries of a layer may stay as they are: half, unless pictures need one each, and older text another."""
    room = budget - pictures - 1
    return min(budget // 2, room) if room > 0 else budget // 2


def _text_behind_pictures(is_visual: Tensor) -> int:
    """Entries behind the last visual one."""
    visual = is_visual.nonzero()[:, 0]
    return len(is_visual) - (int(visual[-1]) + 1 if len(visual) else 0)
