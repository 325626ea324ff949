"""LOOK-M: after the prompt pass keep text and what is looked at, merge the rest of the cache into it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from mminfer_kernels import best_match, column_mass, gather_rows, merge_rows
from torch import Tensor

from mminfer.cache.kv_cache import CacheEntries
from mminfer.errors import ConfigError
from mminfer.technique import CacheTechnique, check_fraction, is_whole

if TYPE_CHECKING:
    from mminfer.models.base import ModelSpec

MERGES = ("average", "weighted", "pivot", "none")
QUERIES = ("all", "strided", "last")
OVERFLOWS = ("evict", "keep")
SINKS = 4  # first tokens, always kept where text has no priority


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

    def __post_init__(self) -> None:
        for name, zero in (("important_ratio", False), ("recent_ratio", True)):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            for ratio in value if isinstance(value, (list, tuple)) else (value,):
                check_fraction(f"LookM.{name}", ratio, zero=zero)
        if self.merge not in MERGES:
            raise ConfigError(f"LookM.merge={self.merge!r}, wanted one of {', '.join(MERGES)}")
        if not isinstance(self.text_prior, bool):
            raise ConfigError(f"LookM.text_prior={self.text_prior!r}, wanted True or False")
        if self.budget is not None and not is_whole(self.budget, least=1):
            raise ConfigError(f"LookM.budget={self.budget!r}, wanted 1 or more entries, or None for the ratios")
        if self.recent is not None and (self.budget is None or not is_whole(self.recent, least=0)):
            raise ConfigError(f"LookM.recent={self.recent!r}, wanted a whole number of entries beside a budget")
        if self.budget is not None and self.recent is not None and self.budget <= self.recent:
            raise ConfigError(
                f"LookM.budget={self.budget} leaves nothing beside the recent window of {self.recent} entries: wanted "
                f"{self.recent + 1} or more, or a smaller LookM.recent"
            )
        if self.text_overflow not in OVERFLOWS:
            raise ConfigError(f"LookM.text_overflow={self.text_overflow!r}, wanted one of {', '.join(OVERFLOWS)}")
        if self.queries not in QUERIES:
            raise ConfigError(f"LookM.queries={self.queries!r}, wanted one of {', '.join(QUERIES)}")
        for name in ("stride", "window"):
            if not is_whole(getattr(self, name), least=1):
                raise ConfigError(f"LookM.{name}={getattr(self, name)!r}, wanted a whole number of 1 or more")

    def check(self, spec: ModelSpec) -> None:
        for name in ("important_ratio", "recent_ratio"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != spec.num_layers:
                raise ConfigError(
                    f"LookM.{name} has {len(value)} values for {spec.num_layers} layers: give one each, or a single one"
                )
        if spec.sliding_layers:
            raise ConfigError(
                f"LookM: {len(spec.sliding_layers)} of {spec.num_layers} layers attend within a sliding window, which "
                "eviction would stretch; leave cache=None for this model"
            )

    def apply(
        self,
        q: Tensor,
        entries: CacheEntries,
        seen: int,
        layer_idx: int,
        query_index: Tensor | None,
        scale: float,
        mass: Tensor | None = None,
    ) -> CacheEntries:
        if self._keeps_all(seen, layer_idx):
            return entries
        important, recent = self.quota(seen, layer_idx)
        if mass is None:
            score = self.score(q, entries.keys, layer_idx, query_index, scale)
        else:
            score = _sum_of_groups(mass, entries.keys.shape[1])
        entries = replace(entries, score=score if entries.score is None else entries.score + score)
        if len(entries) <= important + recent or entries.score is None or entries.is_visual is None:
            return entries
        bounded = self.budget is not None and self.text_overflow == "evict"
        if self.budget is not None and self.text_prior:
            self._warn_of_overflow(entries.is_visual, important, recent)
        kept = lookm_keep(entries.score, entries.is_visual, important, recent, self.text_prior, bounded)
        if kept.shape[-1] == len(entries):
            return entries
        keys, values = lookm_merge(entries.keys, entries.values, kept, self.merge)
        return CacheEntries(keys, values, entries.is_visual.gather(2, kept), entries.score.gather(2, kept))

    def _warn_of_overflow(self, is_visual: Tensor, important: int, recent: int) -> None:
        """Once in a process for each setting: the same words again are not shown."""
        text = int((~is_visual[:, :, : is_visual.shape[2] - recent]).sum(2).amax())
        if text <= important:
            return
        does = "the text that is looked at least leaves" if self.text_overflow == "evict" else "the cache grows"
        warnings.warn(
            f"LookM: text alone is more than the {important} entries that a budget of {self.budget} leaves it beside "
            f'{recent} recent ones; with text_overflow="{self.text_overflow}" {does}, a larger budget keeps all text',
            stacklevel=2,
        )

    def wants_mass(self, seen: int, layer_idx: int) -> bool:
        return self.queries == "all" and not self._keeps_all(seen, layer_idx)

    def _keeps_all(self, seen: int, layer_idx: int) -> bool:
        """Whether nothing is evicted now or later: a budget may yet be passed."""
        return self.budget is None and self.quota(seen, layer_idx)[0] >= seen

    def quota(self, seen: int, layer_idx: int) -> tuple[int, int]:
        """Entries kept before the recent window, and in it, of so many tokens; all where the ratios add up to 1."""
        important, recent = (
            x[layer_idx] if isinstance(x, tuple) else x for x in (self.important_ratio, self.recent_ratio)
        )
        if self.budget is not None:
            if self.budget >= seen:
                return seen, 0
            window = int(self.budget * recent / (important + recent)) if self.recent is None else self.recent
            return self.budget - window, window
        return (seen, 0) if important + recent >= 1 else (int(seen * important), int(seen * recent))

    def score(self, q: Tensor, k: Tensor, layer_idx: int, query_index: Tensor | None, scale: float) -> Tensor:
        """[1, G, N] float32: attention that each entry receives, summed over queries and the group's heads."""
        groups, keys = k.shape[1:3]
        if query_index is not None and len(query_index) == 0:
            return torch.zeros(1, groups, keys, device=k.device)
        chosen = self._chosen(q.shape[2], q.device)
        if chosen is not None:
            places = torch.arange(keys - q.shape[2], keys, device=q.device) if query_index is None else query_index
            q, query_index = q.index_select(2, chosen), places[chosen]
        mass = column_mass(q, k, query_index=query_index, scale=scale)
        return _sum_of_groups(mass, groups)

    def _chosen(self, queries: int, device: torch.device) -> Tensor | None:
        """[K] int64: the queries whose attention counts; None: all."""
        if self.queries == "all":
            return None
        if self.queries == "last":
            return torch.arange(max(0, queries - self.window), queries, device=device)
        return torch.arange((queries - 1) % self.stride, queries, self.stride, device=device)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        """One product for the logits, and one of a vote with the probabilities; matching the keys is left out."""
        pairs = sum(lengths)
        if self.queries == "strided":
            pairs //= self.stride
        elif self.queries == "last":  # of n tokens, n * n / 2 pairs, the last see about n keys each
            pairs = sum(min(p, int(self.window * math.sqrt(2 * p))) for p in lengths)
        return 2 * spec.num_attention_heads * (spec.head_dim + 1) * pairs


def _sum_of_groups(mass: Tensor, groups: int) -> Tensor:
    """[B, H, N] -> [B, G, N]: the query heads of a group share its entries."""
    return mass.view(mass.shape[0], groups, -1, mass.shape[2]).sum(2)


def lookm_compress(
    k: torch.Tensor,
    v: torch.Tensor,
    score: torch.Tensor,
    visual_mask: torch.Tensor,
    important_ratio: float,
    recent_ratio: float,
    merge: str | None,
    text_prior: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compress one layer's cache: choose the entries that stay, merge the others into them.

    Args:
        k, v: [B, G, N, D], keys after rotation.
        score: [B, G, N], attention each entry received, summed over queries and over the group's query heads.
        visual_mask: [B, N] or [B, G, N] bool, true at visual entries.
        important_ratio: fraction of N kept for text and high scores, in (0, 1].
        recent_ratio: fraction of N kept at the end, in [0, 1]. A sum of 1 or more keeps everything as it is.
        merge: "average", "weighted", "pivot", or "none" (or None) to evict only.
        text_prior: whether every text entry stays; otherwise the first four stay and text competes by score.

    Returns:
        k, v [B, G, S, D] and the kept places [B, G, S] int64, ascending.

    Raises:
        ConfigError: a ratio or `merge` is out of range.
        ValueError: shapes that do not fit, or sequences of a batch that keep different numbers of entries.

    Reference:
        LOOK-M (arXiv 2406.18139), text-prior eviction and merging. The authors' averaging misaligns
        entries and targets; this
        follows the paper's definition.
    """
    if not 0 < important_ratio <= 1:
        raise ConfigError(f"important_ratio is {important_ratio}, wanted a kept fraction in (0, 1]")
    if not 0 <= recent_ratio <= 1:
        raise ConfigError(f"recent_ratio is {recent_ratio}, wanted a kept fraction in [0, 1]")
    entries = k.shape[2]
    full = important_ratio + recent_ratio >= 1
    important = entries if full else int(entries * important_ratio)
    kept = lookm_keep(score, visual_mask, important, int(entries * recent_ratio), text_prior)
    return *lookm_merge(k, v, kept, merge), kept


def lookm_keep(
    score: torch.Tensor,
    visual_mask: torch.Tensor,
    num_important: int,
    num_recent: int,
    text_prior: bool = True,
    bounded: bool = False,
) -> torch.Tensor:
    """Places that stay: the last `num_recent`, all text, and the best visual entries up to `num_important`.

    Args:
        score: [B, G, N].
        visual_mask: [B, N], or [B, G, N] where heads already hold different entries.
        num_important: K, entries kept before the recent window; text alone may exceed it. All heads of a
            sequence keep the same number: the one with the most text sets it.
        num_recent: R, entries kept at the end.
        text_prior: False keeps the first four entries instead of text, within K, and the best scores of the
            rest.
        bounded: whether K holds for text, too: then of more text than that the best scores stay.

    Returns:
        [B, G, S] int64, ascending; S is at least 1.

    Raises:
        ConfigError: a negative count.
        ValueError: shapes that do not fit, or sequences of the batch that keep different numbers of entries.
    """
    if score.dim() != 3 or visual_mask.shape not in (score.shape, (score.shape[0], score.shape[2])):
        raise ValueError(
            f"score is {list(score.shape)} and visual_mask {list(visual_mask.shape)}, "
            "wanted [B, G, N] and [B, N] or [B, G, N]"
        )
    if num_important < 0 or num_recent < 0:
        raise ConfigError(f"num_important is {num_important} and num_recent {num_recent}, wanted 0 or more")
    batch, groups, entries = score.shape
    older = max(entries - num_recent, 0)
    places = torch.arange(entries, device=score.device)
    if num_important >= older:
        return places.expand(batch, groups, entries).clone()
    if text_prior:
        visual = visual_mask if visual_mask.dim() == 3 else visual_mask[:, None]
        certain = ~visual[:, :, :older]
    else:
        certain = (places < SINKS)[:older].expand(batch, 1, older)
    least = max(num_important, 1 - num_recent)
    quotas = [least] * batch if bounded else certain.sum(-1).amax(1).clamp(min=least).tolist()
    if len(set(quotas)) > 1:
        raise ValueError(f"sequences keep {quotas} entries before the window: compress them one at a time")
    ranked = score[:, :, :older]
    if bounded:  # certain ones by score among themselves, which float32 could not tell apart after a million tokens
        ranked = ranked.double()
        ranked = torch.where(
            certain, ranked + (ranked.amax(-1, keepdim=True) - ranked.amin(-1, keepdim=True) + 1), ranked
        )
    else:
        ranked = ranked.masked_fill(certain, torch.inf)
    chosen = ranked.topk(quotas[0], -1).indices.sort(-1).values
    return torch.cat((chosen, places[older:].expand(batch, groups, -1)), -1)


def lookm_merge(
    k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, merge: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values at the kept places, every dropped entry merged into the most similar kept key.

    Args:
        k, v: [B, G, N, D].
        kept: [B, G, S] int64, ascending.
        merge: "average": mean of the kept entry and all matched to it; "weighted": the same over
            `similarity * entry`, of the dropped places whose similarity (mean over heads) reaches the mean
            over all; "pivot": the same over `(entry + kept entry) / 2`; "none" or None: only drop.

    Returns:
        k and v [B, G, S, D], in their own dtypes; sums in float32. Values follow the keys' matches.

    Raises:
        ConfigError: `merge` is not one of these.

    Reference:
        LOOK-M (arXiv 2406.18139), merging of key-value pairs.
    """
    if merge is not None and merge not in MERGES:
        raise ConfigError(f"merge is {merge!r}, wanted one of {', '.join(MERGES)}")
    if kept.shape[-1] == k.shape[2]:
        return k, v
    kept_k, kept_v = gather_rows(k, kept), gather_rows(v, kept)
    if merge in (None, "none"):
        return kept_k, kept_v
    dropped = _complement(kept, k.shape[2])
    similarity, match = best_match(gather_rows(k, dropped), kept_k)
    weight = None
    if merge == "weighted":
        # [B, N - S]: heads drop different entries, so the mean over heads goes by order among the dropped
        reaches = similarity.mean(1) >= similarity.mean((1, 2))[:, None]
        weight = reaches[:, None].expand_as(similarity).to(similarity.dtype)
    merged = []
    for entries, kept_entries in ((k, kept_k), (v, kept_v)):
        source = gather_rows(entries, dropped).to(similarity.dtype)
        if merge == "weighted":
            source = source * similarity[..., None]
        elif merge == "pivot":
            source = source.add_(gather_rows(kept_entries, match)).mul_(0.5)
        merged.append(merge_rows(kept_entries, source, match, src_weight=weight)[0])
    return merged[0], merged[1]


def _complement(kept: torch.Tensor, entries: int) -> torch.Tensor:
    """Places not in `kept`, ascending: [B, G, N - S]."""
    dropped = torch.ones(*kept.shape[:-1], entries, dtype=torch.bool, device=kept.device)
    dropped.scatter_(-1, kept, False)
    return dropped.nonzero()[:, -1].view(*kept.shape[:-1], -1)
