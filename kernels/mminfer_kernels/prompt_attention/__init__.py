"""Causal attention of a prompt, and beside it how much attention each key receives, in all or at most."""

import torch

from mminfer_kernels.backends import cpu_takes, on_cuda, triton_takes
from mminfer_kernels.checks import check_attention, check_log_mass, check_scores, check_weights, check_whole, factor_of
from mminfer_kernels.column_mass import pairs_of
from mminfer_kernels.dispatch import backend_for, register, resolve
from mminfer_kernels.prompt_attention import reference
from mminfer_kernels.tracing import traceable

__all__ = ["prompt_attention", "prompt_attention_mass", "prompt_attention_peak", "shares_logits"]

_ROOM = "mminfer_kernels.prompt_attention"
for _op in ("prompt_attention", "prompt_attention_mass", "prompt_attention_peak"):
    register(_op, "reference", getattr(reference, _op))
    register(_op, "triton", f"{_ROOM}.triton_kernel:{_op}", triton_takes, on_cuda)
    register(_op, "native", f"{_ROOM}.native:{_op}", cpu_takes)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return reference.rows_first(torch.empty_like(q))


def _fake_mass(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object, **kwargs: object
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return reference.rows_first(torch.empty_like(q)), q.new_empty(*q.shape[:2], k.shape[2], dtype=dtype)


def _fake_peak(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    query_index: torch.Tensor | None = None,
    counted: int | None = None,
    *args: object,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (*k.shape[:2], k.shape[2] if counted is None else counted)
    return reference.rows_first(torch.empty_like(q)), q.new_empty(shape, dtype=dtype)


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    query_index: torch.Tensor | None = None,
    window: int | None = None,
    *args: object,
    **kwargs: object,
) -> int:
    return 4 * q.shape[0] * q.shape[1] * q.shape[3] * pairs_of(q, k, query_index, window)


def _flops_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor | None = None,
    scale: float | None = None,
    query_index: torch.Tensor | None = None,
    *args: object,
    **kwargs: object,
) -> int:
    pairs = q.shape[0] * q.shape[1] * pairs_of(q, k, query_index, None)
    products = 2 if shares_logits(q, k, v) else 3
    return (2 * products * q.shape[3] + 2) * pairs


def _flops_peak(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    query_index: torch.Tensor | None = None,
    counted: int | None = None,
    *args: object,
    **kwargs: object,
) -> int:
    again = 0 if shares_logits(q, k, v) else pairs_of(q, k, query_index, counted)
    return 2 * q.shape[0] * q.shape[1] * q.shape[3] * (2 * pairs_of(q, k, query_index, None) + again)


def shares_logits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `prompt_attention_mass`, and `prompt_attention_peak`, of these tensors compute the logits once."""
    return backend_for("prompt_attention_mass", q, k, v) == "native"


@traceable(_fake, _flops)
def prompt_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    query_index: torch.Tensor | None = None,
    window: int | None = None,
    log_mass: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`softmax(q k^T * scale + log_mass + causal) v`, never the score matrix.

    Args:
        q: queries [B, H, S, D].
        k: keys [B, G, N, D]; query head h reads key head h // (H / G).
        v: values [B, G, N, D].
        scale: factor of the logits, `D ** -0.5` by default.
        query_index: [S] int64, strictly ascending: the place of each query among the keys, which sees keys up to
            there. None puts the S queries at the last S places.
        window: a query sees its last `window` keys only, its own place included; None: all.
        log_mass: [B, G, N] float32, the logarithm of how many keys each one stands for; None: 0.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [B, H, S, D] in q's dtype, in memory [B, S, H, D] as the host's projection reads it.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        BackendError: an explicit backend that is not there.
    """
    check_attention(q, k, v, query_index, aligned=True)
    scale = factor_of(q, scale)
    if window is not None:
        check_whole("window", window, least=1)
    check_log_mass(log_mass, k)
    _, run = resolve("prompt_attention", backend, q, k, v)
    return run(q, k, v, scale, query_index, window, log_mass)


@traceable(_fake_mass, _flops_mass)
def prompt_attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor | None = None,
    scale: float | None = None,
    query_index: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`prompt_attention` and `column_mass` of the same probabilities in one pass.

    The softmax and the product of queries and keys are shared, so the scores cost little more than the attention.

    Args:
        q: queries [B, H, S, D].
        k: keys [B, G, N, D]; query head h reads key head h // (H / G).
        v: values [B, G, N, D].
        weights: vote of each query, [B, H, S] or [B, S]; None gives every query one vote.
        scale: factor of the logits, `D ** -0.5` by default.
        query_index: [S] int64, strictly ascending: the place of each query among the keys. None: the last S places.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        attention [B, H, S, D] in q's dtype, in memory [B, S, H, D]; mass [B, H, N] float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        BackendError: an explicit backend that is not there.

    Reference:
        LOOK-M (arXiv 2406.18139): the scores of cache entries. The authors sum over a materialised N x N matrix.
    """
    check_attention(q, k, v, query_index, aligned=True)
    check_scores(q)
    scale = factor_of(q, scale)
    check_weights(weights, q)
    _, run = resolve("prompt_attention_mass", backend, q, k, v)
    return run(q, k, v, weights, scale, query_index)


@traceable(_fake_peak, _flops_peak)
def prompt_attention_peak(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    query_index: torch.Tensor | None = None,
    counted: int | None = None,
    log_mass: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`prompt_attention`, and the largest probability that each of the first keys is given by any query of its group.

    Where the logits are not shared with the attention, they are computed again from its rows' log-sum-exp, for the
    counted keys alone; memory is O(N + S) a head either way.

    Args:
        q: queries [B, H, S, D].
        k: keys [B, G, N, D]; query head h reads key head h // (H / G).
        v: values [B, G, N, D].
        scale: factor of the logits, `D ** -0.5` by default.
        query_index: [S] int64, strictly ascending: the place of each query among the keys. None: the last S places.
        counted: how many keys, from the first on, are told of; None: all N.
        log_mass: [B, G, N] float32, the logarithm of how many keys each one stands for, all of which its probability
            counts; None: 0.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        attention [B, H, S, D] in q's dtype, in memory [B, S, H, D]; peak [B, G, counted] float32 (float64 for float64
        input), 0 for a key that no query sees.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        BackendError: an explicit backend that is not there.

    Reference:
        KVzip (arXiv 2505.23416): what an entry is worth to its context, read once more behind the cache. The authors
        materialise the probabilities of a chunk of queries.
    """
    check_attention(q, k, v, query_index, aligned=True)
    check_scores(q)
    scale = factor_of(q, scale)
    if counted is None:
        counted = k.shape[2]
    check_whole("counted", counted, least=0, most=k.shape[2])
    check_log_mass(log_mass, k)
    _, run = resolve("prompt_attention_peak", backend, q, k, v)
    return run(q, k, v, scale, query_index, counted, log_mass)
