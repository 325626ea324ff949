"""Which of some points stay, the farthest first, and which of these each other point is nearest to."""

import torch

from mminfer_kernels.backends import on_cuda, triton_takes
from mminfer_kernels.checks import check_floats, check_tensors, check_whole
from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.k_centres import reference
from mminfer_kernels.tracing import traceable

__all__ = ["k_centres"]

MOST_POINTS = 1024  # of which a Triton program holds what it knows of each


def _triton_takes(similarity: torch.Tensor, *integers: torch.Tensor) -> bool:
    return similarity.shape[-1] <= MOST_POINTS and triton_takes(similarity, *integers)


register("k_centres", "reference", reference.k_centres)
register("k_centres", "triton", "mminfer_kernels.k_centres.triton_kernel:k_centres", _triton_takes, on_cuda)


def _fake(
    similarity: torch.Tensor, counts: torch.Tensor, most: int, *args: object, **kwargs: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return counts.new_empty((*counts.shape, most)), counts.new_empty(similarity.shape[:-1])


def _flops(similarity: torch.Tensor, counts: torch.Tensor, most: int, *args: object, **kwargs: object) -> int:
    return similarity.numel() + 2 * counts.numel() * most * similarity.shape[-1]


@traceable(_fake, _flops)
def k_centres(
    similarity: torch.Tensor,
    counts: torch.Tensor,
    most: int,
    points: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy k-centre: the point least like all, then again and again the one least like any that was chosen.

    Args:
        similarity: [..., n, n], of each point to each.
        counts: [...] int64, how many are chosen; less than 0 counts as none, more than `most` or `points` as that.
        most: how many places there are for them, from 0 to n.
        points: [...] int64, how many points a set has; those behind, whose similarities are to be 0, are never chosen.
            None: all have n.
        backend: "auto", "triton" or "reference".

    Returns:
        centre [..., most] int64, the places of those chosen, ascending, n behind the last; owner [..., n] int64, the
        one that each point is most like, of equals the one chosen first, and itself where it was chosen.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: an explicit backend that is not there.

    Reference:
        Gonzalez, Clustering to minimize the maximum intercluster distance (1985): the farthest-point rule.
    """
    check_tensors({"similarity": similarity, "counts": counts}, {"points": points})
    largest = similarity.shape[-1] if similarity.dim() >= 2 else -1
    if largest < 0 or similarity.shape[-2] != largest or similarity.shape[:-2] != counts.shape:
        found = f"similarity is {list(similarity.shape)} and counts {list(counts.shape)}"
        raise ValueError(f"{found}, wanted [..., n, n] and [...]")
    if counts.dtype != torch.int64:
        raise ValueError(f"counts is {counts.dtype}, wanted torch.int64")
    if points is not None and (points.shape != counts.shape or points.dtype != torch.int64):
        raise ValueError(f"points is {points.dtype} {list(points.shape)}, wanted torch.int64 {list(counts.shape)}")
    check_whole("most", most, least=0, most=largest)
    check_floats(similarity=similarity)
    _, run = resolve("k_centres", backend, similarity, counts)
    return run(similarity, counts, most, points)
