"""LOOK-M's rules on plain tensors: which entries stay, and how the rest is merged into them."""

from __future__ import annotations

import torch
from mminfer_kernels import best_match, gather_rows, merge_rows

from mminfer.errors import ConfigError, shown
from mminfer.layout import places_of

MERGES = ("average", "weighted", "pivot", "none")
SINKS = 4  # first tokens, always kept where text has no priority


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
    texts: int | None = None,
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
        texts: entries of text before the recent window, the most of all heads, if the caller knows; None: the device
            is asked.

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
        first = ~visual[:, :, :older]
    else:
        first = (places < SINKS)[:older].expand(batch, 1, older)
    least = max(num_important, 1 - num_recent)
    if bounded or not text_prior:
        quotas = [least if bounded else max(least, min(SINKS, older))] * batch
    elif texts is not None:
        quotas = [max(least, texts)] * batch
    else:
        quotas = first.sum(-1).amax(1).clamp(min=least).tolist()
    if len(set(quotas)) > 1:
        raise ValueError(f"sequences keep {quotas} entries before the window: compress them one at a time")
    ranked = _ranked(score[:, :, :older], first, bounded)
    chosen = ranked.topk(quotas[0], -1).indices.sort(-1).values
    return torch.cat((chosen, places[older:].expand(batch, groups, -1)), -1)


def _ranked(score: torch.Tensor, first: torch.Tensor, bounded: bool) -> torch.Tensor:
    """[B, G, n]: scores, but those of entries that come first ([B, G or 1, n] bool) above all others.

    Where there may be too many of these (`bounded`) they keep their own order, in float64, since float32 could not
    tell them apart after a million tokens.
    """
    if not bounded:
        return score.masked_fill(first, torch.inf)
    score = score.double()
    return torch.where(first, score + (score.amax(-1, keepdim=True) - score.amin(-1, keepdim=True) + 1), score)


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
        raise ConfigError(f"merge is {shown(merge)}, wanted one of {', '.join(MERGES)}")
    if kept.shape[-1] == k.shape[2]:
        return k, v
    if merge in (None, "none"):
        return gather_rows(k, kept), gather_rows(v, kept)
    stay, width = kept.shape[-1], k.shape[-1]
    places = torch.cat([kept, _complement(kept, k.shape[2])], -1)
    both = gather_rows(torch.cat([k, v], -1), places)  # keys and values side by side: one gather and one sum for both
    kept_rows, dropped = both[:, :, :stay], both[:, :, stay:]
    similarity, match = best_match(dropped[..., :width], kept_rows[..., :width])
    source, weight = dropped, None
    if merge == "weighted":
        # [B, N - S]: heads drop different entries, so the mean over heads goes by order among the dropped
        reaches = similarity.mean(1) >= similarity.mean((1, 2))[:, None]
        weight = reaches[:, None].expand_as(similarity).to(similarity.dtype)
        source = dropped * similarity[..., None]
    elif merge == "pivot":
        source = gather_rows(kept_rows, match).to(similarity.dtype).add_(dropped).mul_(0.5)
    merged, _ = merge_rows(kept_rows, source.to(similarity.dtype), match, src_weight=weight)
    return merged[..., :width].to(k.dtype), merged[..., width:].to(v.dtype)


def _complement(kept: torch.Tensor, entries: int) -> torch.Tensor:
    """Places not in `kept`, ascending: [B, G, N - S]."""
    dropped = torch.ones(*kept.shape[:-1], entries, dtype=torch.bool, device=kept.device)
    return places_of(dropped.scatter_(-1, kept, False), entries - kept.shape[-1])
