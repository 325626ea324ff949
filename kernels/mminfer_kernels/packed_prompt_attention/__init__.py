"""Causal attention of a prompt over a packed cache, in which every head has as many keys as it keeps."""

import torch

from mminfer_kernels.backends import cpu_takes, on_cuda, triton_takes
from mminfer_kernels.checks import (
    check_floats,
    check_from_end,
    check_log_mass,
    check_segments,
    check_tensors,
    described,
    factor_of,
)
from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.packed_prompt_attention import reference
from mminfer_kernels.prompt_attention.reference import rows_first
from mminfer_kernels.tracing import traceable

__all__ = ["packed_prompt_attention"]

_OP = "packed_prompt_attention"
_ROOM = f"mminfer_kernels.{_OP}"
register(_OP, "reference", reference.packed_prompt_attention)
register(_OP, "triton", f"{_ROOM}.triton_kernel:{_OP}", triton_takes, on_cuda)
register(_OP, "native", f"{_ROOM}.native:{_OP}", cpu_takes)


def _fake(q: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return rows_first(torch.empty_like(q))


def _flops(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None = None,
    query_index: torch.Tensor | None = None,
    *args: object,
    **kwargs: object,
) -> int:
    heads, queries, size = q.shape[1:]
    from_end = torch.arange(-queries, 0) if query_index is None else query_index
    pairs = queries * int(lengths.sum()) + len(lengths) * int((from_end + 1).sum())
    return 4 * heads // len(lengths) * size * pairs


@traceable(_fake, _flops)
def packed_prompt_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None = None,
    query_index: torch.Tensor | None = None,
    log_mass: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`prompt_attention` over heads of different lengths: key head g has `lengths[g]` rows from `first[g]` on.

    Segments may lie in any order, with rows between them that are never read, and may share rows.

    Args:
        q: queries [1, H, S, D].
        keys: [R, D]; query head h reads the rows of key head h // (H / G).
        values: [R, D].
        first: [G] int64.
        lengths: [G] int64.
        scale: factor of the logits, `D ** -0.5` by default.
        query_index: [S] int64, strictly ascending: the place of each query counted from the end of its head, -1 the
            last key, so that it is one for all heads. None puts the S queries at the last S places.
        log_mass: [R] float32, the logarithm of how many keys each row stands for; None: 0.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [1, H, S, D] in q's dtype, in memory [1, S, H, D]. On a GPU, where to look at segments would be to wait for
        it, they must be there.

    Raises:
        ValueError: shapes or dtypes that do not fit, segments that are shorter than the queries reach or not there.
        BackendError: an explicit backend that is not there.
    """
    given = {"q": q, "keys": keys, "values": values, "first": first, "lengths": lengths}
    check_tensors(given, {"query_index": query_index, "log_mass": log_mass})
    if q.dim() != 4 or q.shape[0] != 1 or keys.dim() != 2 or keys.shape[1] != q.shape[3]:
        raise ValueError(f"q is {list(q.shape)} and keys {list(keys.shape)}, wanted [1, H, S, D] and [R, D]")
    if values.shape != keys.shape:
        raise ValueError(f"keys are {list(keys.shape)} and values {list(values.shape)}, wanted twice [R, D]")
    check_floats(q=q, keys=keys, values=values)
    if first.dim() != 1 or lengths.dim() != 1:
        raise ValueError(f"first is {described(first)} and lengths {described(lengths)}, wanted int64 [G] of both")
    least = check_from_end(query_index, q.shape[2], keys.shape[0])
    check_segments(first[None], lengths[None], keys.shape[0], least=least, batch=1)
    if q.shape[1] % len(first):
        raise ValueError(f"{q.shape[1]} query heads do not divide evenly over {len(first)} key heads")
    check_log_mass(log_mass, keys)
    scale = factor_of(q, scale)
    _, run = resolve(_OP, backend, q, keys, values)
    return run(q, keys, values, first, lengths, scale, query_index, log_mass)
