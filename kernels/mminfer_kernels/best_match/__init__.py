"""For each row, its most cosine-similar row of another set, without the similarity matrix in memory."""

import torch

from mminfer_kernels.backends import cpu_takes, on_cuda, triton_takes
from mminfer_kernels.best_match import reference
from mminfer_kernels.checks import check_floats, check_tensors
from mminfer_kernels.dispatch import register, resolve
from mminfer_kernels.tracing import traceable

__all__ = ["best_match"]

register("best_match", "reference", reference.best_match)
register("best_match", "triton", "mminfer_kernels.best_match.triton_kernel:best_match", triton_takes, on_cuda)
register("best_match", "native", "mminfer_kernels.best_match.native:best_match", cpu_takes)


def _fake(src: torch.Tensor, dst: torch.Tensor, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(src.dtype, torch.float32)
    return src.new_empty(src.shape[:-1], dtype=dtype), src.new_empty(src.shape[:-1], dtype=torch.int64)


def _flops(src: torch.Tensor, dst: torch.Tensor, *args: object, **kwargs: object) -> int:
    return 2 * src.numel() * dst.shape[-2]


@traceable(_fake, _flops)
def best_match(src: torch.Tensor, dst: torch.Tensor, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Most similar row of `dst` for each row of `src`: `max over t of cos(src[s], dst[t])`.

    Args:
        src: [..., S, C].
        dst: [..., T, C], the same leading sizes, T of 1 or more.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        similarity [..., S] float32 (float64 for float64 input), 0 where either row is zero; index [..., S]
        int64 into T, the first of equals.

    Raises:
        ValueError: shapes or dtypes that do not fit, or no row in `dst`.
        BackendError: an explicit backend that is not there.

    Reference:
        AIM (arXiv 2412.03248), token merging; LOOK-M (arXiv 2406.18139), key merging. Both sets of authors
        build the whole similarity matrix.
    """
    check_tensors({"src": src, "dst": dst})
    if src.dim() < 2 or dst.dim() < 2 or src.shape[:-2] != dst.shape[:-2] or src.shape[-1] != dst.shape[-1]:
        raise ValueError(f"src is {list(src.shape)} and dst {list(dst.shape)}, wanted [..., S, C] and [..., T, C]")
    if dst.shape[-2] == 0:
        raise ValueError(f"dst is {list(dst.shape)}: it has no row to match, wanted at least one")
    check_floats(src=src, dst=dst)
    _, run = resolve("best_match", backend, src, dst)
    return run(src, dst)
