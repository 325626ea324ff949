"""How torch records a stretch of work on a GPU, to be replayed by one launch.

Work is recorded on a stream aside of the caller's, after it has run there once: kernels are then loaded, and libraries
have their workspaces. What a recording allocates comes from a pool that all recordings for one stream share, since no
two of them ever run at once: its memory is there for the next one when a recording is let go.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from mminfer.forward.turns import TurnLock, undone

DEVICE_TYPES = frozenset({"cuda"})  # of which torch can record work

_lock = TurnLock()  # torch records one stretch at a time, and what another thread ran aside meanwhile would be in it
_failed: list[Any] = []  # torch's allocator goes on asking a recording that was begun and could not be ended


class Recording:
    """Work on tensors of one device, for torch's current stream of it when this is made.

    Args:
        device: of all tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.current_stream(device)
        self._graph: Any = None
        self._output: Tensor | None = None

    @property
    def is_there(self) -> bool:
        """Whether there is something to replay."""
        return self._output is not None

    @property
    def is_of_this_stream(self) -> bool:
        """Whether torch's current stream is the one it belongs to."""
        return bool(self._stream == torch.cuda.current_stream(self._device))

    def run_aside(self, work: Callable[[], Tensor]) -> Tensor:
        """Runs the work on the stream on which it is to be recorded; the caller's waits for it."""
        aside = _aside(self._device, self._stream.cuda_stream)
        with _lock.held():
            aside.wait_stream(self._stream)
            with torch.cuda.stream(aside):
                output = work()
            self._stream.wait_stream(aside)
        return output

    def record(self, work: Callable[[], Tensor]) -> None:
        """Records the work, of which nothing runs.

        Raises:
            RuntimeError: it waits for the GPU, or does something else that cannot be recorded.
        """
        of_stream = self._device, self._stream.cuda_stream
        graph, aside, pool = torch.cuda.CUDAGraph(), _aside(*of_stream), _pool(*of_stream).id
        with _lock.held(), torch.cuda.device(self._device), torch.cuda.stream(aside):
            aside.wait_stream(self._stream)
            with undone(lambda: _end(graph, pool, self._device)):
                _failed.append(graph)
                # Other threads may allocate memory and wait meanwhile.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                output = work()
                graph.capture_end()
                _failed.remove(graph)
        self._graph, self._output = graph, output

    def replay(self) -> Tensor:
        """Runs what was recorded; what it gives holds until the next time."""
        if self._output is None:
            raise RuntimeError("nothing was recorded")
        self._graph.replay()
        return self._output


def can_record(device: torch.device) -> bool:
    """Whether work on this device can be recorded now: nobody else does so around the caller."""
    return device.type in DEVICE_TYPES and not torch.cuda.is_current_stream_capturing()


def _end(graph: Any, pool: tuple[int, int], device: torch.device) -> None:
    """Ends a recording that was begun and given up; does nothing to one that was ended."""
    if graph not in _failed:
        return
    if torch.cuda.is_current_stream_capturing():
        with suppress(RuntimeError):  # it says once more what went wrong
            graph.capture_end()
    with suppress(RuntimeError):  # which torch leaves undone then
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)


@functools.cache
def _aside(device: torch.device, stream: int) -> Any:
    """For each stream one of its own, so that memory that goes from one to the other needs no more care."""
    return torch.cuda.Stream(device)


@functools.cache
def _pool(device: torch.device, stream: int) -> Any:
    with torch.cuda.device(device):
        return torch.cuda.MemPool()
