"""CUDA graphs that are none: the ops of a recorded stretch, with the very tensors they had, run again for each replay.

What torch's own graphs replay are kernels at addresses. Here ops are replayed on the tensors at which they were
recorded: whatever changes from one replay to the next and does not lie in such a tensor is as wrong here as there.
As there nothing that is recorded has run, so that outputs hold nothing until the first replay; and what would wait for
the GPU, or needs values on the host, cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.pretended import PretendedGPU
from mminfer.forward import cuda_graph, graphed

WAITING = frozenset({"_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero"})
STREAM = SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None)
POISON = -(2**30)  # what whole numbers hold that nobody has computed


@dataclass(frozen=True)
class Recorded:
    """One op.

    Args:
        func: of torch, or of ours.
        args: with the tensors that it had.
        kwargs: likewise.
        outputs: the tensors that it made and that others read; of a view, or of what it was given, none.
    """

    func: Any
    args: Any
    kwargs: Any
    outputs: tuple[Tensor | None, ...]

    def run(self) -> None:
        """Once more, its outputs where they were."""
        found = tree_leaves(self.func(*self.args, **self.kwargs))
        for place, value in zip(self.outputs, found, strict=True):
            if place is not None:
                place.copy_(value)


class _Recorder(TorchDispatchMode):
    """Keeps what is computed within it, and takes back what is written to tensors that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Recorded] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self.failed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in WAITING or (name == "_to_copy" and _leaves(given[0], kwargs.get("device"))):
            self.failed = True
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            self._before += [(x, x.clone()) for x in given]
        out = func(*args, **kwargs)
        made = [x if isinstance(x, Tensor) else None for x in tree_leaves(out)]
        if func._schema.is_mutable or func.is_view:
            made = [None] * len(made)
        if not func.is_view:
            self.ops.append(Recorded(func, args, kwargs, tuple(made)))
        return out

    def take_back(self) -> None:
        """Nothing of it has run: what was there is as it was, what was made holds what nobody wants to read."""
        for place, value in reversed(self._before):
            place.copy_(value)
        self._before = []
        for op in self.ops:
            for x in op.outputs:
                if x is not None and x.numel():
                    x.fill_(torch.nan if x.is_floating_point() else POISON if x.dtype == torch.int64 else 0)


def _leaves(x: Tensor, device: Any) -> bool:
    return device is not None and torch.device(device).type != x.device.type


class RecordedGraph:
    """Stands in for `torch.cuda.CUDAGraph`.

    Attributes:
        recording: the one that is being recorded, if any.
        made: how many there were so far.
        gpu: what counts launches, if anything does: a replay is one.
    """

    recording: ClassVar[RecordedGraph | None] = None
    made: ClassVar[int] = 0
    gpu: ClassVar[PretendedGPU | None] = None

    def __init__(self) -> None:
        self._recorder = _Recorder()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if RecordedGraph.recording is not None:
            raise RuntimeError("a recording within another")
        RecordedGraph.recording = self
        self._recorder.__enter__()

    def capture_end(self) -> None:
        RecordedGraph.recording = None
        self._recorder.__exit__(None, None, None)
        self._recorder.take_back()
        if self._recorder.failed:
            raise RuntimeError("operation failed due to a previous error during capture")
        RecordedGraph.made += 1

    def replay(self) -> None:
        with nullcontext() if self.gpu is None else self.gpu.fresh():
            for op in self._recorder.ops:
                op.run()
        if self.gpu is not None:
            self.gpu.launch("graph", 1)


@contextmanager
def pretended_graphs(gpu: PretendedGPU | None = None) -> Iterator[type[RecordedGraph]]:
    """A `with` block in which work on the CPU, or on a pretended GPU, can be recorded; none made before counts."""
    RecordedGraph.made, RecordedGraph.gpu, cuda = 0, gpu, torch.cuda
    devices = frozenset({"cpu" if gpu is None else "cuda"})
    stand_ins: dict[str, Callable[..., Any]] = {
        "CUDAGraph": RecordedGraph,
        "MemPool": lambda: SimpleNamespace(id=(0, 1)),
        "Stream": lambda device: STREAM,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "current_stream": lambda device=None: STREAM,
        "is_current_stream_capturing": lambda: RecordedGraph.recording is not None,
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(cuda, name, stand_in))
        stack.enter_context(mock.patch.object(cuda_graph, "DEVICE_TYPES", devices))
        if gpu is not None:  # which looks at all that is done
            stack.enter_context(mock.patch.object(graphed, "watched", lambda: False))
        end = mock.patch.object(torch._C, "_cuda_endAllocateToPool", lambda device, pool: None, create=True)
        stack.enter_context(end)
        for kept in (cuda_graph._aside, cuda_graph._pool):
            kept.cache_clear()
            stack.callback(kept.cache_clear)
        yield RecordedGraph
