"""Decode attention in C++ on the CPU (`csrc/cpu/decode_attention.cpp`), in CUDA on a GPU."""

import ctypes

import torch

from mminfer_kernels.native import DTYPE_CODES, Rows3, call, pointer, rows_contiguous


class DecodeArgs(ctypes.Structure):
    """`DecodeArgs` of `csrc/cpu/decode_attention.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "starts", "first", "lengths", "log_mass")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "queries", "entries", "head_dim")),
        *((f"{name}_stride", Rows3) for name in ("q", "k", "v", "out")),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


@torch.no_grad()
def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """See `mminfer_kernels.decode_attention`."""
    if q.is_cuda:
        from mminfer_kernels.decode_attention.cuda_kernel import decode_attention as on_gpu

        return on_gpu(q, k, v, starts, scale)
    starts = None if starts is None else starts.to(torch.int64).contiguous()
    return _run(q, k, v, k.shape[1], (starts, None, None, None), scale)


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
    """See `mminfer_kernels.packed_decode_attention`."""
    if q.is_cuda:
        from mminfer_kernels.decode_attention.cuda_kernel import packed_decode_attention as on_gpu

        return on_gpu(q, keys, values, first, lengths, scale, log_mass, longest)
    log_mass = None if log_mass is None else log_mass.float().contiguous()
    places = None, first.contiguous(), lengths.contiguous(), log_mass
    return _run(q, keys, values, first.shape[1], places, scale)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: int,
    places: tuple[torch.Tensor | None, ...],
    scale: float | None,
) -> torch.Tensor:
    """Of padded keys and values [B, G, T, D], or packed ones [T, D] of which the places say whose they are.

    Args:
        places: starts, first, lengths and log_mass, as the C++ struct has them.
    """
    batch, heads, queries, size = q.shape
    out = q.new_empty(batch, heads, queries, size)
    if q.numel() == 0:
        return out
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    sizes = batch, heads, groups, queries, k.shape[-2], size
    strides = Rows3.of(q), _rows(k), _rows(v), Rows3.of(out)
    scale = size**-0.5 if scale is None else scale
    pointers = map(pointer, (q, k, v, out, *places))
    args = DecodeArgs(*pointers, *sizes, *strides, torch.get_num_threads(), scale)
    call("decode_attention", ctypes.byref(args), DTYPE_CODES[q.dtype])
    return out


def _rows(x: torch.Tensor) -> Rows3:
    """Strides of [B, G, T, D]; all heads of all sequences share [T, D]."""
    return Rows3.of(x) if x.dim() == 4 else Rows3(0, 0, x.stride(0))
