"""Rotary tables and rotation in Triton.

The angle is counted in quarter turns: position times inv_freq * 2 / pi in float64, less the nearest whole number, then
float32. Position 2**20 keeps 2**-33 of a quarter turn, and the rest, at most half of one, is rounded to 2**-26. Those
are four float64 operations an angle, formed once for all heads that a program rotates, where a product and a reduction
in pairs of float32 would take twenty. What is left needs only a polynomial: the general cosine of CUDA's library
brings along a reduction of large angles, which takes local memory.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from mminfer_kernels.launching import dense_rows, interpretable, launch, power_of_two, strides

HEADS = 8  # heads a program rotates by the same angles
BLOCK_ANGLES = 1024  # of a block


@triton.jit
def _cos_sin(position, quarters, axes, p_row, pairs, m_block, stride_pa):
    """Cosine and sine by Cephes' polynomials, float32 [rows, pairs], of float64 positions and quarter turns."""
    p_position = position + p_row[:, None] + 0 * pairs[None, :]
    if axes is not None:
        p_position += tl.load(axes + pairs[None, :], mask=m_block, other=0) * stride_pa
    b_position = tl.load(p_position, mask=m_block, other=0.0)
    b_quarters = b_position * tl.load(quarters + pairs[None, :], mask=m_block, other=0.0)
    b_whole = tl.floor(b_quarters + 0.5)
    b_angle = (b_quarters - b_whole).to(tl.float32) * 1.5707963267948966  # at most pi / 4
    b_whole = b_whole.to(tl.int64)
    b_square = b_angle * b_angle
    b_sin = b_square * (b_square * (b_square * -1.9515295891e-4 + 8.3321608736e-3) - 1.6666654611e-1)
    b_sin = b_angle + b_angle * b_sin
    b_cos = b_square * (b_square * 2.443315711809948e-5 - 1.388731625493765e-3) + 4.166664568298827e-2
    b_cos = 1.0 - 0.5 * b_square + b_square * b_square * b_cos
    m_odd = (b_whole & 1) == 1
    b_turned_cos, b_turned_sin = tl.where(m_odd, b_sin, b_cos), tl.where(m_odd, b_cos, b_sin)
    b_turned_cos = tl.where(((b_whole + 1) & 2) == 2, -b_turned_cos, b_turned_cos)
    return b_turned_cos, tl.where((b_whole & 2) == 2, -b_turned_sin, b_turned_sin)


@triton.jit
def _rotate_heads(
    x, out, begin, end, stride_xh, stride_oh, p_x, p_out, b_cos, b_sin, b_cos_2, b_sin_2, m_block, half,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """Rotate heads `begin .. end - 1`; products are rounded to PRODUCT, as the host models' arithmetic does."""
    for head in tl.range(begin, end):
        p_first = x + tl.cast(head, tl.int64) * stride_xh + p_x
        b_first = tl.load(p_first, mask=m_block, other=0.0).to(tl.float32)
        b_second = tl.load(p_first + half, mask=m_block, other=0.0).to(tl.float32)
        b_out = (b_first * b_cos).to(PRODUCT).to(tl.float32) - (b_second * b_sin).to(PRODUCT).to(tl.float32)
        b_out_2 = (b_second * b_cos_2).to(PRODUCT).to(tl.float32) + (b_first * b_sin_2).to(PRODUCT).to(tl.float32)
        p_rotated = out + tl.cast(head, tl.int64) * stride_oh + p_out
        tl.store(p_rotated, b_out.to(out.dtype.element_ty), mask=m_block)
        tl.store(p_rotated + half, b_out_2.to(out.dtype.element_ty), mask=m_block)


@triton.jit(do_not_specialize=["N", "stride_pa"])
def rotary_table_fwd_kernel(
    position, quarters, axes, cos, sin, scaling, stride_pa, N, half, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Both tables [N, 2 * half] of positions [A, N]. Grid: blocks of positions."""
    rows, pairs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    m_block = (rows[:, None] < N) & (pairs[None, :] < half)
    b_cos, b_sin = _cos_sin(position, quarters, axes, rows, pairs, m_block, stride_pa)
    p_out = rows[:, None] * 2 * half + pairs[None, :]
    b_cos, b_sin = (b_cos * scaling).to(cos.dtype.element_ty), (b_sin * scaling).to(sin.dtype.element_ty)
    tl.store(cos + p_out, b_cos, mask=m_block)
    tl.store(cos + p_out + half, b_cos, mask=m_block)
    tl.store(sin + p_out, b_sin, mask=m_block)
    tl.store(sin + p_out + half, b_sin, mask=m_block)


@triton.jit(do_not_specialize=["N", "stride_pa"])
def rotary_fwd_kernel(
    q, k, position, quarters, axes, scaling,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kg, stride_kn, stride_pa, H, G, N, half,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Rotates q and k in place, straight from positions [A, B, N]. Grid: blocks of tokens; blocks of heads; batch."""
    first, batch = tl.program_id(1) * HEADS, tl.program_id(2).to(tl.int64)
    rows, pairs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    m_block = (rows[:, None] < N) & (pairs[None, :] < half)
    b_cos, b_sin = _cos_sin(position, quarters, axes, batch * N + rows, pairs, m_block, stride_pa)
    b_cos, b_sin = b_cos * scaling, b_sin * scaling
    p_q = rows[:, None] * stride_qn + pairs[None, :]
    p_k = rows[:, None] * stride_kn + pairs[None, :]
    _rotate_heads(
        q + batch * stride_qb, q + batch * stride_qb, first, tl.minimum(first + HEADS, H), stride_qh, stride_qh,
        p_q, p_q, b_cos, b_sin, b_cos, b_sin, m_block, half, tl.float32,
    )  # fmt: skip
    _rotate_heads(
        k + batch * stride_kb, k + batch * stride_kb, tl.maximum(first, H) - H, tl.minimum(first + HEADS - H, G),
        stride_kg, stride_kg, p_k, p_k, b_cos, b_sin, b_cos, b_sin, m_block, half, tl.float32,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def apply_rotary_fwd_kernel(
    x, cos, sin, out,
    stride_xb, stride_xh, stride_xn, stride_ob, stride_oh, stride_on, stride_cb, stride_cn, stride_sb, stride_sn,
    H, N, half, HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Rotates x [B, H, N, D] by tables [B, N, D]. Grid: blocks of tokens; blocks of heads; batch."""
    first, batch = tl.program_id(1) * HEADS, tl.program_id(2).to(tl.int64)
    rows, pairs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    m_block = (rows[:, None] < N) & (pairs[None, :] < half)
    p_cos = cos + batch * stride_cb + rows[:, None] * stride_cn + pairs[None, :]
    p_sin = sin + batch * stride_sb + rows[:, None] * stride_sn + pairs[None, :]
    b_cos = tl.load(p_cos, mask=m_block, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin, mask=m_block, other=0.0).to(tl.float32)
    b_cos_2 = tl.load(p_cos + half, mask=m_block, other=0.0).to(tl.float32)
    b_sin_2 = tl.load(p_sin + half, mask=m_block, other=0.0).to(tl.float32)
    p_x = rows[:, None] * stride_xn + pairs[None, :]
    p_out = rows[:, None] * stride_on + pairs[None, :]
    product: tl.constexpr = cos.dtype.element_ty if cos.dtype.element_ty == x.dtype.element_ty else tl.float32
    _rotate_heads(
        x + batch * stride_xb, out + batch * stride_ob, first, tl.minimum(first + HEADS, H), stride_xh, stride_oh,
        p_x, p_out, b_cos, b_sin, b_cos_2, b_sin_2, m_block, half, product,
    )  # fmt: skip


def _blocks(tokens: int, half: int) -> dict[str, int]:
    """A block's angles, of as many tokens as fit."""
    pairs = power_of_two(half)
    return {"BLOCK_N": max(1, min(power_of_two(tokens, 1), BLOCK_ANGLES // pairs)), "BLOCK_P": pairs}


@functools.lru_cache(maxsize=64)
def _axis_tensor(axes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Copied to the device once a model, not once a call."""
    return torch.tensor(axes, dtype=torch.int32, device=device)


def _angle_tensors(
    position: torch.Tensor, inv_freq: torch.Tensor, axes: list[int] | None
) -> dict[str, torch.Tensor | None]:
    """Positions [A, rows], frequencies in quarter turns and their axes."""
    return {
        "position": position.contiguous(),
        "quarters": inv_freq.double() * (2 / math.pi),
        "axes": None if axes is None else _axis_tensor(tuple(axes), position.device),
    }


@torch.no_grad()
def rotary_table(
    position: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float,
    axes: list[int] | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.rotary_table`; `axes` names the position axis of each frequency."""
    leading, half = position.shape if axes is None else position.shape[1:], len(inv_freq)
    cos, sin = (torch.empty(*leading, 2 * half, dtype=dtype, device=position.device) for _ in range(2))
    if cos.numel() == 0:
        return cos, sin
    cos, sin = interpretable(cos, sin)
    blocks = _blocks(leading.numel(), half)
    launch(
        rotary_table_fwd_kernel,
        (triton.cdiv(leading.numel(), blocks["BLOCK_N"]),),
        {**_angle_tensors(position, inv_freq, axes), "cos": cos, "sin": sin},
        **{"scaling": attention_scaling, "stride_pa": leading.numel(), "N": leading.numel(), "half": half},
        **blocks,
    )
    return cos.to(dtype), sin.to(dtype)


@torch.no_grad()
def apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.apply_rotary`."""
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out, shape = torch.empty_like(x), x.shape
    if out.numel() == 0:
        return out
    x, cos, sin, rotated = interpretable(x, cos, sin, out)
    x, rotated = (dense_rows(t.reshape(-1, *shape[-3:])) for t in (x, rotated))  # [B, H, N, D]
    cos, sin = (dense_rows(t.expand(*shape[:-3], *t.shape[-2:]).reshape(-1, *t.shape[-2:])) for t in (cos, sin))
    blocks = _blocks(shape[-2], shape[-1] // 2)
    launch(
        apply_rotary_fwd_kernel,
        (triton.cdiv(shape[-2], blocks["BLOCK_N"]), triton.cdiv(shape[-3], HEADS), len(x)),
        {"x": x, "cos": cos, "sin": sin, "out": rotated},
        **strides(x, "xbhn"),
        **strides(rotated, "obhn"),
        **strides(cos, "cbn"),
        **strides(sin, "sbn"),
        **{"H": shape[-3], "N": shape[-2], "half": shape[-1] // 2, "HEADS": HEADS},
        **blocks,
    )
    if rotated.data_ptr() != out.data_ptr():
        out.copy_(
            rotated.view(shape)
        )  # the layout of x is not one that the kernel writes, or it is interpreted bfloat16
    return out


@torch.no_grad()
def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    position: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float,
    axes: list[int] | None,
) -> None:
    """Write into `q` and `k`; see `mminfer_kernels.rotary_`."""
    if position.numel() == 0 or len(inv_freq) == 0:
        return
    tokens, half = position.shape[-1], len(inv_freq)
    blocks = _blocks(tokens, half)
    turned_q, turned_k = (dense_rows(x) for x in interpretable(q, k))
    launch(
        rotary_fwd_kernel,
        (triton.cdiv(tokens, blocks["BLOCK_N"]), triton.cdiv(q.shape[1] + k.shape[1], HEADS), len(q)),
        {"q": turned_q, "k": turned_k, **_angle_tensors(position, inv_freq, axes)},
        **strides(turned_q, "qbhn"),
        **strides(turned_k, "kbgn"),
        **{"stride_pa": position.shape[-2] * tokens, "H": q.shape[1], "G": k.shape[1], "N": tokens, "half": half},
        **{"scaling": attention_scaling, "HEADS": HEADS},
        **blocks,
    )
    for x, turned in ((q, turned_q), (k, turned_k)):
        if turned is not x:
            x.copy_(turned)  # its rows are not dense, or it is interpreted bfloat16
