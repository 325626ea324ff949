"""What every op asks of its arguments before any backend sees them: one place, and the same for all backends.

Kernels in C++, CUDA and Triton go wherever sizes, strides and places send them. So whatever reaches them has passed
here, and a wrong argument is an error that names it.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mminfer_kernels.backends import FLOATS

LARGEST_SIZE = 2**31 - 1  # of a dimension: kernels count rows and columns in 32 bits
LARGEST_FACTOR = 1e38  # of numbers that kernels hold in float32
LARGEST_SCALE = 1e12  # of logits: beyond, powers of them leave float32
MOST_ITERATIONS = 1024  # scratch grows with them
SHARING_WORK = 10**5  # steps of the search for an element that two tensors share
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
KNOWN_FLOATS = (*FLOATS, torch.float64)


class PlaceError(ValueError, IndexError):
    """An index holds places that are not there."""


def check_tensors(given: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
    """Raises `ValueError` unless these are plain tensors on one device, no dimension beyond `LARGEST_SIZE`.

    Args:
        given: what there must be, by name.
        optional: what may be None.
    """
    device: torch.device | None = None
    for part in (given, optional or {}):
        for name, x in part.items():
            if x is None and part is optional:
                continue
            if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_neg():
                raise ValueError(f"{name} is {described(x)}, wanted a dense tensor; of a lazy one resolve_neg()")
            if device is None:
                device = x.device
            if x.device != device:
                raise ValueError(f"{name} is on {x.device}, wanted it on {device} as {next(iter(given))} is")
            if x.numel() > LARGEST_SIZE and max(x.shape) > LARGEST_SIZE:
                raise ValueError(f"{name} is {list(x.shape)}, wanted at most {LARGEST_SIZE} along a dimension")


def check_floats(**tensors: Tensor) -> None:
    """Raises `ValueError` unless all have one dtype, float32, bfloat16, float16 or float64."""
    dtypes = [x.dtype for x in tensors.values()]
    if dtypes[0] not in KNOWN_FLOATS or any(dtype != dtypes[0] for dtype in dtypes):
        found = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise ValueError(f"found {found}, wanted one floating dtype of 16, 32 or 64 bits")


def check_number(name: str, value: Any, *, least: float = -LARGEST_FACTOR, most: float = LARGEST_FACTOR) -> float:
    """The number. Raises `ValueError` unless it is one, no bool, within bounds; NaN and infinities are not."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not least <= value <= most:  # type: ignore[operator]
        raise ValueError(f"{name} is {described(value)}, wanted a number from {least:g} to {most:g}")
    return float(value)


def check_whole(name: str, value: Any, *, least: int, most: int = LARGEST_SIZE) -> None:
    """Raises `ValueError` unless this is an int, no bool, within bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {described(value)}, wanted a whole number from {least} to {most}")


def check_flag(name: str, value: Any) -> None:
    """Raises `ValueError` unless this is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {described(value)}, wanted True or False")


def check_attention(q: Tensor, k: Tensor, v: Tensor, query_index: Tensor | None, aligned: bool) -> None:
    """Raises `ValueError` unless q, k, v and the queries' places fit each other.

    Args:
        q: [B, H, S, D].
        k: [B, G, N, D], H a multiple of G.
        v: like k; where there are none, k.
        query_index: [S] int64, strictly ascending places among the keys.
        aligned: whether the queries must fit among the keys where they have no places.
    """
    check_heads(q, k, v, query_index=query_index)
    if query_index is not None:
        _check_query_index(query_index, q.shape[2], k.shape[2])
    elif aligned and q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries for {k.shape[2]} keys, wanted at most one query a key")


def check_heads(q: Tensor, k: Tensor, v: Tensor, **optional: Tensor | None) -> None:
    """Raises `ValueError` unless these are [B, H, S, D] and twice [B, G, N, D] of one floating dtype."""
    check_tensors({"q": q, "k": k, "v": v}, optional)
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q is {list(q.shape)} and k {list(k.shape)}, wanted [B, H, S, D] and [B, G, N, D]")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"k is {described(k)} and v {described(v)}, wanted the same of both: twice [B, G, N, D]")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide evenly over {k.shape[1]} key heads")
    check_floats(q=q, k=k, v=v)


def check_packed(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    lengths: Tensor,
    log_mass: Tensor | None,
    longest: int | None,
) -> None:
    """Raises `ValueError` unless these are queries and a packed cache, as `packed_decode_attention` has them."""
    check_tensors({"q": q, "keys": keys, "values": values, "first": first, "lengths": lengths}, {"log_mass": log_mass})
    of_q, of_keys = q.shape, keys.shape
    if len(of_q) != 4 or of_q[2] != 1 or len(of_keys) != 2 or of_keys[1] != of_q[3]:
        raise ValueError(f"q is {list(of_q)} and keys {list(of_keys)}, wanted [B, H, 1, D] and [R, D]")
    if values.shape != of_keys:
        raise ValueError(f"keys are {list(of_keys)} and values {list(values.shape)}, wanted twice [R, D]")
    check_floats(q=q, keys=keys, values=values)
    check_segments(first, lengths, of_keys[0], least=1, batch=of_q[0], longest=longest)
    if of_q[1] % first.shape[1]:
        raise ValueError(f"{of_q[1]} query heads do not divide evenly over {first.shape[1]} key heads")
    if log_mass is not None:
        wide = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
        if log_mass.shape != of_keys[:1] or log_mass.dtype not in wide:
            raise ValueError(f"log_mass is {described(log_mass)}, wanted float32 [{of_keys[0]}]")


def check_segments(
    first: Tensor, lengths: Tensor, rows: int, *, least: int, batch: int | None = None, longest: int | None = None
) -> None:
    """Raises `ValueError` unless these are [B, G] segments of rows; their places are looked at on the CPU alone.

    Args:
        first: first row of each.
        lengths: rows of each.
        rows: how many there are.
        least: of a length.
        batch: B, or None: any.
        longest: bound of the lengths, or None.
    """
    shape = first.shape
    if len(shape) != 2 or lengths.shape != shape or batch not in (None, shape[0]) or not shape[1]:
        wanted = "B" if batch is None else batch
        raise ValueError(f"first is {list(shape)} and lengths {list(lengths.shape)}, wanted twice [{wanted}, G]")
    if first.dtype != torch.int64 or lengths.dtype != torch.int64:
        raise ValueError(f"first is {first.dtype} and lengths {lengths.dtype}, wanted int64")
    if longest is not None:
        check_whole("longest", longest, least=1)
    if rows < least and shape[0]:
        raise ValueError(f"there are {rows} rows, wanted segments of at least {least}")
    most = rows if longest is None else min(longest, rows)
    if not first.is_cpu:
        return
    for starts, counts in zip(first.tolist(), lengths.tolist(), strict=True):
        for start, count in zip(starts, counts, strict=True):
            if not 0 <= start <= rows - count or not least <= count <= most:
                raise ValueError(
                    f"a segment of {count} rows begins at row {start}, wanted lengths from {least} to {most} within "
                    f"{rows} rows"
                )


def check_from_end(query_index: Tensor | None, queries: int, rows: int) -> int:
    """The fewest keys that a head must have for queries at these places, counted from its end.

    Args:
        query_index: [S] int64, strictly ascending and below 0; None: the last S.
        queries: S.
        rows: that there are, for all heads.

    Raises:
        ValueError: places that are none.
    """
    if query_index is None or not queries:
        return queries
    if query_index.shape != (queries,) or query_index.dtype != torch.int64:
        raise ValueError(f"query_index is {query_index.dtype} {list(query_index.shape)}, wanted int64 [{queries}]")
    descends = (query_index[1:] <= query_index[:-1]).any()
    first, last, wrong = torch.stack([query_index[0], query_index[-1], descends.long()]).tolist()
    if wrong or first < -rows or last >= 0:
        wanted = f"strictly ascending places from -{rows} to -1, counted from the end"
        raise ValueError(f"query_index runs from {first} to {last}, wanted {wanted}")
    return -first


def _check_query_index(query_index: Tensor, queries: int, keys: int) -> None:
    if query_index.shape != (queries,) or query_index.dtype != torch.int64:
        raise ValueError(f"query_index is {query_index.dtype} {list(query_index.shape)}, wanted int64 [{queries}]")
    if queries == 0:
        return
    descends = (query_index[1:] <= query_index[:-1]).any()
    first, last, wrong = torch.stack([query_index[0], query_index[-1], descends.long()]).tolist()
    if wrong or first < 0 or last >= keys:
        raise ValueError(f"query_index runs from {first} to {last}, wanted strictly ascending places below {keys}")


def check_scores(q: Tensor) -> None:
    """Raises `ValueError` if there is nothing that logits can be made of."""
    if q.shape[3] == 0:
        raise ValueError(f"q is {list(q.shape)}: heads of no element score nothing, wanted at least one")


def factor_of(q: Tensor, scale: float | None, temperature: float = 1.0) -> float:
    """The factor of the logits, `D ** -0.5` by default; without elements it does not matter.

    Raises:
        ValueError: the scale or the temperature is no number, or their quotient is none.
    """
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else check_number("scale", scale)
    temperature = check_number("temperature", temperature, least=1 / LARGEST_FACTOR)
    return check_number("scale / temperature", scale / temperature, least=-LARGEST_SCALE, most=LARGEST_SCALE)


def check_weights(weights: Tensor | None, q: Tensor) -> None:
    """Raises `ValueError` unless there is one vote a query, or one a query and head."""
    check_tensors({"q": q}, {"weights": weights})
    if weights is None:
        return
    if tuple(weights.shape) not in (tuple(q.shape[:3]), (q.shape[0], q.shape[2])) or weights.is_complex():
        raise ValueError(
            f"weights has shape {list(weights.shape)}, {weights.dtype}, wanted [B, H, S] or [B, S] of q {list(q.shape)}"
        )


def check_log_mass(log_mass: Tensor | None, k: Tensor) -> None:
    """Raises `ValueError` unless there is one float a key of k [B, G, N, D], or none at all."""
    check_tensors({"k": k}, {"log_mass": log_mass})
    if log_mass is not None and (log_mass.shape != k.shape[:-1] or log_mass.dtype not in KNOWN_FLOATS):
        wanted = f"float32 {list(k.shape[:-1])}, one a key"
        raise ValueError(f"log_mass is {log_mass.dtype} {list(log_mass.shape)}, wanted {wanted}")


def check_index(x: Tensor, index: Tensor, rows: int | None = None) -> None:
    """Raises `ValueError` unless `index` is [K], or [..., K] with x's leading sizes, and of places among x's rows.

    Args:
        x: [..., N, C].
        index: int64.
        rows: N where the rows are on another dimension.
    """
    if index.dtype != torch.int64 or index.dim() == 0:
        raise ValueError(f"index is {described(index)}, wanted int64 [K] or [..., K]")
    if index.dim() != 1 and index.shape[:-1] != x.shape[:-2]:
        raise ValueError(f"index is {list(index.shape)}, wanted [K] or {[*x.shape[:-2], 'K']} for x {list(x.shape)}")
    check_places(index, x.shape[-2] if rows is None else rows)


def check_places(index: Tensor, rows: int) -> None:
    """Raises `PlaceError` unless all places are among `rows`.

    On CUDA, where to look would be to wait for the GPU, it fails as torch's own ops do: when the GPU comes to it.
    """
    if index.numel() == 0 or index.is_meta:
        return
    if index.is_cuda:  # one kernel, which looks at every place: torch's own gather, of one byte over and over
        torch.empty(1, dtype=torch.uint8, device=index.device).expand(rows).gather(0, index.reshape(-1))
        return
    least, most = (int(x) for x in index.aminmax())
    if least < 0 or most >= rows:
        raise PlaceError(f"index runs from {least} to {most}, wanted places from 0 to {rows - 1}")


def check_writable(**tensors: Tensor) -> None:
    """Raises `ValueError` if two elements that are written to may be one memory: of one tensor, or of two."""
    for name, x in tensors.items():
        extent = 1  # of what the dimensions so far reach
        for stride, size in sorted((x.stride(i), n) for i, n in enumerate(x.shape) if n > 1):
            if stride < extent and x.numel():
                raise ValueError(f"{name} is {described(x)} of strides {list(x.stride())}, wanted no overlap: clone it")
            extent += stride * (size - 1)
    given = list(tensors.values())
    if any(share_memory(x, y) for i, x in enumerate(given) for y in given[:i]):
        raise ValueError(f"{' and '.join(tensors)} overlap in memory and would be written twice, wanted clones")


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether an element of one may be an element of the other."""
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() or not x.numel() or not y.numel():
        return False
    import numpy as np

    try:
        return np.shares_memory(np.asarray(_Laid(x)), np.asarray(_Laid(y)), max_work=SHARING_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Laid:
    """Where a tensor's elements lie, as numpy reads it; nobody reads the elements."""

    def __init__(self, x: Tensor) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{x.element_size()}",
            "data": (x.data_ptr(), False),
            "shape": tuple(x.shape),
            "strides": tuple(n * x.element_size() for n in x.stride()),
        }


def check_sections(position: Tensor, inv_freq: Tensor, sections: Sequence[int], interleaved: bool) -> None:
    """Raises `ValueError` unless every frequency belongs to one section, and sections to axes of the positions."""
    if not isinstance(sections, Sequence) or isinstance(sections, str):
        raise ValueError(f"sections is {described(sections)}, wanted one whole number a section")
    for i, section in enumerate(sections):
        check_whole(f"sections[{i}]", section, least=0)
    if position.dim() < 2 or position.shape[0] == 0:
        raise ValueError(
            f"position has shape {list(position.shape)}, wanted [A, ..., N] with sections {list(sections)}"
        )
    if sum(sections) != inv_freq.shape[0]:
        raise ValueError(f"sections {list(sections)} add up to {sum(sections)}, wanted {inv_freq.shape[0]} frequencies")
    if interleaved and len(sections) != position.shape[0]:
        raise ValueError(f"sections {list(sections)} for {position.shape[0]} axes, wanted one an axis when interleaved")


def described(value: Any) -> str:
    """What was found, in 200 characters at most."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"[:200]
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:190]} ..."
