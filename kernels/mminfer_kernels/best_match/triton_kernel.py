"""Best match in Triton: a product by tiles, of which only each row's best stays."""

from typing import Any

import torch
import triton
import triton.language as tl

from mminfer_kernels.launching import configured, dense_rows, interpretable, launch, strides, tile_fits


def _fits(arguments: dict[str, Any]) -> bool:
    """Both operands stream, a piece of their rows at a time."""
    source, target, depth = (arguments[x] for x in ("BLOCK_S", "BLOCK_T", "BLOCK_C"))
    if arguments["src"].dtype == torch.float32:
        return max(source, target) <= 64 and depth <= 32
    return depth > 16 and tile_fits(arguments, arguments["src"], 32, source + target, depth)


@configured(
    [
        ({"BLOCK_S": 128, "BLOCK_T": 128, "BLOCK_C": 64}, 8, 3),
        ({"BLOCK_S": 64, "BLOCK_T": 128, "BLOCK_C": 64}, 8, 3),
        ({"BLOCK_S": 64, "BLOCK_T": 64, "BLOCK_C": 64}, 4, 3),
        ({"BLOCK_S": 32, "BLOCK_T": 64, "BLOCK_C": 64}, 4, 3),
        ({"BLOCK_S": 64, "BLOCK_T": 64, "BLOCK_C": 16}, 8, 2),
        ({"BLOCK_S": 32, "BLOCK_T": 32, "BLOCK_C": 16}, 4, 2),
    ],
    lengths=("S", "T"),
    interpreted_blocks={"BLOCK_S": 32, "BLOCK_T": 32, "BLOCK_C": 64},
    fits=_fits,
)
@triton.jit(do_not_specialize=["S", "T"])
def best_match_fwd_kernel(
    src, dst, src_length, dst_length, similarity, index, tiny,
    stride_sb, stride_ss, stride_tb, stride_tt, S, T, C,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The first most similar target of each source. Grid: blocks of sources; batch."""
    batch = tl.program_id(1).to(tl.int64)
    sources = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    targets, pieces = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    m_s = sources < S
    p_src = src + batch * stride_sb + sources[:, None].to(tl.int64) * stride_ss
    b_best = tl.full([BLOCK_S], float("-inf"), tl.float32)
    b_index = tl.zeros([BLOCK_S], tl.int32)
    for start in tl.range(0, T, BLOCK_T):
        m_t = start + targets < T
        p_dst = dst + batch * stride_tb + tl.cast(start, tl.int64) * stride_tt + targets[:, None] * stride_tt
        b_dots = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
        for piece in tl.range(0, C, BLOCK_C):
            m_c = piece + pieces[None, :] < C
            b_src = tl.load(p_src + piece + pieces[None, :], mask=m_s[:, None] & m_c, other=0.0)
            b_dst = tl.load(p_dst + piece + pieces[None, :], mask=m_t[:, None] & m_c, other=0.0)
            b_dots = tl.dot(b_src, b_dst.trans(), b_dots, input_precision="ieee")
        b_length = tl.maximum(tl.load(dst_length + batch * T + start + targets, mask=m_t, other=1.0), tiny)
        b_cosines = tl.where(m_t[None, :], b_dots / b_length[None, :], float("-inf"))  # times the source's length
        b_found, b_place = tl.max(b_cosines, 1, return_indices=True)  # of equals the first
        b_index = tl.where(b_found > b_best, start + b_place, b_index)
        b_best = tl.maximum(b_found, b_best)
    p_out = batch * S + sources
    b_length = tl.maximum(tl.load(src_length + p_out, mask=m_s, other=1.0), tiny)
    tl.store(similarity + p_out, b_best / b_length, mask=m_s)
    tl.store(index + p_out, b_index.to(tl.int64), mask=m_s)


@torch.no_grad()
def best_match(src: torch.Tensor, dst: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mminfer_kernels.best_match`."""
    leading, rows, size = src.shape[:-2], src.shape[-2], src.shape[-1]
    similarity = torch.empty(*leading, rows, dtype=torch.float32, device=src.device)
    index = torch.empty(*leading, rows, dtype=torch.int64, device=src.device)
    if src.numel() == 0:
        return similarity.zero_(), index.zero_()
    src, dst = (dense_rows(x.reshape(-1, *x.shape[-2:])) for x in interpretable(src, dst))
    launch(
        best_match_fwd_kernel,
        lambda meta: (triton.cdiv(rows, meta["BLOCK_S"]), src.shape[0]),
        {
            "src": src,
            "dst": dst,
            "src_length": _lengths(src),
            "dst_length": _lengths(dst),
            "similarity": similarity,
            "index": index,
        },
        **strides(src, "sbs"),
        **strides(dst, "tbt"),
        **{"S": rows, "T": dst.shape[1], "C": size},
        tiny=torch.finfo(torch.float32).tiny,  # the length of a zero row, so that its similarities are 0
    )
    return similarity, index


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    """[B, N] float32."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
