"""Decode attention by the hand-written CUDA kernels; `csrc/include/mminfer/decode_attention_block.h` says how."""

import ctypes
import functools
import math
from collections.abc import Callable

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
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "starts", "firsts", "lengths", "log_mass")),
        *((name, ctypes.c_void_p) for name in ("output", "partial", "softmaxes")),
        *((name, _Three) for name in ("query_strides", "key_strides", "value_strides")),
        *((name, ctypes.c_int) for name in ("heads", "groups", "queries", "entries", "size", "splits", "split_keys")),
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
    if starts is not None:
        starts = starts.to(q.device, torch.int64).clamp(0, k.shape[2] - q.shape[2]).contiguous()

    def splits_of(blocks: int, at_once: int) -> tuple[int, int]:
        return split_count(blocks, k.shape[2], at_once), 0

    return _run(q, k, v, {"starts": starts}, scale, splits_of)


@torch.no_grad()
def packed_decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None,
    log_mass: torch.Tensor | None,
    longest: int | None,
) -> torch.Tensor:
    """See `mminfer_kernels.packed_decode_attention`.

    Raises:
        ValueError: dtypes that differ, or heads larger than `LARGEST_HEAD`.
    """
    if not q.numel():
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    rows, groups = len(keys), first.shape[1]
    bound = min(rows, int(lengths.max()) if longest is None else longest)
    dense = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    k, v = (x.expand(len(q), groups, *x.shape) for x in dense)
    masses = None if log_mass is None else log_mass.contiguous()
    places = {"firsts": first.contiguous(), "lengths": lengths.contiguous(), "log_mass": masses}

    def splits_of(blocks: int, at_once: int) -> tuple[int, int]:
        return packed_splits(blocks // (len(q) * groups) * rows, bound, at_once)

    return _run(q, k, v, places, scale, splits_of)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: dict[str, torch.Tensor | None],
    scale: float | None,
    splits_of: Callable[[int, int], tuple[int, int]],
) -> torch.Tensor:
    """Launches the kernels.

    Args:
        places: which entries of the keys and values [B, G, T, D] each head has, by the names of the arguments.
        splits_of: told the blocks of one split and those that run at once, says how many splits, and how long.
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
    variant = _variant(q.dtype, size, heads // groups * queries, cuda.aligned(q, k, v), "lengths" in places)
    blocks = groups * _row_blocks(variant, heads // groups * queries)
    splits, split_keys = splits_of(batch * blocks, cuda.multiprocessors(device) * variant.blocks)
    rows = batch * heads * queries
    partial = q.new_empty((rows, splits, size + 2) if splits > 1 else 0, dtype=torch.float32)
    arguments = Arguments(
        **{name: x.data_ptr() for name, x in {"query": q, "key": k, "value": v, "output": output}.items()},
        **{name: None if x is None else x.data_ptr() for name, x in places.items()},
        partial=partial.data_ptr(),
        softmaxes=partial.data_ptr() + 4 * rows * splits * size,
        **{f"{name}_strides": _Three(*row_strides(x)) for name, x in {"query": q, "key": k, "value": v}.items()},
        **{"heads": heads, "groups": groups, "queries": queries, "entries": entries, "size": size},
        **{"splits": splits, "split_keys": split_keys},
        factor=(size**-0.5 if scale is None else scale) * math.log2(math.e),
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


def packed_splits(rows: int, longest: int, at_once: int) -> tuple[int, int]:
    """Into how many ranges the keys of the longest head are cut, and how long these are, so that all heads' fill a GPU.

    Args:
        rows: keys of all heads, each as often as blocks read it.
        longest: keys of the longest head, at most.
        at_once: thread blocks that the GPU runs at a time.
    """
    keys = -(-max(KEYS_PER_SPLIT, -(-rows // at_once)) // KEYS_PER_SPLIT) * KEYS_PER_SPLIT
    return max(1, -(-longest // keys)), keys


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
    found = []
    for packed in (False, True):
        found += [_variant(torch.bfloat16, size, rows, True, packed) for size, rows in shapes]
        found += [_variant(dtype, 128, 4, True, packed) for dtype in (torch.float16, torch.float32)]
        found.append(_variant(torch.bfloat16, 128, 4, False, packed))
    return [*found, *map(_combine, SCALARS)]


@functools.cache
def _variant(dtype: torch.dtype, size: int, rows: int, aligned: bool, packed: bool = False) -> Variant:
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
    source = "packed_decode_attention" if packed else "decode_attention"
    return Variant("decode_attention", source, THREADS, blocks, macros)


@functools.cache
def _combine(dtype: torch.dtype) -> Variant:
    return Variant("decode_attention", "decode_attention_combine", THREADS, 8, (("SCALAR", SCALARS[dtype]),))


def _row_blocks(variant: Variant, rows: int) -> int:
    return -(-rows // int(dict(variant.macros)["ROWS"]))
