"""Merging of rows by the hand-written CUDA kernel; `csrc/include/mminfer/merge_rows_block.h` says how."""

import ctypes

import torch

from mminfer_kernels import cuda
from mminfer_kernels.cuda import SCALARS, Traffic, Variant, row_strides
from mminfer_kernels.merge_rows import reference
from mminfer_kernels.rows.reference import flat_index

THREADS, BLOCKS = 128, 8
_Two = ctypes.c_longlong * 2


class Arguments(ctypes.Structure):
    """`MergeRowsArguments` of the header, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("dst", "src", "order", "bounds", "dst_weight", "src_weight")),
        *((name, ctypes.c_void_p) for name in ("merged", "weight")),
        *((name, _Two) for name in ("dst_strides", "src_strides")),
        *((name, ctypes.c_longlong) for name in ("targets", "sources", "size", "rows", "lanes")),
    )


@torch.no_grad()
def merge_rows(
    dst: torch.Tensor,
    src: torch.Tensor,
    index: torch.Tensor,
    dst_weight: torch.Tensor | None,
    src_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.merge_rows`; deterministic, sums are taken in the order of `src`."""
    if dst.dtype != src.dtype:
        merged, weight = merge_rows(dst.float(), src.float(), index, dst_weight, src_weight)
        return merged.to(dst.dtype), weight
    merged = torch.empty_like(dst, memory_format=torch.contiguous_format)
    weight = dst.new_empty(dst.shape[:-1], dtype=torch.float32)
    if not merged.numel():
        return reference.merge_rows(dst, src, index, dst_weight, src_weight)
    d, s = (_batched(x) for x in (dst, src))
    order, bounds = segments(flat_index(index, dst.shape[-2]).flatten(), weight.numel())
    weights = [None if x is None else x.to(torch.float32).contiguous() for x in (dst_weight, src_weight)]
    vectors = -(-d.shape[2] * d.element_size() // 16)
    lanes = min(THREADS, 1 << (vectors - 1).bit_length())
    arguments = Arguments(
        *(x.data_ptr() for x in (d, s, order, bounds)),
        *(None if x is None else x.data_ptr() for x in weights),
        *(x.data_ptr() for x in (merged, weight)),
        *(_Two(*row_strides(x)) for x in (d, s)),
        *(d.shape[1], s.shape[1], d.shape[2], weight.numel(), lanes),
    )
    grid = (-(-weight.numel() * lanes // THREADS), -(-vectors // lanes), 1)
    cuda.launch(_variant(dst.dtype, cuda.aligned(d, s)), grid, arguments, dst.device.index or 0)
    return merged, weight


def segments(place: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources sorted by destination, in their own order within one.

    Args:
        place: [M] int64, the destination of each source, below `rows`.

    Returns:
        order [M], numbers of the sources; bounds [rows + 1], where each destination's part of `order` begins.
    """
    kind = torch.int32 if rows < 2**31 else torch.int64  # a radix sort of half the passes
    sorted_place, order = torch.sort(place.to(kind), stable=True)
    return order, torch.searchsorted(sorted_place, torch.arange(rows + 1, dtype=kind, device=place.device))


def traffic(dst: torch.Tensor, src: torch.Tensor, weights: bool = True) -> Traffic:
    """Bytes of one call; only shapes and dtypes are read.

    Beyond the least: the sort (a radix sort: one pass that counts 32-bit keys, four that move keys and 64-bit numbers),
    the search for the bounds, and what the kernel reads again for every further `THREADS` vectors of a row.
    """
    targets, sources = dst.numel() // dst.shape[-1], src.numel() // src.shape[-1]
    rows = (2 * dst.numel() + src.numel()) * dst.element_size()
    given = 4 * (targets + sources) if weights else 0
    least = rows + given + 8 * sources + 4 * targets  # index read, weight written
    sort = (8 + 4 + 4 + 4 * 2 * (4 + 8)) * sources
    search = 4 * sources + (4 + 4 + 8) * (targets + 1)
    parts = -(-dst.shape[-1] * dst.element_size() // (16 * THREADS))
    read = parts * (8 * sources + 8 * (targets + 1) + given)
    return Traffic(least, rows + sort + search + read + 4 * targets)


def usual_variants() -> list[Variant]:
    """Every instance there is."""
    return [_variant(dtype, aligned) for dtype in SCALARS for aligned in (True, False)]


def _variant(dtype: torch.dtype, aligned: bool) -> Variant:
    return Variant("merge_rows", "merge_rows", THREADS, BLOCKS, (("SCALAR", SCALARS[dtype]), ("ALIGNED", aligned)))


def _batched(x: torch.Tensor) -> torch.Tensor:
    """[N, T, C] with adjacent columns; a view wherever the leading dimensions lie like one."""
    rows = x.flatten(0, -3) if x.dim() > 2 else x[None]
    return rows if rows.stride(-1) == 1 else rows.contiguous()
