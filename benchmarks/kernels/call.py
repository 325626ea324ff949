"""One call of an op: its inputs, what it costs at least, who can run it, and whether a result is right."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from mminfer_kernels import BackendError, available_backends
from mminfer_kernels.dispatch import resolve
from torch.utils._pytree import tree_leaves, tree_map

RTOL = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
ATOL = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # of the largest value
Runs = dict[str, Callable[[], Any]]


@dataclass
class Call:
    """One op on inputs of one size.

    Args:
        op: its registered name.
        function: the public op; takes the inputs, the settings and `backend`.
        inputs: tensors, or trees of them, in the order in which both the op and its reference take them.
        flops: least of one call.
        moved: bytes that one call must move, at least.
        settings: of the public op.
        rest: what the reference takes behind the inputs.
        mutates: whether it writes into inputs.
        beside: other runs to compare times with; they do more or other work.
    """

    op: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    flops: int
    moved: int
    settings: dict[str, Any] = field(default_factory=dict)
    rest: tuple[Any, ...] = ()
    mutates: bool = False
    beside: Runs = field(default_factory=dict)
    _before: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._before = tree_map(_cloned, self.inputs) if self.mutates else ()

    def run(self, backend: str) -> Callable[[], Any]:
        """The public op with a backend."""
        return lambda: self.function(*self.inputs, **self.settings, backend=backend)

    def plain(self, reference: Callable[..., Any]) -> Callable[[], Any]:
        """The reference itself, or what became of it, without the public op around it."""
        return lambda: reference(*self.inputs, *self.rest)

    @property
    def reference(self) -> Callable[..., Any]:
        """The op in plain PyTorch."""
        return resolve(self.op, "reference")[1]

    @property
    def device(self) -> torch.device:
        return self._tensors[0].device

    @property
    def _tensors(self) -> list[torch.Tensor]:
        return [x for x in tree_leaves(self.inputs) if isinstance(x, torch.Tensor)]

    def in_double(self) -> "Call":
        """The same call on float64, for what is true."""
        inputs, settings = tree_map(_doubled, self.inputs), tree_map(_doubled, self.settings)
        return replace(self, inputs=inputs, settings=settings, beside={})

    def why_not(self, backend: str) -> str:
        """Why a backend does not run here; empty where it does."""
        if backend not in available_backends(self.op):
            return f"{self.op} has no {backend} kernel"
        if backend == "triton" and self.device.type != "cuda":
            return "Triton kernels run on a GPU, and there is none here"
        try:
            resolve(self.op, backend, *(x for x in self._tensors if x.dtype in RTOL))
        except BackendError as error:
            return str(error)
        return ""

    def difference(self, run: Callable[[], Any]) -> str:
        """What a run has wrong, against the reference; empty where nothing is."""
        found, dtypes = self.results(run), {x.dtype for x in self._tensors if x.dtype in RTOL}
        for i, (ours, theirs) in enumerate(zip(found, self._expected, strict=True)):
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                return (
                    f"result {i} is {ours.dtype} {list(ours.shape)}, the reference's {theirs.dtype} "
                    f"{list(theirs.shape)}"
                )
            wrong = _wrong(ours, theirs, max(dtypes | ({ours.dtype} & RTOL.keys()), key=RTOL.__getitem__))
            if wrong:
                return f"{wrong:,} of {ours.numel():,} values of result {i} are not the reference's"
        return ""

    @cached_property
    def _expected(self) -> list[torch.Tensor]:
        return self.results(self.run("reference"))

    def results(self, run: Callable[[], Any]) -> list[torch.Tensor]:
        """Tensors returned, and the inputs written into, which are what they were before and afterwards."""
        self._put_back()
        out = [x for x in tree_leaves(run()) if isinstance(x, torch.Tensor)]
        if self.mutates:
            new = [x for x in out if not any(x is y for y in self._tensors)]
            out = [x.clone() for x in (*new, *self._tensors)]
            self._put_back()
        return out

    def _put_back(self) -> None:
        if self.mutates:
            tree_map(_copy, self.inputs, self._before)


def _wrong(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> int:
    """Values that differ by more than arithmetic in the coarsest dtype of inputs and result explains."""
    if not found.is_floating_point():
        return int((found != expected).sum())
    expected = expected.float()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    close = torch.isclose(found.float(), expected, rtol=RTOL[dtype], atol=ATOL[dtype] * largest)
    return int((~close).sum())


def _doubled(x: Any) -> Any:
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{own.name: tree_map(_doubled, getattr(x, own.name)) for own in fields(x) if own.init})
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _cloned(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) else x


def _copy(target: Any, source: Any) -> None:
    if isinstance(target, torch.Tensor):
        target.copy_(source)
