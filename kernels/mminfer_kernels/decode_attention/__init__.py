"""Attention of new queries over a cache: a padded one, or one in which every head has as many entries as it keeps."""

import torch

from mminfer_kernels.backends import native_takes, on_cuda, triton_takes
from mminfer_kernels.checks import INTEGERS, check_heads, check_packed, factor_of
from mminfer_kernels.cuda import LARGEST_HEAD
from mminfer_kernels.decode_attention import reference
from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.tracing import traceable

__all__ = ["decode_attention", "packed_decode_attention"]


def _native_takes(*tensors: torch.Tensor) -> bool:
    return native_takes(*tensors) and (not on_cuda(*tensors) or tensors[0].shape[-1] <= LARGEST_HEAD)


_ROOM = "mminfer_kernels.decode_attention"
register("decode_attention", "reference", reference.decode_attention)
register("decode_attention", "triton", f"{_ROOM}.triton_kernel:decode_attention", triton_takes, on_cuda)
register("decode_attention", "native", f"{_ROOM}.native:decode_attention", _native_takes)
register("packed_decode_attention", "reference", reference.packed_decode_attention)
register("packed_decode_attention", "triton", f"{_ROOM}.triton_kernel:packed_decode_attention", triton_takes, on_cuda)
register("packed_decode_attention", "native", f"{_ROOM}.native:packed_decode_attention", _native_takes)


def _fake(q: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None = None,
    *args: object,
    **kwargs: object,
) -> int:
    batch, heads, queries, size = q.shape
    pairs = batch * (queries * k.shape[2] - queries * (queries - 1) // 2)
    if starts is not None:
        pairs -= queries * int(starts.clamp(0, k.shape[2] - queries).sum())
    return 4 * heads * size * pairs


@traceable(_fake, _flops)
def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention over right-aligned rows of a cache: row b attends to its entries starts[b] .. T-1.

    The last S entries are the queries' own and causal among them; everything before is visible to all.

    Args:
        q: queries [B, H, S, D], S small, usually 1.
        k: keys [B, G, T, D], T >= S; query head h reads key head h // (H / G).
        v: values [B, G, T, D].
        starts: [B] integers from 0 to T - S: the first valid entry of each row; what lies outside counts as the
            nearest of these, so that every query sees an entry. None means all are valid.
        scale: factor of the logits, `D ** -0.5` by default.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [B, H, S, D] in q's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: an explicit backend that is not there.
    """
    check_heads(q, k, v, starts=starts)
    scale = factor_of(q, scale)
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries for {k.shape[2]} entries, wanted the queries' own to be among them")
    if starts is not None and (starts.shape != (q.shape[0],) or starts.dtype not in INTEGERS):
        raise ValueError(f"starts is {starts.dtype} {list(starts.shape)}, wanted integers [{q.shape[0]}]")
    _, run = resolve("decode_attention", backend, q, k, v)
    return run(q, k, v, starts, scale)


def _packed_flops(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    lengths: torch.Tensor,
    *args: object,
    **kwargs: object,
) -> int:
    return 4 * q.shape[1] // first.shape[1] * q.shape[3] * int(lengths.sum())


@traceable(_fake, _packed_flops)
def packed_decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None = None,
    log_mass: torch.Tensor | None = None,
    longest: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention over a packed cache: key head g of sequence b has `lengths[b, g]` rows from `first[b, g]` on.

    Heads may differ in length as they like: the work is cut into equal parts of all rows. Segments may lie in any
    order, with rows between them that are never read, and may share rows.

    Args:
        q: queries [B, H, 1, D].
        keys: [R, D]; query head h reads the rows of key head h // (H / G).
        values: [R, D].
        first: [B, G] int64.
        lengths: [B, G] int64, at least 1.
        scale: factor of the logits, `D ** -0.5` by default.
        log_mass: [R] float32, added to each row's logits after scaling: a row of log(n) counts for n equal
            ones, of -inf for none.
        longest: no length is larger. On a GPU launches are sized by it; where it is None, the GPU is waited for.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [B, H, 1, D] in q's dtype. On a GPU, where to look at places would be to wait for it, a head whose rows are not
        all there, or more than `longest`, gets NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, segments that hold no row or rows that are not there.
        BackendError: an explicit backend that is not there.
    """
    check_packed(q, keys, values, first, lengths, log_mass, longest)
    scale = factor_of(q, scale)
    _, run = resolve("packed_decode_attention", backend, q, keys, values)
    return run(q, keys, values, first, lengths, scale, log_mass, longest)
