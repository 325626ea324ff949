"""One call at a time on one model, whichever engines share it; and no call that would wait for itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import get_ident
from weakref import WeakKeyDictionary, ref

from torch import nn

from mminfer.errors import InputError
from mminfer.forward.probe import evaluating
from mminfer.forward.turns import TurnLock, undone


class ModelLock:
    """The turns of a model's calls.

    Content that is being read may come from a caller's iterator, which may wait for whomever it likes: while it runs,
    nobody holds the lock. It is its own thread alone that may not ask the model meanwhile.

    Args:
        model: the host's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._turns = TurnLock()
        self._model = ref(model)
        self._readers: set[int] = set()  # threads

    def forget_others(self) -> None:
        """In a forked process there are no other threads, and new ones may get their numbers."""
        self._readers &= {get_ident()}

    def check(self) -> None:
        """Raises `InputError` if this thread asks a model from within a call of that model."""
        if get_ident() in self._readers:
            raise InputError(
                "content that is being read asks the model that reads it: make it before, or load the model once more"
            )
        if self._turns.is_mine:
            raise InputError(
                "a streamer, a logits processor or a hook asks the model that is calling it: wait until the answer is "
                "there, or load the model once more"
            )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it, this thread reads content for the model, whose turns it takes piece by piece."""
        self.check()
        thread = get_ident()
        with undone(lambda: self._readers.discard(thread)):
            self._readers.add(thread)
            yield

    @contextmanager
    def turn(self, wait: Callable[[], object] | None = None) -> Iterator[None]:
        """Within it the model is this thread's, and in eval mode; its modules' modes are put back.

        Args:
            wait: called now and then while others have their turn; gives up by raising.
        """
        with self._turns.held(wait):
            model = self._model()
            with nullcontext() if model is None else evaluating(model):
                yield


_locks: WeakKeyDictionary[nn.Module, ModelLock] = WeakKeyDictionary()


def lock_of(model: nn.Module) -> ModelLock:
    """The one lock of this model."""
    return _locks.setdefault(model, ModelLock(model))


def _forget_all() -> None:
    for lock in list(_locks.values()):
        lock.forget_others()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
