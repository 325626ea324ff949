"""Rotary position embedding for fractional positions, on one axis or several."""

from collections.abc import Sequence

import torch

from mminfer_kernels.backends import cpu_takes, on_cuda, triton_takes
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
    if position.dtype != torch.float64 or position.dim() == 0:
        raise ValueError(f"position is {position.dtype} {list(position.shape)}, wanted float64 [..., N]")
    if inv_freq.dim() != 1:
        raise ValueError(f"inv_freq has shape {list(inv_freq.shape)}, wanted [D / 2]")
    axes = None if sections is None else _axis_of_frequency(position, inv_freq, sections, interleaved)
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
    if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.dim() < 2 or cos.shape[-1] % 2:
        raise ValueError(
            f"cos is {cos.dtype} {list(cos.shape)} and sin {sin.dtype} {list(sin.shape)}, wanted [..., N, D] with an "
            "even D, one dtype"
        )
    for name, x in (("q", q), ("k", k)):
        if x.dim() < 3 or x.shape[-2:] != cos.shape[-2:]:
            raise ValueError(f"{name} is {list(x.shape)}, wanted [..., heads, N, D] for cos {list(cos.shape)}")
    _, run = resolve("apply_rotary", backend, q, k, cos, sin)
    return run(q, k, cos, sin)


@traceable(_fake_pair)
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
    """`rotary` in place: q and k are overwritten."""
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
    axes = None if sections is None else _axis_of_frequency(position, inv_freq, sections, interleaved)
    if position.dtype != torch.float64 or position.dim() != (2 if axes is None else 3):
        wanted = "[B, N]" if axes is None else "[A, B, N]"
        raise ValueError(f"position is {position.dtype} {list(position.shape)}, wanted float64 {wanted}")
    for name, x in (("q", q), ("k", k)):
        batch, tokens = position.shape[-2:]
        if x.dim() != 4 or (x.shape[0], x.shape[2], x.shape[3]) != (batch, tokens, 2 * inv_freq.shape[0]):
            raise ValueError(
                f"{name} is {list(x.shape)}, wanted [{batch}, heads, {tokens}, {2 * inv_freq.shape[0]}] "
                "for this position and inv_freq"
            )
    _, run = resolve("rotary", backend, q, k, inv_freq)
    run(q, k, position, inv_freq, attention_scaling, axes)


def _axis_of_frequency(
    position: torch.Tensor, inv_freq: torch.Tensor, sections: Sequence[int], interleaved: bool
) -> list[int]:
    """The axis each of the D / 2 frequencies turns with."""
    if position.dim() < 2:
        raise ValueError(
            f"position has shape {list(position.shape)}, wanted [A, ..., N] with sections {list(sections)}"
        )
    if sum(sections) != inv_freq.shape[0]:
        raise ValueError(f"sections {list(sections)} add up to {sum(sections)}, wanted {inv_freq.shape[0]} frequencies")
    axes = position.shape[0]
    if not interleaved:
        return [i % axes for i, section in enumerate(sections) for _ in range(section)]
    if len(sections) != axes:
        raise ValueError(f"sections {list(sections)} for {axes} axes, wanted one an axis when interleaved")
    turns = [(j, j % axes) for j in range(inv_freq.shape[0])]
    return [axis if j < axes * sections[axis] else 0 for j, axis in turns]
