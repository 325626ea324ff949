"""Rotary position embedding for fractional positions, on one axis or several."""

from collections.abc import Sequence

import torch

from mminfer_kernels.backends import cpu_takes, on_cuda, triton_takes
from mminfer_kernels.checks import (
    KNOWN_FLOATS,
    check_flag,
    check_floats,
    check_number,
    check_sections,
    check_tensors,
    check_writable,
    described,
)
from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.rotary import reference
from mminfer_kernels.tracing import traceable

__all__ = ["apply_rotary", "rotary", "rotary_", "rotary_table"]

_ROOM = "mminfer_kernels.rotary"
for _op in ("rotary_table", "apply_rotary", "rotary"):
    register(_op, "reference", getattr(reference, _op))
    register(_op, "triton", f"{_ROOM}.triton_kernel:{_op}", triton_takes, on_cuda)
    register(_op, "native", f"{_ROOM}.native:{_op}", cpu_takes)


def _fake_table(
    position: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float = 1.0,
    sections: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    leading = position.shape if sections is None else position.shape[1:]
    cos = position.new_empty(*leading, 2 * inv_freq.shape[0], dtype=dtype)
    return cos, torch.empty_like(cos)


def _fake_pair(q: torch.Tensor, k: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _fake_copies(
    q: torch.Tensor, k: torch.Tensor, *args: object, **kwargs: object
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    return q, k


@traceable(_fake_table)
def rotary_table(
    position: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float = 1.0,
    sections: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of `position * inv_freq`, right to 1e-6 for positions up to 2**20 with fractions.

    The angle is formed in float64 and brought into one turn before it is rounded: in float32 a position near
    2**20 has a spacing of 1/8 and the angle an error of half a radian.

    Args:
        position: [..., N] float64, or [A, ..., N] with A axes (temporal, height, width) when `sections` is
            given.
        inv_freq: [D / 2], the model's own.
        attention_scaling: factor of the results, as the model's rotary embedding has it.
        sections: how many frequencies belong to each section, in sum D / 2; section i turns with axis i % A.
        dtype: of the results.
        interleaved: deal frequencies to the axes in turn instead (Qwen3-VL): frequency j turns with axis j %
            A while j < A * sections[j % A], the rest with axis 0.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        cos and sin, each [..., N, D], the halves repeated.

    Raises:
        ValueError: shapes, dtypes or sections that do not fit.
        BackendError: an explicit backend that is not there.

    Reference:
        V2PE (arXiv 2412.09616); M-RoPE as in Hugging Face's Qwen2-VL, Qwen2.5-VL and Qwen3-VL. The
        V2PE authors form the angle in float32.
    """
    attention_scaling = _check_turns(position, inv_freq, attention_scaling)
    if position.dtype != torch.float64 or position.dim() == 0:
        raise ValueError(f"position is {position.dtype} {list(position.shape)}, wanted float64 [..., N]")
    if dtype not in KNOWN_FLOATS:
        raise ValueError(f"dtype is {described(dtype)}, wanted one of {', '.join(map(str, KNOWN_FLOATS))}")
    axes = _axis_of_frequency(position, inv_freq, sections, interleaved)
    _, run = resolve("rotary_table", backend, position.new_empty(0, dtype=dtype), inv_freq)
    return run(position, inv_freq, attention_scaling, axes, dtype)


@traceable(_fake_pair)
def apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys, Hugging Face's `rotate_half` convention.

    Args:
        q: [..., H, N, D].
        k: [..., G, N, D].
        cos, sin: [..., N, D] or [N, D]. In `q`'s dtype the arithmetic is that of the host models; float32
            tables on half-precision input compute in float32.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        q and k rotated, in their own shapes and dtypes.

    Raises:
        ValueError: shapes that do not fit.
        BackendError: an explicit backend that is not there.
    """
    check_tensors({"q": q, "k": k, "cos": cos, "sin": sin})
    if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.dim() < 2 or cos.shape[-1] % 2:
        raise ValueError(
            f"cos is {cos.dtype} {list(cos.shape)} and sin {sin.dtype} {list(sin.shape)}, wanted [..., N, D] with an "
            "even D, one dtype"
        )
    for name, x in (("q", q), ("k", k)):
        check_floats(**{name: x})
        if x.dim() < 3 or x.shape[-2:] != cos.shape[-2:] or not _expands(cos.shape[:-2], x.shape[:-3]):
            raise ValueError(f"{name} is {list(x.shape)}, wanted [..., heads, N, D] for cos {list(cos.shape)}")
    check_floats(cos=cos, sin=sin)
    _, run = resolve("apply_rotary", backend, q, k, cos, sin)
    return run(q, k, cos, sin)


@traceable(_fake_copies)
def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    position: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float = 1.0,
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys straight from fractional positions: `rotary_table` and `apply_rotary` in one pass.

    Args:
        q: [B, H, N, D].
        k: [B, G, N, D].
        position: [B, N] float64, or [A, B, N] when `sections` is given.
        inv_freq, attention_scaling, sections, interleaved: as in `rotary_table`.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        q and k rotated, in their own shapes and dtypes; the arithmetic is float32 or better.

    Raises:
        ValueError: shapes, dtypes or sections that do not fit.
        BackendError: an explicit backend that is not there.

    Reference:
        V2PE (arXiv 2412.09616).
    """
    check_tensors({"q": q, "k": k})
    q, k = q.clone(memory_format=torch.contiguous_format), k.clone(memory_format=torch.contiguous_format)
    _rotate(q, k, position, inv_freq, attention_scaling, sections, interleaved, backend)
    return q, k


@traceable(lambda *args, **kwargs: None, mutates=("q", "k"))
def rotary_(
    q: torch.Tensor,
    k: torch.Tensor,
    position: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float = 1.0,
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> None:
    """`rotary` in place: q and k are overwritten, and must not overlap."""
    check_tensors({"q": q, "k": k})
    check_writable(q=q, k=k)
    _rotate(q, k, position, inv_freq, attention_scaling, sections, interleaved, backend)


def _rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    position: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float,
    sections: Sequence[int] | None,
    interleaved: bool,
    backend: str,
) -> None:
    attention_scaling = _check_turns(position, inv_freq, attention_scaling, q=q, k=k)
    axes = _axis_of_frequency(position, inv_freq, sections, interleaved)
    if position.dtype != torch.float64 or position.dim() != (2 if axes is None else 3):
        wanted = "[B, N]" if axes is None else "[A, B, N]"
        raise ValueError(f"position is {position.dtype} {list(position.shape)}, wanted float64 {wanted}")
    for name, x in (("q", q), ("k", k)):
        check_floats(**{name: x})
        batch, tokens = position.shape[-2:]
        if x.dim() != 4 or (x.shape[0], x.shape[2], x.shape[3]) != (batch, tokens, 2 * inv_freq.shape[0]):
            raise ValueError(
                f"{name} is {list(x.shape)}, wanted [{batch}, heads, {tokens}, {2 * inv_freq.shape[0]}] "
                "for this position and inv_freq"
            )
    _, run = resolve("rotary", backend, q, k, inv_freq)
    run(q, k, position, inv_freq, attention_scaling, axes)


def _check_turns(position: torch.Tensor, inv_freq: torch.Tensor, scaling: float, **turned: torch.Tensor) -> float:
    """The factor of the results, once all of these are known to fit."""
    check_tensors({"position": position, "inv_freq": inv_freq, **turned})
    check_floats(inv_freq=inv_freq)
    if inv_freq.dim() != 1:
        raise ValueError(f"inv_freq has shape {list(inv_freq.shape)}, wanted [D / 2]")
    return check_number("attention_scaling", scaling)


def _expands(leading: torch.Size, wanted: torch.Size) -> bool:
    """Whether a tensor of these leading sizes is one for each of the wanted: they are the same, or 1, or missing."""
    return len(leading) <= len(wanted) and all(
        a in (1, b) for a, b in zip(reversed(leading), reversed(wanted), strict=False)
    )


def _axis_of_frequency(
    position: torch.Tensor, inv_freq: torch.Tensor, sections: Sequence[int] | None, interleaved: bool
) -> list[int] | None:
    """The axis each of the D / 2 frequencies turns with; None: there is one."""
    check_flag("interleaved", interleaved)
    if sections is None:
        return None
    check_sections(position, inv_freq, sections, interleaved)
    axes = position.shape[0]
    if not interleaved:
        return [i % axes for i, section in enumerate(sections) for _ in range(section)]
    turns = [(j, j % axes) for j in range(inv_freq.shape[0])]
    return [axis if j < axes * sections[axis] else 0 for j, axis in turns]
