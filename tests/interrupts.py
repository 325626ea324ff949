"""Ctrl-C at the n-th bytecode that our files run in this thread, by tracing."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PACKAGE = str(Path(__file__).parents[1] / "mminfer")


class Interrupter:
    """Counts the bytecodes of our files while something runs, and raises at one of them.

    Args:
        at: the number of the bytecode; None: none, so that they are counted only.
        files: which of the package's count, as parts of their paths; empty: all.

    Attributes:
        count: of the bytecodes so far.
    """

    def __init__(self, at: int | None = None, files: Sequence[str] = ()) -> None:
        self.at, self.count, self._files = at, 0, files

    def run(self, work: Callable[[], Any]) -> Any:
        """What the work gives."""
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            return work()
        finally:
            sys.settrace(before)

    def _called(self, frame: Any, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE) or (self._files and not any(part in file for part in self._files)):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._traced

    def _traced(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self._traced


def places(count: int, wanted: int) -> list[int]:
    """About so many bytecodes of that many, evenly spread, each count anew."""
    return sorted({1 + i * count // wanted for i in range(wanted)})
