"""Digest's need: how much of what text reads in a layer is detail of pictures."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from mminfer.cache.digest_rules import parts_of, runs_of
from mminfer.technique import CacheEntries, LayerView, fetched

MOST_BYTES = 1 << 30  # of what telling the need of several layers at once takes


def visual_of(entries: CacheEntries) -> Tensor | None:
    """[N] bool: which entries are visual; None: nobody asked."""
    return None if entries.is_visual is None else entries.is_visual[0, 0]


def asking(is_visual: Tensor, most: int) -> Tensor:
    """[K] int64: which queries tell the need, at most so many, evenly spread over those of text, or over all.

    Args:
        is_visual: [S] bool, on the CPU, of the queries' rows.
        most: how many.
    """
    text = (~is_visual).nonzero()[:, 0]
    text = text if len(text) else torch.arange(len(is_visual))
    count = min(most, len(text))
    return text[torch.linspace(0, len(text) - 1, count, dtype=torch.float32).round().long()]


def query_places_on_host(view: LayerView) -> Tensor:
    """[S] int64, on the CPU: `LayerView.query_places`."""
    if view.query_index is not None:
        return view.query_index.cpu()
    longest = max(view.entries.lengths)
    return torch.arange(longest - view.queries.shape[2], longest)


def visual_on_host(view: LayerView) -> Tensor | None:
    """[N] bool, on the CPU: which entries are visual; of those of this pass alone that may be known there."""
    is_visual, known = visual_of(view.entries), view.known
    if is_visual is None:
        return None
    if known is not None and known.is_visual is not None and len(is_visual) == len(known.is_visual):
        return known.is_visual
    return is_visual.cpu()


def narrowed(view: LayerView, most: int) -> Tensor:
    """[1, H, K, D]: of the view's queries those that tell its need, at most so many."""
    rows = view.rows.is_visual
    rows = view.is_visual.cpu() if rows is None else rows
    if not view.queries.shape[2]:
        return view.queries
    places = query_places_on_host(view) - (max(view.entries.lengths) - len(rows))
    return view.queries.index_select(2, asking(rows[places], most).to(view.queries.device, non_blocking=True))


def demands(views: Sequence[LayerView], flags: Sequence[Tensor]) -> list[float]:
    """The need of each layer, told together for those that are alike.

    Args:
        views: whose queries are those that tell it.
        flags: of each [N] bool, on the CPU: which entries are visual.
    """
    alike: dict[Hashable, list[int]] = {}
    for i, (view, is_visual) in enumerate(zip(views, flags, strict=True)):
        if view.queries.shape[2] and bool(is_visual.any()):
            alike.setdefault((view.kind, is_visual.numpy().tobytes()), []).append(i)
    needs: list[float | Tensor] = [0.0] * len(views)
    for own in alike.values():
        of_parts = parts_of(len(own), _bytes_of(views[own[0]]), MOST_BYTES)
        parts = [LayerView.stacked([views[i] for i in own[part]]) for part in of_parts]
        changes = [change_of_readings(part.queries, part.entries, flags[own[0]], part.scale) for part in parts]
        for i, need in zip(own, quartile(torch.cat(changes)), strict=True):
            needs[i] = need
    return fetched(needs)


def _bytes_of(view: LayerView) -> int:
    """What telling the need of one layer takes: its entries in float32, and a few times the logits."""
    entries, (_, heads, queries, _) = view.entries, view.queries.shape
    return 4 * (2 * entries.keys.numel() + 3 * heads * queries * len(entries))


def quartile(x: Tensor) -> Tensor:
    """[L] the first one of each row of x, [L, S], by hand: `quantile` takes a dozen kernels."""
    place, part = divmod(0.25 * (x.shape[1] - 1), 1)
    ranked = x.sort().values
    return ranked[:, int(place)].lerp(ranked[:, min(int(place) + 1, x.shape[1] - 1)], part)


def change_of_readings(q: Tensor, entries: CacheEntries, is_visual: Tensor, scale: float) -> Tensor:
    """[L, S] float32: by how much of itself changes what queries read where every picture is one entry.

    Args:
        q: [L, H, S, D].
        entries: [L, G, N, D].
        is_visual: [N] bool, on the CPU.
        scale: factor of the logits.
    """
    with torch.autocast(q.device.type, enabled=False):
        exact, pooled = _readings(q, entries, is_visual, scale)
        change = exact - pooled
        change = (change - change.mean(2, keepdim=True)).square().sum((1, 3)).sqrt()
        return change / exact.square().sum((1, 3)).sqrt().clamp_min(1e-12)


def _readings(q: Tensor, entries: CacheEntries, is_visual: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What these queries ([L, H, S, D]) read among all entries, and with every picture as one of them.

    [L, H, S, D] float32 each: in half precision logits would overflow, or round, and sums of many rows stand still.
    """
    keys, values = entries.keys.float(), entries.values.float()
    # Heads of a group ask the same entries.
    grouped = q.reshape(*keys.shape[:2], -1, q.shape[3]).float() * scale
    logits = grouped @ keys.mT
    exact = logits.softmax(-1) @ values
    runs, lengths = len(bounds := runs_of(is_visual)), bounds[:, 1] - bounds[:, 0]
    count = lengths.float()
    facts = (
        torch.repeat_interleave(lengths), is_visual.nonzero()[:, 0], (~is_visual).nonzero()[:, 0], count[:, None],
        count.log(),
    )  # fmt: skip
    owner, rows, text, size, log_size = (x.to(keys.device, non_blocking=True) for x in facts)
    means = []
    for x in (keys, values):
        pooled = x.new_zeros(*x.shape[:2], runs, x.shape[3]).index_add_(2, owner, x[:, :, rows])
        means.append(pooled / size)
    of_pictures = grouped @ means[0].mT + log_size
    weights = torch.cat([logits[..., text], of_pictures], -1).softmax(-1)
    pooled = weights @ torch.cat([values[:, :, text], means[1]], 2)
    return exact.reshape(q.shape), pooled.reshape(q.shape)
