"""When rows of a batch were stopped by criteria of the caller's, which the host does not report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteria

# What the host looks for by type, and what ends a row at a token or all rows at once, needs no watching.
_UNWATCHED = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)


class RowEnds:
    """Watches stopping criteria during a call of the host's `generate`, of one row for each answer."""

    def __init__(self) -> None:
        self._columns: Tensor | None = None  # [rows] int64, columns at which each row was stopped; 0: it was not

    def watched(self, criteria: Iterable[Any]) -> tuple[Any, ...]:
        """The criteria, to be passed on in place of those given."""
        return tuple(one if isinstance(one, _UNWATCHED) else _Watched(one, self) for one in criteria)

    def note(self, done: Any, input_ids: Tensor) -> None:
        """Takes in what a criterion says of rows [rows, columns]; a row that it stopped stays stopped."""
        rows, columns = input_ids.shape
        if self._columns is None:
            self._columns = torch.zeros(rows, dtype=torch.int64, device=input_ids.device)
        stopped = torch.as_tensor(done, device=input_ids.device).bool().expand(rows)
        self._columns = self._columns.where((self._columns > 0) | ~stopped, columns)

    def columns(self) -> list[int] | None:
        """At which column each row was stopped, 0 where it was not; None: nothing was watched."""
        return None if self._columns is None else self._columns.tolist()


class _Watched(StoppingCriteria):
    """A criterion, and somebody who listens to it."""

    def __init__(self, criterion: Any, ends: RowEnds) -> None:
        self._criterion, self._ends = criterion, ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = self._criterion(input_ids, scores, **kwargs)
        self._ends.note(done, input_ids)
        return done

    def __getattr__(self, name: str) -> Any:  # the host asks criteria for the end token they know
        if name.startswith("__") or "_criterion" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._criterion, name)
