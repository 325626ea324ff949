"""Decode attention by the hand-written CUDA kernels; `csrc/include/mminfer/decode_attention_block.h` says how."""

import ctypes
import functools
import math

import torch

from mminfer_kernels import cuda
from mminfer_kernels.cuda import LARGEST_HEAD, SCALARS, Traffic, Variant, row_strides

THREADS = 128
KEYS = 4  # of a thread at a time, as in the header
KEYS_PER_SPLIT = 128  # a few tiles of a block; with fewer, the partial sums weigh too much
MAX_SPLITS = 128
SMALLEST_SIZE = 64
_Three = ctypes.c_longlong * 3


class Arguments(ctypes.Structure):
    """`DecodeAttentionArguments` of the header, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "starts", "output", "partial", "softmaxes")),
        *((name, _Three) for name in ("query_strides", "key_strides", "value_strides")),
        *((name, ctypes.c_int) for name in ("heads", "groups", "queries", "entries", "size", "splits")),
        ("factor", ctypes.c_double),
    )


@torch.no_grad()
def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """See `mminfer_kernels.decode_attention`.

    Raises:
        ValueError: dtypes that differ, or heads larger than `LARGEST_HEAD`.
    """
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}, wanted one dtype")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not output.numel():
        return output
    device = q.device.index or 0
    batch, heads, queries, size = q.shape
    groups, entries = k.shape[1:3]
    variant = _variant(q.dtype, size, heads // groups * queries, cuda.aligned(q, k, v))
    blocks = groups * _row_blocks(variant, heads // groups * queries)
    splits = split_count(batch * blocks, entries, cuda.multiprocessors(device) * variant.blocks)
    rows = batch * heads * queries
    partial = q.new_empty((rows, splits, size + 2) if splits > 1 else 0, dtype=torch.float32)
    if starts is not None:
        starts = starts.to(q.device, torch.int64).clamp(0, k.shape[2] - q.shape[2]).contiguous()
    arguments = Arguments(
        *(x.data_ptr() for x in (q, k, v)),
        None if starts is None else starts.data_ptr(),
        output.data_ptr(),
        partial.data_ptr(),
        partial.data_ptr() + 4 * rows * splits * size,
        *(_Three(*row_strides(x)) for x in (q, k, v)),
        *(heads, groups, queries, entries, size, splits),
        (size**-0.5 if scale is None else scale) * math.log2(math.e),
    )
    cuda.launch(variant, (splits, blocks, batch), arguments, device)
    if splits > 1:
        cuda.launch(_combine(q.dtype), (rows, 1, 1), arguments, device)
    return output


def split_count(blocks: int, entries: int, at_once: int) -> int:
    """Into how many ranges the keys are cut: as many as run at once, none of them short.

    Args:
        blocks: thread blocks of one range.
        entries: keys of a row.
        at_once: thread blocks that the GPU runs at a time.
    """
    return max(1, min(at_once // blocks, -(-entries // KEYS_PER_SPLIT), MAX_SPLITS))


def traffic(
    q: torch.Tensor, k: torch.Tensor, starts: torch.Tensor | None = None, multiprocessors: int = 132
) -> Traffic:
    """Bytes of one call; only shapes and dtypes are read, and the values of `starts`.

    Blocks of further query rows read the same keys and values again, and the splits write and read their sums.
    """
    batch, heads, queries, size = q.shape
    groups, entries = k.shape[1:3]
    variant = _variant(q.dtype, size, heads // groups * queries, True)
    row_blocks, rows = _row_blocks(variant, heads // groups * queries), batch * heads * queries
    splits = split_count(batch * groups * row_blocks, entries, multiprocessors * variant.blocks)
    seen = batch * entries - (0 if starts is None else int(starts.sum()))
    cache = 2 * seen * groups * size * q.element_size()
    ends = 2 * q.numel() * q.element_size() + (0 if starts is None else 8 * batch)
    partial = 2 * 4 * rows * splits * (size + 2) if splits > 1 else 0
    return Traffic(cache + ends, cache * row_blocks + ends + partial)


def usual_variants() -> list[Variant]:
    """The instances for common models; others are compiled when first used."""
    shapes = [(64, 1), (64, 4), (128, 1), (128, 4), (128, 7), (128, 8), (256, 8)]
    split = [_variant(torch.bfloat16, size, rows, True) for size, rows in shapes]
    other = [_variant(dtype, 128, 4, True) for dtype in (torch.float16, torch.float32)]
    return [*split, *other, _variant(torch.bfloat16, 128, 4, False), *map(_combine, SCALARS)]


@functools.cache
def _variant(dtype: torch.dtype, size: int, rows: int, aligned: bool) -> Variant:
    """The instance for heads of `size` and `rows` query rows a group, in blocks of equal height."""
    if size > LARGEST_HEAD:
        raise ValueError(f"heads of {size} elements, wanted at most {LARGEST_HEAD}")
    padded = max(SMALLEST_SIZE, 1 << (size - 1).bit_length())
    lanes = min(32, padded * dtype.itemsize // 16)  # threads that share a key
    elements = padded // lanes  # of a row, in one thread
    most = 2 if elements > 8 else 8 if aligned else 4
    height = -(-rows // -(-rows // most))
    queries_and_sums, loads = 2 * height * elements, KEYS * elements * dtype.itemsize // 2
    logits = KEYS * height + 32 * (KEYS * height // (lanes + 1))  # and what a thread keeps for each after the first
    registers = queries_and_sums + loads + logits + (0 if aligned else 32)
    blocks = 5 if registers <= 64 else 4 if registers <= 88 else 3 if registers <= 128 else 2
    macros = (
        ("SCALAR", SCALARS[dtype]),
        ("SIZE", padded),
        ("ROWS", height),
        ("ALIGNED", aligned),
    )
    return Variant("decode_attention", "decode_attention", THREADS, blocks, macros)


@functools.cache
def _combine(dtype: torch.dtype) -> Variant:
    return Variant("decode_attention", "decode_attention_combine", THREADS, 8, (("SCALAR", SCALARS[dtype]),))


def _row_blocks(variant: Variant, rows: int) -> int:
    return -(-rows // int(dict(variant.macros)["ROWS"]))
