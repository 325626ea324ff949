"""Attention of rows that go by again in Triton: one launch for all groups, one for the peaks of what they looked at."""

import torch
import triton
import triton.language as tl

from mminfer_kernels.column_mass.triton_kernel import add_columns
from mminfer_kernels.launching import configured, dense_rows, interpretable, launch, strides
from mminfer_kernels.prompt_attention.reference import rows_first
from mminfer_kernels.prompt_attention.triton_kernel import attend_to, fits
from mminfer_kernels.tiles.triton_kernel import LOG2_E, Ranges, attention_arguments, load_rows


@configured(
    [
        ({"BLOCK_S": 128, "BLOCK_N": 64}, 8, 3),
        ({"BLOCK_S": 64, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK_S": 64, "BLOCK_N": 32}, 8, 2),
        ({"BLOCK_S": 64, "BLOCK_N": 32}, 4, 2),
        ({"BLOCK_S": 16, "BLOCK_N": 16}, 4, 2),
    ],
    lengths=("N",),
    interpreted_blocks={"BLOCK_S": 32, "BLOCK_N": 32},
    fits=fits,
)
@triton.jit(do_not_specialize=["S", "N", "longest", "stride_lb", "stride_lh"])
def replay_attention_fwd_kernel(
    q, own_k, own_v, k, v, groups, out, lse, scale,
    stride_qb, stride_qh, stride_qs, stride_xb, stride_xg, stride_xs, stride_yb, stride_yg, stride_ys,
    stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    stride_ob, stride_oh, stride_os, stride_lb, stride_lh,
    H, repeat, S, N, longest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention over a group's entries, the first of all and its own rows. Grid: blocks of rows of each group; heads.

    `own_k` and `own_v` have strides x and y.
    """
    blocks = tl.cdiv(longest, BLOCK_S)
    p_group = groups + tl.program_id(0) // blocks * 4
    start, stop, begin, end = tl.load(p_group), tl.load(p_group + 1), tl.load(p_group + 2), tl.load(p_group + 3)
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row, group = start + tl.program_id(0) % blocks * BLOCK_S, head // repeat
    stop, end = tl.minimum(stop, S), tl.minimum(end, N)
    begin = tl.minimum(tl.maximum(begin, 0), end)
    if (row >= stop) | (start < 0):
        return
    rows, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    b_q = load_rows(q + batch * stride_qb + head * stride_qh, row, rows, stride_qs, stop, D, BLOCK_D, True)
    p_k, p_v = k + batch * stride_kb + group * stride_kg, v + batch * stride_vb + group * stride_vg
    # The first entry of all, where it is not among the group's, is what rows begin with.
    first = begin > 0
    b_k = tl.load(p_k + dims, mask=(dims < D) & first, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + dims, mask=(dims < D) & first, other=0.0).to(tl.float32)
    b_max = tl.where(first, tl.sum(b_q.to(tl.float32) * b_k[None, :], 1) * scale, -1e30)
    b_sum = tl.where(first, tl.full([BLOCK_S], 1.0, tl.float32), 0.0)
    b_out = tl.zeros([BLOCK_S, BLOCK_D], tl.float32) + b_v[None, :]
    b_out, b_max, b_sum = attend_to(
        b_out, b_max, b_sum, b_q, p_k, p_v, None, rows * 0, rows * 0 + end, begin, end, stride_kn, stride_vn, end,
        scale, D, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip
    p_k = own_k + batch * stride_xb + group * stride_xg
    p_v = own_v + batch * stride_yb + group * stride_yg
    last = tl.minimum(row + BLOCK_S, stop)
    b_out, b_max, b_sum = attend_to(
        b_out, b_max, b_sum, b_q, p_k, p_v, None, rows * 0 + start, row + rows + 1, start, last, stride_xs, stride_ys,
        stop, scale, D, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip
    m_rows = row + rows < stop
    p_out = out + batch * stride_ob + head * stride_oh + tl.cast(row, tl.int64) * stride_os
    b_out = (b_out / b_sum[:, None]).to(out.dtype.element_ty)
    tl.store(p_out + rows[:, None] * stride_os + dims[None, :], b_out, mask=m_rows[:, None] & (dims[None, :] < D))
    p_lse = lse + batch * stride_lb + head * stride_lh + row + rows
    tl.store(p_lse, b_max + tl.log2(b_sum), mask=m_rows)


@torch.no_grad()
def replay_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    groups: torch.Tensor,
    seen: torch.Tensor,
    longest: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.replay_attention`."""
    if q.numel() == 0:
        peak = torch.zeros(keys.shape[:3], dtype=torch.float32, device=q.device)
        return rows_first(torch.empty_like(q)), peak
    given, groups = q.dtype, groups.contiguous()
    q, k, v, keys, values = (dense_rows(x) for x in interpretable(q, k, v, keys, values))
    out, lse = rows_first(torch.empty_like(q)), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch(
        replay_attention_fwd_kernel,
        lambda meta: (len(groups) * triton.cdiv(longest, meta["BLOCK_S"]), q.shape[0] * q.shape[1]),
        {"q": q, "own_k": k, "own_v": v, "k": keys, "v": values, "groups": groups, "out": out, "lse": lse},
        **attention_arguments(q, keys),
        **strides(k, "xbgs"),
        **strides(v, "ybgs"),
        **strides(values, "vbgn"),
        **strides(out, "obhs"),
        **strides(lse, "lbh"),
        scale=scale * LOG2_E,
        longest=longest,
    )
    peak = torch.empty(*q.shape[:2], keys.shape[2], dtype=torch.float32, device=q.device)
    ranges = Ranges(row_lo=seen[0], row_hi=seen[1])
    if keys.shape[2]:
        add_columns(peak[None], q, keys, lse, None, scale, False, ranges, accumulate=False, peak=True)
    return out.to(given), peak.unflatten(1, (k.shape[1], -1)).amax(2)
