"""Regions that grow from neighbours that are alike, and what tells whether they are: products of pairs of rows."""

import torch

from mminfer_kernels.backends import cpu_takes
from mminfer_kernels.checks import check_floats, check_number, check_places, check_tensors, check_whole, described
from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.regions import reference
from mminfer_kernels.regions.reference import COSINE_ROUNDING
from mminfer_kernels.tracing import traceable

__all__ = ["COSINE_ROUNDING", "grow_regions", "row_dots"]

for _op in ("grow_regions", "row_dots"):
    register(_op, "reference", getattr(reference, _op))
    register(_op, "native", f"mminfer_kernels.regions.native:{_op}", cpu_takes)


def _fake_dots(x: torch.Tensor, first: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return x.new_empty(first.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _dots_flops(x: torch.Tensor, first: torch.Tensor, *args: object, **kwargs: object) -> int:
    return 2 * first.numel() * x.shape[-1]


@traceable(_fake_dots, _dots_flops)
def row_dots(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Products of pairs of rows: `x[first] . x[second]`, without a copy of either.

    Args:
        x: [P, C].
        first: [E] int64, a row of each pair.
        second: [E] int64, the other.
        backend: "auto", "native" or "reference".

    Returns:
        [E] float32 (float64 for float64 input).

    Raises:
        ValueError: shapes or dtypes that do not fit, or places that are not there (`PlaceError`).
        BackendError: an explicit backend that is not there.
    """
    check_tensors({"x": x, "first": first, "second": second})
    check_floats(x=x)
    if x.dim() != 2 or first.dim() != 1 or first.shape != second.shape:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (x, first, second))
        raise ValueError(f"x, first and second are {shapes}, wanted [P, C] and twice [E]")
    for name, place in (("first", first), ("second", second)):
        _check_int64(name, place)
        check_places(place, len(x))
    _, run = resolve("row_dots", backend, x)
    return run(x, first, second)


def _fake_owner(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.int64)


@traceable(_fake_owner)
def grow_regions(
    x: torch.Tensor,
    sizes: torch.Tensor,
    pairs: torch.Tensor,
    threshold: float | None = None,
    largest: int | None = None,
    group: torch.Tensor | None = None,
    spare: torch.Tensor | None = None,
    block: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Regions of alike neighbours.

    In rounds: of the pairs of neighbouring regions that may join, those join that are each other's best. The best is
    the one whose union scatters least beyond its parts (Ward). Regions that were refused stay apart at that border.
    Where a group has no more than so many regions to lose, only the cheapest joins of all stand.

    Args:
        x: [P, C], of which the directions count.
        sizes: [P], how many patches each stands for, above 0.
        pairs: [2, E] int64, neighbours; no pair twice.
        threshold: mean cosine of a region's members to each other, at least; None: any.
        largest: patches of a region, at most; None: any number.
        group: [P] int64: regions are counted by it, and no pair joins two; with `spare` alone.
        spare: [groups] int64: how many regions each group has to lose; None: all.
        block: [P] int64: of equally good pairs those within a block go first; None: in their order.
        backend: "auto", "native" or "reference".

    Returns:
        [P] int64: the first member of each one's region.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit, or places that are not there (`PlaceError`).
        BackendError: an explicit backend that is not there.

    Reference:
        Ward's order of joining (Hierarchical grouping to optimize an objective function, 1963), on unit vectors,
        between neighbours alone.
    """
    optional = {"group": group, "spare": spare, "block": block}
    check_tensors({"x": x, "sizes": sizes, "pairs": pairs}, optional)
    check_floats(x=x)
    if x.dim() != 2 or sizes.shape != x.shape[:1] or not sizes.is_floating_point():
        raise ValueError(f"x is {list(x.shape)} and sizes {described(sizes)}, wanted [P, C] and floats [P]")
    _check_int64("pairs", pairs)
    if pairs.dim() != 2 or len(pairs) != 2:
        raise ValueError(f"pairs is {list(pairs.shape)}, wanted [2, E]")
    check_places(pairs, len(x))
    if threshold is not None:
        threshold = check_number("threshold", threshold, least=-1, most=1)
    if largest is not None:
        check_whole("largest", largest, least=1)
    _check_groups(x, group, spare, block)
    _, run = resolve("grow_regions", backend, x)
    return run(x, sizes, pairs, threshold, largest, group, spare, block)


def _check_groups(
    x: torch.Tensor, group: torch.Tensor | None, spare: torch.Tensor | None, block: torch.Tensor | None
) -> None:
    for name, column in (("group", group), ("block", block)):
        if column is not None:
            _check_int64(name, column)
            if column.shape != x.shape[:1]:
                raise ValueError(f"{name} is {list(column.shape)}, wanted [{len(x)}]")
    if (group is None) != (spare is None):
        raise ValueError(f"group is {described(group)} and spare {described(spare)}, wanted both or none")
    if group is not None and spare is not None:
        _check_int64("spare", spare)
        if spare.dim() != 1:
            raise ValueError(f"spare is {list(spare.shape)}, wanted [groups]")
        check_places(group, len(spare))


def _check_int64(name: str, x: torch.Tensor) -> None:
    if x.dtype != torch.int64:
        raise ValueError(f"{name} is {x.dtype}, wanted torch.int64")
