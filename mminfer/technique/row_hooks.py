"""Rows that some modules of a host's layer see, and the others leave out: gathered and put back by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def only_rows(first: nn.Module, last: nn.Module, rows: Tensor) -> Iterator[None]:
    """Rows are gathered ahead of `first` and put back, among zeros, behind `last`.

    As hooks, so that the modules' own forward (quantised, sharded, hooked by others) stays as it is. Ours come first
    on the way in and last on the way out: whoever looks at the modules sees the rows they really compute. Another
    thread that runs the modules meanwhile sees nothing of it.
    """
    total, thread = 0, get_ident()

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal total
        if get_ident() != thread:
            return args
        total = args[0].shape[1]
        return (args[0].index_select(1, rows), *args[1:])

    def scatter(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if get_ident() != thread:
            return out
        return out.new_zeros(out.shape[0], total, *out.shape[2:]).index_copy_(1, rows, out)

    # The handles are there before the hooks, so that no interrupt leaves a hook that nobody could remove.
    handles = RemovableHandle(first._forward_pre_hooks), RemovableHandle(last._forward_hooks)
    try:
        try:
            first._forward_pre_hooks[handles[0].id] = gather
            first._forward_pre_hooks.move_to_end(handles[0].id, last=False)  # type: ignore[attr-defined]
            last._forward_hooks[handles[1].id] = scatter
            yield
        finally:
            _remove(handles)
    finally:  # once more, for an interrupt that came in between
        _remove(handles)


def _remove(handles: tuple[RemovableHandle, RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
