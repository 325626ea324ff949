"""Column mass, column peaks and power iteration in Triton: from the rows' log-sum-exp, passes over columns."""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from mminfer_kernels.launching import configured, dense_rows, interpretable, launch, strides, tile_fits
from mminfer_kernels.row_lse.triton_kernel import row_lse
from mminfer_kernels.tiles.triton_kernel import (
    LOG2_E,
    Ranges,
    attention_arguments,
    load_rows,
    ranges_of,
    row_range,
)

SETTLED_ROWS = 4096  # rows whose iterations are passes of their own; fewer save work, more save launches
MOST_VOTES = 16  # votes that one pass casts at a time: the narrowest operand of `tl.dot`


def _columns_fit(arguments: dict[str, Any]) -> bool:
    """Keys stay, queries stream."""
    sizes = arguments["BLOCK_N"], arguments["BLOCK_S"]
    return tile_fits(arguments, arguments["q"], *sizes, arguments["BLOCK_D"])


@configured(
    [
        ({"BLOCK_S": 64, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK_S": 64, "BLOCK_N": 128}, 8, 3),
        ({"BLOCK_S": 128, "BLOCK_N": 128}, 8, 2),
        ({"BLOCK_S": 32, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK_S": 32, "BLOCK_N": 32}, 4, 2),
        ({"BLOCK_S": 16, "BLOCK_N": 16}, 8, 2),
    ],
    lengths=("N",),
    interpreted_blocks={"BLOCK_S": 32, "BLOCK_N": 32},
    fits=_columns_fit,
)
@triton.jit(
    do_not_specialize=[
        "S",
        "N",
        "votes",
        "stride_lb",
        "stride_lh",
        "stride_wt",
        "stride_wb",
        "stride_wh",
        "stride_mb",
        "stride_mg",
        "stride_ot",
        "stride_ob",
        "stride_oh",
    ],
    do_not_specialize_on_alignment=["weights", "out"],  # whose parts begin anywhere, by how many rows there are
)
def column_mass_fwd_kernel(
    q, k, lse, weights, log_mass, row_lo, row_hi, out, scale, factor,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kg, stride_kn, stride_lb, stride_lh,
    stride_wt, stride_wb, stride_wh, stride_mb, stride_mg, stride_ot, stride_ob, stride_oh,
    H, repeat, S, N, votes,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, VOTES: tl.constexpr, ACCUMULATE: tl.constexpr,
    PEAK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each key's probability summed over the rows that see it, times their votes; PEAK: the largest of them.

    Grid: key blocks; batch and heads.
    """
    first = tl.program_id(0) * BLOCK_N
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    keys, rows = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    p_k = k + batch * stride_kb + head // repeat * stride_kg
    b_k = load_rows(p_k, first, keys, stride_kn, N, D, BLOCK_D, True)
    p_q = q + batch * stride_qb + head * stride_qh
    p_lse = lse + batch * stride_lb + head * stride_lh
    begin, _ = row_range(row_lo, row_hi, first, S, N, CAUSAL)
    _, end = row_range(row_lo, row_hi, first + BLOCK_N - 1, S, N, CAUSAL)
    b_lo, b_hi = row_range(row_lo, row_hi, first + keys, S, N, CAUSAL)
    vote = tl.arange(0, VOTES).to(tl.int64)  # the second dimension of weights and mass
    # one vote a row: summed over rows only once, at the end
    b_mass = tl.full([BLOCK_N, BLOCK_S if VOTES == 1 else VOTES], float("-inf") if PEAK else 0.0, tl.float32)
    for start in tl.range(begin // BLOCK_S * BLOCK_S, end, BLOCK_S):
        b_q = load_rows(p_q, start, rows, stride_qs, S, D, BLOCK_D, True)
        m_s = start + rows < S
        b_lse = tl.load(p_lse + start + rows, mask=m_s, other=float("inf")) - factor  # nothing past the last row
        b_p = tl.dot(b_k, b_q.trans(), input_precision="ieee") * scale - b_lse[None, :]  # [BLOCK_N, BLOCK_S]
        m_p = (start + rows[None, :] >= b_lo[:, None]) & (start + rows[None, :] < b_hi[:, None])
        b_p = tl.where(m_p, b_p, float("-inf"))
        if PEAK:
            b_mass = tl.maximum(b_mass, b_p)
        elif weights is None:
            b_mass += tl.exp2(b_p)
        else:
            b_p = tl.exp2(b_p)
            p_w = weights + batch * stride_wb + head * stride_wh + start + rows
            if VOTES == 1:
                b_mass += b_p * tl.load(p_w, mask=m_s, other=0.0)[None, :]
            else:
                m_w = m_s[:, None] & (vote[None, :] < votes)
                b_w = tl.load(p_w[:, None] + vote[None, :] * stride_wt, mask=m_w, other=0.0)
                b_mass = tl.dot(b_p, b_w, b_mass, input_precision="ieee")
    if PEAK:  # what concerns a key is done once, not for every pair
        b_mass = tl.max(b_mass, 1, keep_dims=True)
        if log_mass is not None:
            p_m = log_mass + batch * stride_mb + head // repeat * stride_mg + first + keys[:, None]
            b_mass += tl.load(p_m, mask=first + keys[:, None] < N, other=0.0)
        b_mass = tl.exp2(b_mass)
    elif VOTES == 1:
        b_mass = tl.sum(b_mass, 1, keep_dims=True)
    p_out = out + batch * stride_ob + head * stride_oh + first + keys[:, None] + vote[None, :] * stride_ot
    m_out = (first + keys[:, None] < N) & (vote[None, :] < votes)
    if ACCUMULATE:
        b_mass += tl.load(p_out, mask=m_out, other=0.0)
    tl.store(p_out, b_mass, mask=m_out)


def _packed_ranges(keys: int, causal: bool, cu_seqlens: torch.Tensor) -> Ranges:
    bounds = cu_seqlens.long()
    first, last = (torch.repeat_interleave(x, bounds.diff(), output_size=keys) for x in (bounds[:-1], bounds[1:]))
    return ranges_of(keys, first, torch.arange(1, keys + 1, device=bounds.device) if causal else last)


def add_columns(
    mass: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    weights: torch.Tensor | None,
    scale: float,
    causal: bool,
    ranges: Ranges,
    accumulate: bool,
    peak: bool = False,
    log_mass: torch.Tensor | None = None,
    factor: float = 0.0,
) -> None:
    """Write into `mass`, or add to it, each key's probability times the votes of the rows that see it.

    Args:
        mass: [T, B, H, N] float32, T votes a query.
        q: [B, H, S, D]. k: [B, G, N, D].
        lse: [B, H, S], of `row_lse`.
        weights: [T, B, H, S] float32, or None: 1.
        scale: factor of the logits.
        causal, ranges: which keys each row sees.
        accumulate: add to what `mass` holds.
        peak: write the largest probability in place of the sum; without weights, and T = 1.
        log_mass: [B, G, N] of `in_base_2`, for peaks; it is in `lse` already.
        factor: of all probabilities, its logarithm in base 2.
    """
    votes = mass.shape[0]
    launch(
        column_mass_fwd_kernel,
        lambda meta: (triton.cdiv(k.shape[2], meta["BLOCK_N"]), q.shape[0] * q.shape[1]),
        {
            "q": q,
            "k": k,
            "lse": lse,
            "weights": weights,
            "log_mass": log_mass,
            "row_lo": ranges.row_lo,
            "row_hi": ranges.row_hi,
            "out": mass,
        },
        **attention_arguments(q, k),
        **strides(lse, "lbh"),
        **strides(weights, "wtbh"),
        **strides(log_mass, "mbg"),
        **strides(mass, "otbh"),
        scale=scale * LOG2_E,
        factor=factor,
        votes=votes,
        CAUSAL=causal,
        VOTES=1 if votes == 1 else MOST_VOTES,
        ACCUMULATE=accumulate,
        PEAK=peak,
    )


def mass_of(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    weights: torch.Tensor | None,
    scale: float,
    causal: bool,
    ranges: Ranges,
) -> torch.Tensor:
    """[B, H, N] float32: column mass under the weights [B, H, S] or [B, S], from the rows' log-sum-exp."""
    mass = torch.empty(*q.shape[:2], k.shape[2], dtype=torch.float32, device=q.device)
    if weights is not None:
        per_head = weights[:, None] if weights.dim() == 2 else weights
        weights = dense_rows(per_head.float()).expand(q.shape[:3])[None]
    add_columns(mass[None], q, k, lse, weights, scale, causal, ranges, accumulate=False)
    return mass


def peak_of(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    ranges: Ranges,
    counted: int,
    log_mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, G, counted] float32: the largest probability in a group of each of the first keys of a causal attention."""
    queries, keys = q.shape[2], k.shape[2]
    if ranges.row_lo is not None:
        ranges = Ranges(row_lo=ranges.row_lo[:counted])
    elif counted > keys - queries:  # else every row sees all of them
        places = torch.arange(queries - keys, queries - keys + counted, device=q.device)
        ranges = Ranges(row_lo=places.clamp_min(0).int())
    peak = torch.empty(*q.shape[:2], counted, dtype=torch.float32, device=q.device)
    if counted:
        entries, out = k[:, :, :counted], peak[None]
        add_columns(out, q, entries, lse, None, scale, False, ranges, accumulate=False, peak=True, log_mass=log_mass)
    return peak.unflatten(1, (k.shape[1], -1)).amax(2)


@torch.no_grad()
def column_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor | None,
    scale: float,
    causal: bool,
    query_index: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `mminfer_kernels.column_mass`; `scale` has the temperature in it."""
    keys = k.shape[2]
    if q.numel() == 0 or keys == 0:
        return torch.zeros(*q.shape[:2], keys, dtype=torch.float32, device=q.device)
    q, k = (dense_rows(x) for x in interpretable(q, k))
    if cu_seqlens is None:
        ranges = ranges_of(keys, None, query_index + 1 if causal and query_index is not None else None)
    else:
        ranges = _packed_ranges(keys, causal, cu_seqlens)
    return mass_of(q, k, row_lse(q, k, scale, causal, ranges), weights, scale, causal, ranges)


@torch.no_grad()
def power_iterate(
    q: torch.Tensor, k: torch.Tensor, iterations: int, scale: float, query_index: torch.Tensor | None
) -> torch.Tensor:
    """See `mminfer_kernels.power_iterate`; `scale` has the temperature in it.

    The rows' log-sum-exp once; then R = `SETTLED_ROWS` rows at a time, from the last to the first. Later rows have cast
    their votes on these already, so that one pass an iteration over their own square alone settles `x_1 .. x_T` there;
    one more pass then casts all of their votes on the earlier keys. In units of a pass over all pairs that is
    `1 + (1 - R / N) + T R / N` in place of `T + 1`: 2.5 instead of 6 at 32k tokens. A single walk over the rows would
    need 2, but one block after the other.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    shape, first = (batch, heads, keys), 1 / max(keys, 1)
    if q.numel() == 0 or iterations == 0:
        return torch.full(shape, 0.0 if iterations else first, dtype=torch.float32, device=q.device)
    q, k = (dense_rows(x) for x in interpretable(q, k))
    lse = row_lse(q, k, scale, True, ranges_of(keys, None, None if query_index is None else query_index + 1))
    if queries <= SETTLED_ROWS:
        return _all_at_once(q, k, lse, iterations, scale, query_index)
    x = torch.zeros(iterations + 1, *shape, dtype=torch.float32, device=q.device)
    x[0] = first
    starts = range(0, queries, SETTLED_ROWS)
    places = [start + keys - queries for start in starts]
    if query_index is not None and len(starts) > 1:
        places = query_index[::SETTLED_ROWS].tolist()
    for start, place in reversed(list(zip(starts, [0, *places[1:]], strict=True))):
        rows = slice(start, min(start + SETTLED_ROWS, queries))
        end = keys if rows.stop == queries else places[start // SETTLED_ROWS + 1]
        index = None if query_index is None else query_index[rows]
        _settle(x, q[:, :, rows], k, lse[:, :, rows], scale, index, place, end)
    return x[-1].clone()  # the other iterations need not stay in memory


def _all_at_once(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    iterations: int,
    scale: float,
    query_index: torch.Tensor | None,
) -> torch.Tensor:
    """[B, H, N]: every iteration as one pass over all rows."""
    queries, keys = q.shape[2], k.shape[2]
    ranges = ranges_of(keys, None, None if query_index is None else query_index + 1)
    votes: torch.Tensor | None = None  # each the same at first
    for last in range(iterations - 1, -1, -1):
        mass = torch.empty(1, *lse.shape[:2], keys, dtype=torch.float32, device=q.device)
        factor, own = (-math.log2(keys), None) if votes is None else (0.0, votes[None])
        add_columns(mass, q, k, lse, own, scale, True, ranges, accumulate=False, factor=factor)
        if last:
            votes = mass[0, ..., keys - queries :] if query_index is None else mass[0].index_select(-1, query_index)
    return mass[0]


def _settle(
    x: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    query_index: torch.Tensor | None,
    place: int,
    end: int,
) -> None:
    """Votes of some rows, whose keys are `place .. end - 1`, on those and on all earlier keys.

    Args:
        x: [T + 1, B, H, N], with later rows' votes on the keys before `end` in it.
        q: [B, H, rows, D]. k: [B, G, N, D]. lse: [B, H, rows].
        query_index: [rows], their places; None: the last places before `end`.
    """
    rows = q.shape[2]
    hi = None if query_index is None else query_index - place + 1
    own, ranges = slice(place, end), ranges_of(end - place, None, hi)

    def votes(iteration: int | slice) -> torch.Tensor:
        if query_index is None:
            return x[iteration, ..., end - rows : end]
        return x[iteration].index_select(-1, query_index)

    for t in range(1, x.shape[0]):
        add_columns(
            x[t : t + 1, ..., own], q, k[:, :, own], lse, votes(slice(t - 1, t)), scale, True, ranges, accumulate=True
        )
    if place == 0:
        return
    for t in range(1, x.shape[0], MOST_VOTES):
        upto = min(t + MOST_VOTES, x.shape[0])
        cast, earlier = votes(slice(t - 1, upto - 1)), slice(0, place)
        add_columns(x[t:upto, ..., earlier], q, k[:, :, earlier], lse, cast, scale, False, Ranges(), accumulate=True)
