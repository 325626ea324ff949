"""LOOK-M: after the prompt pass keep text and what is looked at, merge the rest of the cache into it."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from mminfer_kernels import column_mass
from torch import Tensor

from mminfer.cache.lookm_rules import MERGES, lookm_keep, lookm_merge
from mminfer.errors import ConfigError, shown
from mminfer.technique import (
    CACHE_SHARES,
    CacheEntries,
    CacheTechnique,
    LayerView,
    LayerWork,
    check_fraction,
    fetched,
    is_bundled,
    is_whole,
)

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec

QUERIES = ("all", "strided", "last")
OVERFLOWS = ("evict", "keep")


class _Quotas(NamedTuple):
    """How many entries stay of a view.

    Args:
        important: before the recent window.
        recent: in it.
        bounded: whether text counts among `important`, however much there is.
        texts: entries of text before the window, the most of all heads; None: nobody asks.
    """

    important: int
    recent: int
    bounded: bool
    texts: int | None


@dataclass(frozen=True)
class LookM(CacheTechnique):
    """LOOK-M: text and recent entries stay, and what is looked at most; the rest is merged into what stays.

    The cache ends at `recent + max(important, text before the recent window)` entries a head; with a `budget`, at no
    more than that. When a prompt comes in chunks, the attention that entries receive is added up over them and the
    cache is compressed behind each.

    Args:
        important_ratio: entries before the recent window, as a fraction of the tokens a layer took in, in (0, 1];
            or one for each layer.
        recent_ratio: entries at the end, likewise, in [0, 1].
        merge: "average", "weighted", "pivot", or "none" to evict only.
        text_prior: whether every text entry stays.
        budget: entries a head in place of ratios, shared out between important and recent as the ratios are.
        recent: how many of the budget are recent ones, in place of that share.
        text_overflow: what gives way when text alone, which comes first, is more than the budget leaves it. "evict":
            the text that is looked at least, as visual entries do, so that a budget is a bound; "keep": the budget, so
            that every text entry stays, as published. Without a budget all text always stays.
        queries: whose attention counts: "all" (the paper's), "strided" (every `stride`-th query, the last one among
            them) or "last" (the last `window` queries).
        stride: of strided queries.
        window: how many the last queries are.

    Raises:
        ConfigError: a setting is out of range.

    Reference:
        LOOK-M (arXiv 2406.18139) section 3; the paper's settings are 0.1 + 0.1 and, as the hard case, 0.025 + 0.025.
        With grouped heads the scores of a group are summed, which is ours.
    """

    important_ratio: float | tuple[float, ...] = 0.1
    recent_ratio: float | tuple[float, ...] = 0.1
    merge: str = "pivot"
    text_prior: bool = True
    budget: int | None = None
    recent: int | None = None
    text_overflow: str = "evict"
    queries: str = "all"
    stride: int = 8
    window: int = 64

    columns: ClassVar[tuple[str, ...]] = ("is_visual", "score")
    # Which entries stay beside recent ones and text, for descriptions.
    preferred: ClassVar[str] = "those looked at most"

    def __post_init__(self) -> None:
        for name, zero in (("important_ratio", False), ("recent_ratio", True)):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            for ratio in value if isinstance(value, (list, tuple)) else (value,):
                check_fraction(f"LookM.{name}", ratio, zero=zero)
        if self.merge not in MERGES:
            raise ConfigError(f"LookM.merge={shown(self.merge)}, wanted one of {', '.join(MERGES)}")
        if not isinstance(self.text_prior, bool):
            raise ConfigError(f"LookM.text_prior={shown(self.text_prior)}, wanted True or False")
        if self.budget is not None and not is_whole(self.budget, least=1):
            raise ConfigError(f"LookM.budget={shown(self.budget)}, wanted 1 or more entries, or None for the ratios")
        if self.recent is not None and (self.budget is None or not is_whole(self.recent, least=0)):
            raise ConfigError(f"LookM.recent={shown(self.recent)}, wanted a whole number of entries beside a budget")
        if self.budget is not None and self.recent is not None and self.budget <= self.recent:
            raise ConfigError(
                f"LookM.budget={self.budget} leaves nothing beside the recent window of {self.recent} entries: wanted "
                f"{self.recent + 1} or more, or a smaller LookM.recent"
            )
        if self.text_overflow not in OVERFLOWS:
            raise ConfigError(f"LookM.text_overflow={shown(self.text_overflow)}, wanted one of {', '.join(OVERFLOWS)}")
        if self.queries not in QUERIES:
            raise ConfigError(f"LookM.queries={shown(self.queries)}, wanted one of {', '.join(QUERIES)}")
        for name in ("stride", "window"):
            if not is_whole(getattr(self, name), least=1):
                raise ConfigError(f"LookM.{name}={shown(getattr(self, name))}, wanted a whole number of 1 or more")

    def check(self, spec: ModelSpec) -> None:
        for name in ("important_ratio", "recent_ratio"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != spec.num_layers:
                raise ConfigError(
                    f"LookM.{name} has {len(value)} values for {spec.num_layers} layers: give one each, or a single one"
                )
        super().check(spec)

    def apply(self, view: LayerView) -> CacheEntries:
        if self._keeps_all(view.tokens_seen, view.layer_idx):
            return view.entries
        return self._compressed(view.entries, self.score(view), self._quotas(view, self._texts([view])[0]))

    @property
    def together(self) -> bool:
        return is_bundled(type(self))

    def held(self, view: LayerView) -> LayerView:
        queries, index = view.queries, view.query_index
        if view.attention_mass is not None:
            queries, index = queries.new_empty(1, queries.shape[1], 0, queries.shape[3]), None
        elif self.queries == "last" and index is None and queries.shape[2] > self.window:
            queries = queries[:, :, -self.window :].clone()  # a view would hold all of them
        return replace(view, queries=queries, query_index=index)

    def apply_layers(self, views: Sequence[LayerView]) -> list[CacheEntries]:
        out = [view.entries for view in views]
        alike: dict[tuple[Hashable, _Quotas], list[int]] = {}
        for i, (view, texts) in enumerate(zip(views, self._texts(views), strict=True)):
            if not self._keeps_all(view.tokens_seen, view.layer_idx):
                alike.setdefault((view.kind, self._quotas(view, texts)), []).append(i)
        for (_, quotas), own in alike.items():
            several = [views[i] for i in own]
            stacked = LayerView.stacked(several)
            found = self._compressed(stacked.entries, self._scores(stacked, several), quotas)
            for i, entries in zip(own, [found] if len(own) == 1 else found.unstacked(), strict=True):
                out[i] = entries
        return out

    def _scores(self, stacked: LayerView, views: Sequence[LayerView]) -> Tensor:
        """[L, G, N] float32: `score` of views side by side, of which `stacked` was made."""
        return self.score(stacked)

    def _quotas(self, view: LayerView, texts: int | None) -> _Quotas:
        """How many entries stay of a view that has so many of text before the recent window; None: nobody asks."""
        important, recent = self.quota(view.tokens_seen, view.layer_idx)
        if texts is not None and self.budget is not None:
            self._warn_of_overflow(texts, important, recent)
        bounded = not self.text_prior or (self.budget is not None and self.text_overflow == "evict")
        return _Quotas(important, recent, bounded, None if bounded else texts)

    def _compressed(self, entries: CacheEntries, score: Tensor, quotas: _Quotas) -> CacheEntries:
        """What stays of entries [L, G, N, ...], whose score in this pass is [L, G, N]."""
        important, recent, bounded, texts = quotas
        entries = replace(entries, score=self.accumulate(entries.score, score))
        if len(entries) <= important + recent or entries.score is None or entries.is_visual is None:
            return entries
        kept = lookm_keep(entries.score, entries.is_visual, important, recent, self.text_prior, bounded, texts)
        if kept.shape[-1] == len(entries):
            return entries
        keys, values = lookm_merge(entries.keys, entries.values, kept, self.merge)
        return entries.merged(kept, keys, values)

    def _texts(self, views: Sequence[LayerView]) -> list[int | None]:
        """Of each view the entries of text before the recent window, the most of all heads; None: nobody asks.

        They are known where all entries are of this pass; else those of all views are fetched together.
        """
        counts: list[Tensor | None] = []
        for view in views:
            entries, is_visual = view.entries, view.entries.is_visual
            important, recent = self.quota(view.tokens_seen, view.layer_idx)
            if not self.text_prior or is_visual is None or len(entries) <= important + recent:
                counts.append(None)
                continue
            if view.known is not None and view.known.is_visual is not None and len(entries) == len(view.is_visual):
                is_visual = view.known.is_visual[None, None]
            counts.append((~is_visual[:, :, : len(entries) - recent]).sum(2).amax())
        return fetched(counts)

    def _warn_of_overflow(self, text: int, important: int, recent: int) -> None:
        """Once in a process for each setting: the same words again are not shown."""
        if text <= important:
            return
        does = "the text that is looked at least leaves" if self.text_overflow == "evict" else "the cache grows"
        warnings.warn(
            f"LookM: text alone is more than the {important} entries that a budget of {self.budget} leaves it beside "
            f'{recent} recent ones; with text_overflow="{self.text_overflow}" {does}, a larger budget keeps all text',
            stacklevel=2,
        )

    def needs_attention_mass(self, tokens_seen: int, layer_idx: int) -> bool:
        return self.queries == "all" and not self._keeps_all(tokens_seen, layer_idx)

    def _keeps_all(self, tokens_seen: int, layer_idx: int) -> bool:
        """Whether nothing is evicted now or later: a budget may yet be passed."""
        return self.budget is None and self.quota(tokens_seen, layer_idx)[0] >= tokens_seen

    def quota(self, tokens_seen: int, layer_idx: int) -> tuple[int, int]:
        """Entries kept before the recent window, and in it, of so many tokens; all where the ratios add up to 1."""
        important, recent = (
            x[layer_idx] if isinstance(x, tuple) else x for x in (self.important_ratio, self.recent_ratio)
        )
        if self.budget is not None:
            if self.budget >= tokens_seen:
                return tokens_seen, 0
            window = int(self.budget * recent / (important + recent)) if self.recent is None else self.recent
            return self.budget - window, window
        if important + recent >= 1:
            return tokens_seen, 0
        return int(tokens_seen * important), int(tokens_seen * recent)

    def score(self, view: LayerView) -> Tensor:
        """[1, G, N] float32: attention that each entry receives, summed over queries and the group's heads."""
        groups = view.keys.shape[1]
        if view.attention_mass is not None:
            return _sum_of_groups(view.attention_mass, groups)
        queries, query_index = view.queries, view.query_index
        if query_index is not None and len(query_index) == 0:
            return torch.zeros(1, groups, len(view.entries), dtype=torch.float32, device=view.keys.device)
        voting = self._voting(queries.shape[2], queries.device)
        if voting is not None:
            queries, query_index = queries.index_select(2, voting), view.query_places[voting]
        return _sum_of_groups(column_mass(queries, view.keys, query_index=query_index, scale=view.scale), groups)

    def accumulate(self, earlier: Tensor | None, now: Tensor) -> Tensor:
        """[1, G, N] float32: the score of all passes, from that of the earlier ones (None: no pass) and of this one."""
        return now if earlier is None else earlier + now

    def _voting(self, queries: int, device: torch.device) -> Tensor | None:
        """[K] int64: the queries whose attention counts; None: all."""
        if self.queries == "all":
            return None
        if self.queries == "last":
            return torch.arange(max(0, queries - self.window), queries, device=device)
        return torch.arange((queries - 1) % self.stride, queries, self.stride, device=device)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        """One product for the logits, and one of a vote with the probabilities, for pairs of queries that count."""
        return 2 * spec.num_attention_heads * (spec.head_dim + 1) * sum(lengths)

    def layer_cost(self, spec: ModelSpec, work: LayerWork) -> int:
        """Scores, where the attention did not hand them over, and the matching of dropped keys to kept ones."""
        if self._keeps_all(work.seen, work.layer_idx):
            return 0
        scores = 0 if work.mass_given else self.cost(spec, [self._voting_pairs(work)])
        matched = 0 if self.merge == "none" else (work.keys - work.kept) * work.kept
        return scores + 2 * spec.num_key_value_heads * spec.head_dim * matched

    def _voting_pairs(self, work: LayerWork) -> int:
        """Pairs of the queries whose attention counts, if the queries are the last entries."""
        voting = self._voting(work.queries, torch.device("cpu")) if work.pairs else None
        return work.pairs if voting is None else int((voting + work.keys - work.queries + 1).sum())

    def describe(self) -> str:
        text = "text, " if self.text_prior else ""
        return f"Keeps {self._amount()}: {text}recent ones and {self.preferred}; {self.describe_evicted()}."

    def _amount(self) -> str:
        if self.budget is not None:
            return f"{self.budget:,} entries a head"
        if isinstance(self.important_ratio, tuple) or isinstance(self.recent_ratio, tuple):
            return "a share of the entries that differs by layer"
        return f"{100 * (self.important_ratio + self.recent_ratio):g} % of the entries"

    def describe_evicted(self) -> str:
        if self.merge == "none":
            return "the rest was dropped"
        return f"the rest was merged into the most similar ones ({self.merge})"

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {
            "lookm-20": cls(important_ratio=0.1, recent_ratio=0.1),
            "lookm-5": cls(important_ratio=0.025, recent_ratio=0.025),
            # For prompts read in chunks; averaged, since every chunk comes before its question.
            "lookm-8k": cls(budget=8192, merge="average"),
        }

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        return {
            "LOOK-M pivot": cls.budget_sweep(),
            "LOOK-M average": cls.budget_sweep(merge="average"),
            "LOOK-M average, no text first": cls.budget_sweep(merge="average", text_prior=False),
        }

    @classmethod
    def budget_sweep(cls, **settings: Any) -> dict[str, Self]:
        """These settings at every share of the entries, half of them recent, by the share's name."""
        return {f"{share} %": cls(share / 200, share / 200, **settings) for share in CACHE_SHARES}


def _sum_of_groups(mass: Tensor, groups: int) -> Tensor:
    """[B, H, N] -> [B, G, N]: the query heads of a group share its entries."""
    return mass.view(mass.shape[0], groups, -1, mass.shape[2]).sum(2)
