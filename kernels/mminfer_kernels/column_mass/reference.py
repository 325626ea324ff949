"""Column mass, column peaks and power iteration in plain PyTorch, by blocks of queries."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from mminfer_kernels.blocks import FEW_BLOCK_ROWS, SCRATCH_BYTES, block_rows


class ProbabilityBlock(NamedTuple):
    """Attention probabilities of some query rows of some heads; the next block overwrites them."""

    heads: slice  # among B * H
    rows: slice  # among S
    probabilities: torch.Tensor  # [heads, rows, keys up to the last visible one]


@torch.no_grad()
def column_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor | None,
    scale: float,
    causal: bool,
    query_index: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `mminfer_kernels.column_mass`; `scale` has the temperature in it."""
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        votes = [None] * len(lengths) if weights is None else weights.split(lengths, -1)
        parts = zip(q.split(lengths, 2), k.split(lengths, 2), votes, strict=True)
        return torch.cat([column_mass(a, b, w, scale, causal, None) for a, b, w in parts], -1)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    mass = torch.zeros(batch * heads, 1, keys, dtype=dtype, device=q.device)
    if weights is None:
        votes = torch.ones((), dtype=dtype, device=q.device).expand(batch * heads, 1, queries)
    else:
        per_head = weights[:, None] if weights.dim() == 2 else weights
        votes = per_head.to(dtype).expand(batch, heads, queries).reshape(batch * heads, 1, queries)
    for block in probability_blocks(q, k, scale, causal, query_index):
        visible = block.probabilities.shape[-1]
        mass[block.heads, :, :visible].baddbmm_(votes[block.heads, :, block.rows], block.probabilities)
    return mass.view(batch, heads, keys)


@torch.no_grad()
def column_peak(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    query_index: torch.Tensor | None,
    counted: int,
    log_mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, G, counted]: the largest probability that a query of the key's group gives it in a causal attention."""
    batch, groups = k.shape[:2]
    repeat = q.shape[1] // groups
    dtype = torch.promote_types(q.dtype, torch.float32)
    peak = torch.zeros(batch * groups, counted, dtype=dtype, device=q.device)
    for block in probability_blocks(q, k, scale, True, query_index, log_mass=log_mass):
        seen = block.probabilities[..., :counted].unflatten(0, (-1, repeat)).flatten(1, 2)  # [groups, rows, keys]
        highest = peak[block.heads.start // repeat : block.heads.stop // repeat, : seen.shape[-1]]
        torch.maximum(highest, seen.amax(1), out=highest)
    return peak.view(batch, groups, counted)


@torch.no_grad()
def power_iterate(
    q: torch.Tensor, k: torch.Tensor, iterations: int, scale: float, query_index: torch.Tensor | None
) -> torch.Tensor:
    """See `mminfer_kernels.power_iterate`; `scale` has the temperature in it."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    if iterations == 0:
        return torch.full((batch, heads, keys), 1 / max(keys, 1), dtype=dtype, device=q.device)
    votes = torch.zeros(batch * heads, iterations, keys, dtype=dtype, device=q.device)  # x_1 .. x_T
    for block in probability_blocks(q, k, scale, True, query_index, reverse=True):
        visible = block.probabilities.shape[-1]
        accumulated = votes[block.heads, :, :visible]
        own = _own_columns(block.rows, query_index, keys - queries)
        x = _settle(accumulated[:, :, own], block.probabilities[:, :, own], 1 / keys)
        accumulated.baddbmm_(x, block.probabilities)
    return votes[:, -1].contiguous().view(batch, heads, keys)


def _own_columns(rows: slice, query_index: torch.Tensor | None, offset: int) -> slice | torch.Tensor:
    """Columns that are the block's own rows: a slice (no copy) where the queries are consecutive."""
    if query_index is None:
        return slice(rows.start + offset, rows.stop + offset)
    return query_index[rows]


def _settle(later: torch.Tensor, square: torch.Tensor, start: float) -> torch.Tensor:
    """`x_0 .. x_{T-1}` of a block's rows, [heads, T, rows], from later rows' votes and the block's square."""
    x = torch.empty_like(later)
    x[:, 0] = start
    for t in range(1, x.shape[1]):
        torch.baddbmm(later[:, t - 1 : t], x[:, t - 1 : t], square, out=x[:, t : t + 1])
    return x


def probability_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    causal: bool,
    query_index: torch.Tensor | None,
    reverse: bool = False,
    log_mass: torch.Tensor | None = None,
) -> Iterator[ProbabilityBlock]:
    """Yield the attention matrix block by block, each softmax row complete and only visible keys touched.

    Args:
        q: [B, H, S, D], k: [B, G, N, D].
        scale: factor of the logits.
        causal, query_index: as in `mminfer_kernels.column_mass`.
        reverse: walk the queries from the last to the first.
        log_mass: [B, G, N], added to the logits; None: 0.

    Yields:
        Blocks in one shared buffer, float32 or float64: use each before asking for the next.
    """
    batch, heads, queries, size = q.shape
    groups, keys = k.shape[1:3]
    if q.numel() == 0 or keys == 0:
        return
    dtype = torch.promote_types(q.dtype, torch.float32)
    repeat = heads // groups
    q = q.reshape(batch * groups, repeat, queries, size)
    k = k.reshape(batch * groups, keys, size)
    row_bytes = repeat * keys * dtype.itemsize
    chunk = max(1, min(batch * groups, SCRATCH_BYTES // (row_bytes * FEW_BLOCK_ROWS)))
    step = block_rows(chunk * row_bytes, queries)
    scratch = torch.empty(chunk * repeat * step * keys, dtype=dtype, device=q.device)
    places = torch.arange(keys, device=q.device)
    index = places[keys - queries :] if query_index is None else query_index
    rows = _row_blocks(queries, keys, step, causal, query_index)
    for start in range(0, batch * groups, chunk):
        part = slice(start, min(start + chunk, batch * groups))
        k_part = k[part].to(dtype).transpose(1, 2)  # [groups, D, N]
        for block, seen_by_all, visible in reversed(rows) if reverse else rows:
            q_rows = q[part, :, block].to(dtype).mul(scale).flatten(1, 2)  # [groups, repeat * rows, D]
            scores = scratch[: q_rows.shape[0] * q_rows.shape[1] * visible].view(*q_rows.shape[:2], visible)
            torch.bmm(q_rows, k_part[:, :, :visible], out=scores)
            if log_mass is not None:
                scores += log_mass.flatten(0, 1)[part, None, :visible]
            scores = scores.view(q_rows.shape[0] * repeat, -1, visible)
            if seen_by_all < visible:
                hidden = places[seen_by_all:visible] > index[block, None]
                bias = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -math.inf)
                scores[:, :, seen_by_all:] += bias
            torch.softmax(scores, -1, out=scores)  # row by row, so writing over its input is safe
            yield ProbabilityBlock(slice(part.start * repeat, part.stop * repeat), block, scores)


def _row_blocks(
    queries: int, keys: int, step: int, causal: bool, query_index: torch.Tensor | None
) -> list[tuple[slice, int, int]]:
    """Query rows of each block, how many keys all of them see, and how many at least one sees."""
    starts = range(0, queries, step)
    blocks = [slice(start, min(start + step, queries)) for start in starts]
    if not causal:
        return [(block, keys, keys) for block in blocks]
    if query_index is None:
        offset = keys - queries + 1
        return [(block, block.start + offset, block.stop - 1 + offset) for block in blocks]
    edges = [edge for block in blocks for edge in (block.start, block.stop - 1)]
    seen = (query_index[edges] + 1).tolist()
    return [(block, seen[2 * i], seen[2 * i + 1]) for i, block in enumerate(blocks)]
