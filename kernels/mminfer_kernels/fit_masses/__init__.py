"""By how much the entries that stay must weigh, so that their shares of attention add up to 1 for each query."""

import torch

from mminfer_kernels.backends import on_cuda, triton_takes
from mminfer_kernels.checks import INTEGERS, MOST_ITERATIONS, check_floats, check_number, check_tensors, check_whole
from mminfer_kernels.checks import described as shown
from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.fit_masses import reference
from mminfer_kernels.tracing import traceable

__all__ = ["fit_masses"]

_OP = "fit_masses"
register(_OP, "reference", reference.fit_masses)
register(_OP, "triton", f"mminfer_kernels.{_OP}.triton_kernel:{_OP}", triton_takes, on_cuda)


def _fake(shares: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return shares.new_empty(shares.shape[:2], dtype=torch.promote_types(shares.dtype, torch.float32))


def _flops(
    shares: torch.Tensor, counts: torch.Tensor, ridge: float, iterations: int, *args: object, **kwargs: object
) -> int:
    return 4 * shares.numel() * (iterations + 1)


@traceable(_fake, _flops)
def fit_masses(
    shares: torch.Tensor,
    counts: torch.Tensor,
    ridge: float,
    iterations: int,
    most: float,
    backend: str = "auto",
) -> torch.Tensor:
    """Factors by which shares of attention add up to 1 for each query, about, of many heads at once.

    Least squares with a ridge that holds factors to 1, by projected gradients with momentum; each factor has a step of
    its own, the largest that cannot overshoot where nothing is negative.

    Args:
        shares: [P, k, R], none negative, what each query gives to each entry that stays; 0 beyond the counts.
        counts: [P] integers, how many entries stay; of none, all factors are 1.
        ridge: beside the mean attention that an entry receives.
        iterations: steps, from 0 to 1,024.
        most: the largest factor; the smallest is 1 / most.
        backend: "auto", "triton" or "reference".

    Returns:
        [P, k] float32 (float64 for float64 input): 1 beyond the counts.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        BackendError: an explicit backend that is not there.

    Reference:
        Attention Matching (arXiv 2602.16284) section 3: masses of chosen keys. The ridge and the steps are ours.
    """
    check_tensors({"shares": shares, "counts": counts})
    check_floats(shares=shares)
    if shares.dim() != 3:
        raise ValueError(f"shares is {shown(shares)}, wanted floats [P, k, R]")
    if counts.shape != shares.shape[:1] or counts.dtype not in INTEGERS:
        raise ValueError(f"counts is {shown(counts)}, wanted integers [{shares.shape[0]}]")
    ridge, most = check_number("ridge", ridge, least=0), check_number("most", most, least=1)
    check_whole("iterations", iterations, least=0, most=MOST_ITERATIONS)
    _, run = resolve(_OP, backend, shares)
    wide = shares.to(torch.promote_types(shares.dtype, torch.float32))
    return run(wide, counts, ridge, iterations, most)
