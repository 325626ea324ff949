"""When the frames of a video are shown, and which of them to take."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

OFF = Fraction(1, 100)  # a header whose rate is farther from the time stamps' than this is not believed


@dataclass(frozen=True)
class Timeline:
    """The frames of a video in time.

    A video whose frames are not shown evenly is read as one of as many even steps: a step shows the frame that a player
    shows then, so that the host, who knows even steps alone, counts right times.

    Args:
        claimed: frames by the file's header, without those that an edit list leaves out; 0: it does not tell.
        rate: frames a second on the average, None where nothing tells it.
        times: the second in which each frame is shown, from 0 on, where that is not even; else empty.
        total: how many frames there are as far as can be told without decoding; 0: nobody knows.
        tick: the seconds by which a time may be off.
    """

    claimed: int
    rate: Fraction | None
    times: tuple[Fraction, ...] = ()
    total: int = 0
    tick: Fraction = Fraction(0)

    @classmethod
    def of(cls, claimed: int, rate: Fraction | None, stamps: Sequence[int], last: int, tick: Fraction) -> Timeline:
        """That of a file.

        Args:
            claimed: as above.
            rate: by the header.
            stamps: of all frames that are shown, in any order; empty: unknown.
            last: for how long the last frame is shown; 0: unknown.
            tick: seconds of a stamp's unit.
        """
        if len(stamps) < 2 or max(stamps) == min(stamps):
            return cls(claimed, rate, total=len(stamps) or claimed)
        ordered = sorted(stamps)
        first, steps = ordered[0], len(ordered) - 1
        mean = Fraction(ordered[-1] - first, steps)
        most_off = max(mean, Fraction(2))
        even = all(2 * abs(stamp - first - n * mean) <= most_off for n, stamp in enumerate(ordered))
        if even:
            rounded = Fraction(2, steps)  # both ends may be off by a tick
            believed = rate and abs(1 / (rate * tick) - mean) <= max(OFF * mean, rounded)
            return cls(claimed, rate if believed else 1 / (mean * tick), total=len(ordered))
        shown = ordered[-1] - first + (last or mean)
        times = tuple((stamp - first) * tick for stamp in ordered)
        return cls(claimed, len(ordered) / (shown * tick), times, len(ordered), tick)

    def cut_to(self, total: int) -> Timeline:
        """The same if no more than so many frames can be decoded."""
        if not self.times or total >= len(self.times):
            return self
        return replace(self, times=self.times[:total], total=total)

    def indices(self, count: int, total: int) -> list[int]:
        """The even steps at which `count` frames are taken of `total`, by the host's rule."""
        if self.times and self.rate and count >= total:  # all of them: the step in which each begins
            return [min(int((time + self.tick) * self.rate), total - 1) for time in self.times]
        return [k * total // count for k in range(count)]

    def chosen(self, count: int, total: int) -> list[int]:
        """The frames that are shown then."""
        steps = self.indices(count, total)
        if not self.times or not self.rate:
            return steps
        if count >= total:
            return list(range(len(self.times)))
        return [bisect_right(self.times, step / self.rate + self.tick) - 1 for step in steps]
