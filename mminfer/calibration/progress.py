"""How far a calibration is: prompts that were run, of those that are expected, and the time left."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from mminfer.inputs.progress import PROGRESS


class Progress:
    """A bar over all phases.

    Args:
        shown: whether there is one; on terminals alone.
        expected: prompts that each phase is expected to run.
    """

    def __init__(self, shown: bool, expected: dict[str, float]) -> None:
        self._left = dict(expected)
        own = PROGRESS if shown else PROGRESS | {"disable": True}
        self._bar: tqdm[Any] = tqdm(
            total=sum(expected.values()),
            desc="calibrating",
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left",
            **own,
        )

    def begin(self, phase: str, passes: float) -> None:
        """A phase begins, which will run so many prompts at most."""
        self._bar.total += passes - self._left.get(phase, 0.0)
        self._left[phase] = passes
        self._bar.set_description(phase)

    def advance(self, phase: str, passes: float = 1.0) -> None:
        """So many of them are done."""
        self._left[phase] = self._left.get(phase, 0.0) - passes
        if self._left[phase] < 0:
            self._bar.total -= self._left[phase]
            self._left[phase] = 0.0
        self._bar.update(passes)

    def end(self, phase: str) -> None:
        """What was left of it was not needed."""
        self._bar.total -= self._left.pop(phase, 0.0)

    def close(self) -> None:
        self._bar.close()
