"""Taking turns, and putting things back, such that an interrupt anywhere leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from weakref import WeakSet


@contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Within it something is done that `undo` takes back, whatever happens and wherever Ctrl-C hits.

    An interrupt may also hit the undoing itself: it is then done once more, from its beginning.

    Args:
        undo: may be called at any time and any number of times, also before anything was done.
    """
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


class TurnLock:
    """A lock that no interrupt leaves locked, and that knows its thread. It cannot be taken twice."""

    def __init__(self) -> None:
        self._lock = RLock()  # only its owner can release it, so that releasing may be tried at any time
        self._owner: int | None = None
        _locks.add(self)

    def free_of_others(self) -> None:
        """In a forked process there is nobody who could give back what another thread held."""
        if not self.is_mine:
            self._lock, self._owner = RLock(), None

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds it."""
        return self._owner == get_ident()

    @contextmanager
    def held(self, wait: Callable[[], object] | None = None) -> Iterator[None]:
        """Within it, this thread holds the lock.

        Args:
            wait: called while the lock is another thread's, a few times a second; gives up by raising. None: nobody
                gives up.
        """
        try:  # as `undone` does it, without the cost of one more generator in every step of decoding
            try:
                while not self._lock.acquire(timeout=-1 if wait is None else 0.02):
                    if wait is not None:
                        wait()
                self._owner = get_ident()
                yield
            finally:
                self._release()
        finally:
            self._release()

    def _release(self) -> None:
        try:
            if self._owner == get_ident():
                self._owner = None
            self._lock.release()
        except RuntimeError:
            pass  # it is not this thread's


_locks: WeakSet[TurnLock] = WeakSet()


def _free_all() -> None:
    for lock in list(_locks):
        lock.free_of_others()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all)
