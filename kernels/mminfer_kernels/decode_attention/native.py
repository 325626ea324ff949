"""Decode attention in C++ on the CPU (`csrc/cpu/decode_attention.cpp`), in CUDA on a GPU."""

import ctypes

import torch

from mminfer_kernels.native import DTYPE_CODES, Rows3, call, pointer, rows_contiguous

PIECE_KEYS = 512  # a thread's stretch of keys at least; fewer are not worth a second pass over the partial sums
PIECES_A_THREAD = 4
SERIAL_ELEMENTS = 1 << 17  # keys of so many elements: starting threads would take longer


class DecodeArgs(ctypes.Structure):
    """`DecodeArgs` of `csrc/cpu/decode_attention.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "starts", "partial")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "queries", "entries", "head_dim")),
        *((f"{name}_stride", Rows3) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("pieces", "piece_keys", "threads")),
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
    batch, heads, queries, size = q.shape
    groups, entries = k.shape[1:3]
    out = q.new_empty(batch, heads, queries, size)
    if q.numel() == 0:
        return out
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    starts = None if starts is None else starts.to(torch.int64).contiguous()
    threads = 1 if k.numel() <= SERIAL_ELEMENTS else torch.get_num_threads()
    wanted = -(-threads * PIECES_A_THREAD // (batch * groups)) if threads > 1 else 1
    pieces = max(1, min(wanted, entries // PIECE_KEYS))
    partial = torch.empty(batch * groups * pieces * heads // groups * queries * (-(-size // 16) * 16 + 2))
    args = DecodeArgs(
        q=pointer(q), k=pointer(k), v=pointer(v), out=pointer(out), starts=pointer(starts), partial=pointer(partial),
        batch=batch, heads=heads, groups=groups, queries=queries, entries=entries, head_dim=size,
        q_stride=Rows3.of(q), k_stride=Rows3.of(k), v_stride=Rows3.of(v), out_stride=Rows3.of(out), pieces=pieces,
        piece_keys=-(-entries // pieces), threads=threads, scale=size**-0.5 if scale is None else scale,
    )  # fmt: skip
    call("decode_attention", ctypes.byref(args), DTYPE_CODES[q.dtype])
    return out
