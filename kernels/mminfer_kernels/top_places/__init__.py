"""Which places have the largest numbers, in order of place."""

import torch

from mminfer_kernels.backends import on_cuda, triton_takes
from mminfer_kernels.checks import check_tensors, check_whole, described
from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.top_places import reference
from mminfer_kernels.tracing import traceable

__all__ = ["top_places"]

_OP = "top_places"
register(_OP, "reference", reference.top_places)
register(_OP, "triton", f"mminfer_kernels.{_OP}.triton_kernel:{_OP}", triton_takes, on_cuda)


def _fake(score: torch.Tensor, count: int, *args: object, **kwargs: object) -> torch.Tensor:
    return score.new_empty(*score.shape[:-1], count, dtype=torch.int64)


@traceable(_fake)
def top_places(
    score: torch.Tensor, count: int, among: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """The places of the largest numbers of each row, ascending; of equal ones the first.

    On a GPU a program finds the smallest number that stays by halving, bit by bit, and then writes the places down in
    order: neither is anything sorted, nor does the host wait.

    Args:
        score: [..., N] floats, or bool, of which true is the larger one; nan counts as the largest number, infinities
            as the largest and the smallest.
        count: how many places, up to N.
        among: [..., N] bool, those that are chosen among: all others come before any of them. None: all.
        backend: "auto", "triton" or "reference".

    Returns:
        [..., count] int64.

    Raises:
        ValueError: shapes, dtypes or a count that do not fit.
        BackendError: an explicit backend that is not there.
    """
    check_tensors({"score": score}, {"among": among})
    if score.dim() == 0 or not (score.is_floating_point() or score.dtype == torch.bool):
        raise ValueError(f"score is {described(score)}, wanted floats or bool [..., N]")
    check_whole("count", count, least=0, most=score.shape[-1])
    if among is not None and (among.shape != score.shape or among.dtype != torch.bool):
        raise ValueError(f"among is {described(among)}, wanted bool {list(score.shape)}")
    _, run = resolve(_OP, backend, score)
    return run(score, count, among)
