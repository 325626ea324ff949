"""One call at a time on one model, whichever engines share it."""

from __future__ import annotations

from threading import Lock, get_ident
from weakref import WeakKeyDictionary

from torch import nn

from mminfer.errors import InputError


class ModelLock:
    """A lock that refuses a thread that would wait for itself."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._owner == get_ident():
            raise InputError(
                "content that is being read asks the model that reads it: make it before, or load the model once more"
            )
        self._lock.acquire()
        self._owner = get_ident()

    def __exit__(self, *args: object) -> None:
        self._owner = None
        self._lock.release()


_locks: WeakKeyDictionary[nn.Module, ModelLock] = WeakKeyDictionary()


def lock_of(model: nn.Module) -> ModelLock:
    """The one lock of this model."""
    return _locks.setdefault(model, ModelLock())
