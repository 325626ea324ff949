"""Ranges of visible keys and rows, and loads of tiles, for the Triton kernels of attention.

Every mask of ours is a range: row s sees keys lo[s] .. hi[s] - 1, both ascending in s. So a key is seen by a range of
rows, and a block knows at once where it begins, which keys all its rows see, and where it ends.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mminfer_kernels.launching import power_of_two, strides

LOG2_E = math.log2(math.e)  # logits are taken in base 2, which the GPU's exponential is


@triton.jit
def key_range(p_lo, p_hi, rows, S, N, CAUSAL: tl.constexpr, zero=0):
    """Half-open range of the keys each row sees, p_hi from `zero` on; rows past the last repeat its range."""
    rows = tl.minimum(rows, S - 1)
    lo = rows * 0 if p_lo is None else tl.load(p_lo + rows)
    if p_hi is not None:
        hi = tl.load(p_hi + rows) + zero
    elif CAUSAL:
        hi = rows + (N - S + 1)
    else:
        hi = rows * 0 + N
    return lo, hi


@triton.jit
def row_range(p_lo, p_hi, keys, S, N, CAUSAL: tl.constexpr):
    """Half-open range of the rows that see each key; keys past the last repeat its range."""
    keys = tl.minimum(keys, N - 1)
    if p_lo is not None:
        lo = tl.load(p_lo + keys)
    elif CAUSAL:
        lo = tl.maximum(keys - (N - S), 0)
    else:
        lo = keys * 0
    hi = keys * 0 + S if p_hi is None else tl.load(p_hi + keys)
    return lo, hi


@triton.jit
def key_blocks(p_lo, p_hi, row, S, N, CAUSAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, zero=0):
    """Of rows `row .. row + BLOCK_S - 1`: where the keys begin, where the first that all rows see end, the end."""
    lo_first, hi_first = key_range(p_lo, p_hi, row, S, N, CAUSAL, zero)
    _, hi_last = key_range(p_lo, p_hi, row + BLOCK_S - 1, S, N, CAUSAL, zero)
    begin = lo_first // BLOCK_N * BLOCK_N
    full_end = hi_first // BLOCK_N * BLOCK_N if p_lo is None else begin
    return begin, full_end, hi_last


@triton.jit
def load_rows(p_x, first, rows, stride, N, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D] from row `first` on; zero past row N and column D."""
    dims = tl.arange(0, BLOCK_D)
    p_block = p_x + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    m_block = dims[None, :] < D
    if MASKED:
        m_block = m_block & (first + rows[:, None] < N)
    return tl.load(p_block, mask=m_block, other=0.0)


class Ranges(NamedTuple):
    """Which keys each row sees, int32 [S], and which rows see each key, int32 [N]; None: as `causal` says."""

    lo: torch.Tensor | None = None
    hi: torch.Tensor | None = None
    row_lo: torch.Tensor | None = None
    row_hi: torch.Tensor | None = None


def ranges_of(keys: int, lo: torch.Tensor | None, hi: torch.Tensor | None) -> Ranges:
    """`lo` and `hi`: [S], ascending, the half-open range of keys that each row sees; None: from 0, all."""
    if hi is None:
        return Ranges()
    places = torch.arange(keys, device=hi.device, dtype=hi.dtype)
    row_lo = torch.searchsorted(hi, places, right=True, out_int32=True)
    row_hi = None if lo is None else torch.searchsorted(lo, places, right=True, out_int32=True)
    return Ranges(None if lo is None else lo.int(), hi.int(), row_lo, row_hi)


def in_base_2(log_mass: torch.Tensor | None) -> torch.Tensor | None:
    """[B, G, N] float32 with dense rows, as kernels add it to their logits."""
    return None if log_mass is None else (log_mass.float() * LOG2_E).contiguous()


def attention_arguments(q: torch.Tensor, k: torch.Tensor) -> dict[str, int]:
    """Strides and sizes of q [B, H, S, D] and k [B, G, N, D] by the names that kernels of attention give them."""
    heads, queries, size = q.shape[1:]
    sizes = {"H": heads, "repeat": heads // k.shape[1], "S": queries, "N": k.shape[2], "D": size}
    return strides(q, "qbhs") | strides(k, "kbgn") | sizes | {"BLOCK_D": power_of_two(size)}
