"""Attention of rows that go by again behind entries that they made: all groups of a layer in one call."""

import torch

from mminfer_kernels.backends import cpu_takes, on_cuda, triton_takes
from mminfer_kernels.checks import check_heads, check_scores, check_whole, described, factor_of
from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.prompt_attention.reference import rows_first
from mminfer_kernels.replay_attention import reference
from mminfer_kernels.tracing import traceable

__all__ = ["replay_attention"]

_OP = "replay_attention"
_ROOM = f"mminfer_kernels.{_OP}"
register(_OP, "reference", reference.replay_attention)
register(_OP, "triton", f"{_ROOM}.triton_kernel:{_OP}", triton_takes, on_cuda)
register(_OP, "native", f"{_ROOM}.native:{_OP}", cpu_takes)


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, *args: object, **kwargs: object
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return rows_first(torch.empty_like(q)), q.new_empty(keys.shape[:3], dtype=dtype)


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    groups: torch.Tensor,
    *args: object,
    **kwargs: object,
) -> int:
    pairs = again = 0
    for start, stop, begin, end in groups.tolist():
        rows = stop - start
        pairs += rows * (end - begin + int(begin > 0)) + rows * (rows + 1) // 2
        again += rows * (end - begin)
    return 2 * q.shape[0] * q.shape[1] * q.shape[3] * (2 * pairs + again)


@traceable(_fake, _flops)
def replay_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    groups: torch.Tensor,
    seen: torch.Tensor,
    longest: int,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of groups of rows, and the largest probability that each entry is given by a row that looks at it.

    A row of a group sees the entries of the group's range, the first entry of all, and the group's own rows up to
    itself. Nothing is copied together for that, and no group asks for launches of its own.

    Args:
        q: queries [B, H, S, D], group behind group.
        k: their own keys [B, G, S, D]; query head h reads key head h // (H / G).
        v: their own values [B, G, S, D].
        keys: of the entries [B, G, N, D].
        values: of the entries [B, G, N, D].
        groups: [M, 4] int32, of each group its first row and one past its last, its first entry and one past its
            last. Together they have all rows, in order; their ranges of entries ascend.
        seen: [2, N] int32, of each entry the first and one past the last of the rows in whose groups' range it is; see
            `rows_of_entries`.
        longest: rows of the longest group.
        scale: factor of the logits, `D ** -0.5` by default.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        attention [B, H, S, D] in q's dtype, in memory [B, S, H, D]; peak [B, G, N] float32 (float64 for float64 input),
        0 for an entry in no group's range. What groups say is looked at on the CPU alone: on a GPU, where that would
        be to wait for it, they must be right.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit, groups that are not as said.
        BackendError: an explicit backend that is not there.

    Reference:
        KVzip (arXiv 2505.23416): what an entry is worth to its context, read once more behind the cache.
    """
    check_heads(q, k, v, keys=keys, values=values, groups=groups, seen=seen)
    check_heads(q, keys, values)
    check_scores(q)
    if k.shape[2] != q.shape[2] or keys.shape[1] != k.shape[1]:
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)} and keys {list(keys.shape)}, wanted [B, H, S, D], [B, G, S, D] "
            "and [B, G, N, D]"
        )
    check_whole("longest", longest, least=0)
    _check_groups(groups, seen, q.shape[2], keys.shape[2], longest)
    scale = factor_of(q, scale)
    _, run = resolve(_OP, backend, q, k, v, keys, values)
    return run(q, k, v, keys, values, groups, seen, longest, scale)


def rows_of_entries(groups: torch.Tensor, entries: int) -> torch.Tensor:
    """`seen` of `replay_attention`, for groups on the CPU and so many entries."""
    places = torch.arange(entries, dtype=torch.int32)
    first = torch.searchsorted(groups[:, 3].contiguous(), places, right=True)
    last = torch.searchsorted(groups[:, 2].contiguous(), places, right=True)
    edges = torch.cat([groups[:, 0], groups[-1:, 1]])
    return torch.stack([edges[first], edges[torch.maximum(first, last)]])


def _check_groups(groups: torch.Tensor, seen: torch.Tensor, rows: int, entries: int, longest: int) -> None:
    if groups.dim() != 2 or groups.shape[1] != 4 or groups.dtype != torch.int32:
        raise ValueError(f"groups is {described(groups)}, wanted int32 [M, 4]")
    if seen.shape != (2, entries) or seen.dtype != torch.int32:
        raise ValueError(f"seen is {described(seen)}, wanted int32 [2, {entries}]")
    if not groups.is_cpu:
        return
    row, last = 0, (0, 0)
    for start, stop, begin, end in groups.tolist():
        ascends = last[0] <= begin <= end <= entries and last[1] <= end
        if start != row or not start < stop <= min(rows, start + longest) or not ascends:
            raise ValueError(
                f"a group has rows {start} to {stop} and entries {begin} to {end}, wanted rows from {row} on, at most "
                f"{longest} of {rows}, and entries from {last[0]} on, up to {last[1]} or more of {entries}"
            )
        row, last = stop, (begin, end)
    if row != rows:
        raise ValueError(f"groups have {row} of {rows} rows, wanted all of them")
    if rows and not torch.equal(seen, rows_of_entries(groups, entries)):
        raise ValueError("seen is not of these groups, wanted rows_of_entries(groups, entries)")
