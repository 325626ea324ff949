"""How much attention each key receives, summed or iterated, without the attention matrix in memory."""

import torch

from mminfer_kernels.backends import cpu_takes, on_cuda, triton_takes
from mminfer_kernels.checks import (
    INTEGERS,
    MOST_ITERATIONS,
    check_attention,
    check_flag,
    check_scores,
    check_tensors,
    check_weights,
    check_whole,
    described,
    factor_of,
)
from mminfer_kernels.column_mass import reference
from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.tracing import traceable

__all__ = ["column_mass", "power_iterate"]

_ROOM = "mminfer_kernels.column_mass"
for _op in ("column_mass", "power_iterate"):
    register(_op, "reference", getattr(reference, _op))
    register(_op, "triton", f"{_ROOM}.triton_kernel:{_op}", triton_takes, on_cuda)
    register(_op, "native", f"{_ROOM}.native:{_op}", cpu_takes)


def _fake(q: torch.Tensor, k: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:2], k.shape[2], dtype=dtype)


def _mass_flops(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    causal: bool = True,
    query_index: torch.Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *args: object,
    **kwargs: object,
) -> int:
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        pairs = int((lengths * (lengths + 1) // 2 if causal else lengths.square()).sum())
    else:
        pairs = pairs_of(q, k, query_index, None) if causal else q.shape[2] * k.shape[2]
    return 2 * q.shape[0] * q.shape[1] * (q.shape[3] + 1) * pairs


def _power_flops(
    q: torch.Tensor,
    k: torch.Tensor,
    iterations: int = 5,
    temperature: float = 0.1,
    query_index: torch.Tensor | None = None,
    *args: object,
    **kwargs: object,
) -> int:
    return 2 * q.shape[0] * q.shape[1] * (q.shape[3] + iterations) * pairs_of(q, k, query_index, None)


@traceable(_fake, _mass_flops)
def column_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    causal: bool = True,
    query_index: torch.Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Column sums of the attention matrix: `weights @ softmax(q k^T * scale / temperature + causal)`.

    Works by blocks of queries, each seeing only the keys up to its last visible one; memory is O(N).

    Args:
        q: queries [B, H, S, D].
        k: keys [B, G, N, D]; query head h reads key head h // (H / G).
        weights: vote of each query, [B, H, S] or [B, S]; None gives every query one vote.
        temperature: divides the logits.
        causal: whether query s sees only keys n <= query_index[s].
        query_index: [S] int64, strictly ascending: the place of each query row among the N keys. None puts
            the S queries at the last S places.
        scale: factor of the logits, `D ** -0.5` by default.
        cu_seqlens: [number of sequences + 1] integers from 0 to N, ascending: several sequences packed one behind
            another, S = N, each seeing only itself. None: one sequence. Not with `query_index`.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [B, H, N] float32 (float64 for float64 input); the softmax is float32 whatever the input's dtype.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        BackendError: an explicit backend that is not there.

    Reference:
        LOOK-M (arXiv 2406.18139): the score of a cache entry; with a query vector of weights, one
        step of AIM's importance (arXiv 2412.03248). The authors sum over a materialised N x N matrix.
    """
    check_flag("causal", causal)
    query_index = query_index if causal or cu_seqlens is not None else None
    check_attention(q, k, k, query_index, aligned=causal)
    check_scores(q)
    scale = factor_of(q, scale, temperature)
    check_weights(weights, q)
    if cu_seqlens is not None:
        _check_packed(q, k, query_index, cu_seqlens)
    _, run = resolve("column_mass", backend, q, k)
    return run(q, k, weights, scale, causal, query_index, cu_seqlens)


@traceable(_fake, _power_flops)
def power_iterate(
    q: torch.Tensor,
    k: torch.Tensor,
    iterations: int = 5,
    temperature: float = 0.1,
    query_index: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`iterations` times `x <- x @ M` from `x = 1/N`, `M` the causal attention matrix of each head.

    All iterations take one pass. `M` is lower triangular, so `x_{t+1}[j]` sums `x_t[i] M[i, j]` over rows
    `i >= j`. Walk the query blocks from the last to the first, with an accumulator for each of `x_1 .. x_T`
    over all columns. When block I is reached, every later row has already added its share, so only the
    block's own rows are missing: with `P = M[I, :]`, computed once, and the square `P[:, I]`,

        x_0[I] = 1/N,    x_t[I] = acc_t[I] + x_{t-1}[I] @ P[:, I]         (t = 1 .. T-1, in turn)
        acc_{t+1} += x_t[I] @ P                                          (t = 0 .. T-1, as one product)

    Afterwards `acc_T` is `x_T`. The softmax, the costly part, is computed once, not once an iteration.

    Args:
        q: queries [B, H, S, D].
        k: keys [B, G, N, D]; query head h reads key head h // (H / G).
        iterations: T, from 0 to 1,024.
        temperature: divides the logits.
        query_index: [S] int64, strictly ascending: the place of each query row among the N keys. None puts
            the S queries at the last S places. Keys without a query cast no vote: their rows of M are zero.
        scale: factor of the logits, `D ** -0.5` by default.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [B, H, N] float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        BackendError: an explicit backend that is not there.

    Reference:
        AIM (arXiv 2412.03248), token pruning. The authors multiply by a materialised N x N matrix five times.
    """
    check_attention(q, k, k, query_index, aligned=True)
    check_scores(q)
    scale = factor_of(q, scale, temperature)
    check_whole("iterations", iterations, least=0, most=MOST_ITERATIONS)
    _, run = resolve("power_iterate", backend, q, k)
    return run(q, k, iterations, scale, query_index)


def pairs_of(q: torch.Tensor, k: torch.Tensor, query_index: torch.Tensor | None, most: int | None) -> int:
    """Query-key pairs of one head that a causal attention looks at, at most so many of a query."""
    queries, keys = q.shape[2], k.shape[2]
    if query_index is None and (most is None or most >= keys):
        return queries * (2 * keys - queries + 1) // 2
    seen = (torch.arange(keys - queries, keys) if query_index is None else query_index) + 1
    return int((seen if most is None else seen.clamp_max(most)).sum())


def _check_packed(q: torch.Tensor, k: torch.Tensor, query_index: torch.Tensor | None, cu_seqlens: torch.Tensor) -> None:
    check_tensors({"q": q}, {"cu_seqlens": cu_seqlens})
    if query_index is not None or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"cu_seqlens goes with one query a key and no query_index; found {q.shape[2]} queries for {k.shape[2]} keys"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in INTEGERS:
        raise ValueError(f"cu_seqlens is {described(cu_seqlens)}, wanted ascending integers from 0 to {k.shape[2]}")
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != k.shape[2] or ends != sorted(ends):
        raise ValueError(f"cu_seqlens is {described(ends)}, wanted ascending integers from 0 to {k.shape[2]}")
