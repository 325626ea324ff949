"""From single parts to settings: greedy by gain for loss, the path bisected by what its settings lose together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mminfer.calibration.costs import CostModel
from mminfer.calibration.samples import Sample
from mminfer.calibration.sensitivity import FAR, Sensitivities
from mminfer.calibration.space import Choice, Option, Spared
from mminfer.calibration.trials import Bench, Trial

TRIES = 8  # parts that did not fit, before the search gives up
CAPS = (1.0, 0.2, 0.04)  # of the loss that is allowed, what a path is planned for
RUNGS, STEP = (
    12,
    0.92,
)  # settings that held-out samples are asked about at most, and of the cost of one, that of the next
BETTER = 0.8  # of the loss, at which another visual step is worth its place
LEAST_GAIN = 1e-4  # of the uncompressed model's cost
NOISE = 1e-3  # of the loss that a path is planned for: less counts as nothing
SEARCHING = "putting them together"


@dataclass(frozen=True)
class Found:
    """Settings that were tried on the tuning samples.

    Args:
        choice: what they are made of.
        trial: what they lose.
        cost: by the model, as a fraction of the uncompressed model's.
    """

    choice: Choice
    trial: Trial
    cost: float


class Search:
    """Looks for the cheapest settings whose loss is small enough on the tuning samples.

    Args:
        bench: whom to ask.
        tuning: the samples.
        parts: what is known of single parts.
        kl: the mean loss that is promised.
    """

    def __init__(self, bench: Bench, tuning: Sequence[Sample], parts: Sensitivities, kl: float) -> None:
        self._bench, self._tuning, self._parts, self._kl = bench, tuning, parts, kl
        self.tried: list[Found] = []

    @property
    def _model(self) -> CostModel:
        return self._parts.model

    def best(self, limit: float) -> Found:
        """The cheapest that loses less than the limit, one standard error added; that which changes nothing at last."""
        self.nothing()
        self._try_alone(limit)
        for cap in CAPS:  # a path that may go far takes other turns than one that may not
            self._bisect(self._path(Choice(), cap * limit), limit)
        self._bisect(self._path(self._cheapest(limit).choice, limit), limit)
        best = self._polished(self._cheapest(limit), limit)
        stepped = self._stepped(best)
        return best if stepped is best else self._polished(stepped, limit)

    def ladder(self, limit: float) -> list[Found]:
        """Ever cheaper settings of which ever larger losses are to be expected, for held-out samples to speak about.

        They are chosen before these are asked. Whoever goes up from the mildest one, and no further than to the first
        one that they speak against, needs no larger confidence for having looked more than once.
        """
        fit = sorted((f for f in self.tried if f.trial.likely <= limit), key=lambda found: (found.cost, found.trial.kl))
        front, least = list[Found](), math.inf
        for found in fit:  # nothing cheaper is expected to lose less
            if found.trial.likely < least:
                front.append(found)
                least = found.trial.likely
        rungs = list[Found]()
        for found in front:
            if found.cost >= STEP:
                break
            if not rungs or found.cost * STEP >= rungs[-1].cost:
                rungs.append(found)
        return rungs[:RUNGS][::-1]

    def _cheapest(self, limit: float) -> Found:
        """Of all that was tried."""
        fit = [found for found in self.tried if found.trial.likely <= limit]
        return min(fit, key=lambda found: found.cost, default=self.nothing())

    def nothing(self) -> Found:
        """That which changes nothing."""
        return self._measured(Choice())

    def alone_cost(self, option: Option) -> float:
        """Of an option by itself, by the model."""
        return Choice().with_option(option).cost(self._model)

    def _polished(self, best: Found, limit: float) -> Found:
        """One part more at a time, as long as some of those tried fit in what is left."""
        left, refused = TRIES, set[str]()
        while left:
            moves = self._scored(best.choice, limit)
            untried = [pair for pair in moves if pair[1].config(self._bench.off).to_json() not in refused]
            if not untried:
                break
            tried = self._measured(max(untried, key=lambda pair: pair[0])[1])
            if tried.trial.likely <= limit:
                best = min(best, tried, key=lambda found: found.cost)
            else:
                refused.add(tried.trial.config.to_json())
                left -= 1
        return best

    def _stepped(self, best: Found) -> Found:
        """The same with whichever visual step loses least, of those that the model was trained with."""
        for positions in self._parts.positions if best.choice.changes else ():
            tried = self._measured(replace(best.choice, positions=positions))
            if tried.trial.likely < BETTER * best.trial.likely:
                best = tried
        return best

    def _try_alone(self, limit: float) -> None:
        """Options that are good enough by themselves: all of them were tried."""
        for option in self._parts.options:
            choice = Choice().with_option(option)
            if choice.cost(self._model) < 1 and max(option.losses) <= limit:
                self._measured(choice)

    def _measured(self, choice: Choice) -> Found:
        trial = self._bench.trial(choice.config(self._bench.off), self._tuning, FAR * self._kl, SEARCHING)
        found = Found(choice, trial, choice.cost(self._model))
        if all(other.trial.config != trial.config for other in self.tried):
            self.tried.append(found)
        return found

    def _path(self, start: Choice, limit: float) -> list[Choice]:
        """Ever cheaper choices, each one part from the one before: whichever gains most for what it loses."""
        path = [start]
        while True:
            scored = self._scored(path[-1], limit)
            if not scored:
                return path
            path.append(max(scored, key=lambda pair: pair[0])[1])

    def _scored(self, here: Choice, limit: float) -> list[tuple[float, Choice]]:
        """What can be done next, each with its gain for what it loses."""
        protocols, scored = len(self._bench.protocols), []
        cost, loss = here.cost(self._model), here.loss(protocols)
        for other in self._moves(here):
            gain, lost = cost - other.cost(self._model), other.loss(protocols)
            if gain > LEAST_GAIN and lost <= FAR * limit:
                scored.append((gain / max(lost - loss, NOISE * limit), other))
        return scored

    def _moves(self, here: Choice) -> Iterator[Choice]:
        for option in self._parts.options:
            if here.options.get(option.technique.stage) is not option:
                yield here.with_option(option)
        taken = {(own.operator, own.layer) for own in here.spared}
        for spared in self._parts.spared:
            if (spared.operator, spared.layer) not in taken:
                yield here.with_spared(spared)

    def _bisect(self, path: Sequence[Choice], limit: float) -> None:
        """Tries how far along a path losses stay below the limit, if they grow along it."""
        low, high = 0, len(path)
        while high - low > 1:
            middle = (low + high) // 2
            if self._measured(path[middle]).trial.likely <= limit:
                low = middle
            else:
                high = middle


def strip(parts: Sequence[Spared]) -> dict[str, dict[int, float]]:
    """Of each operator, by layer, what leaving it out alone loses."""
    found: dict[str, dict[int, float]] = {}
    for part in parts:
        found.setdefault(part.operator, {})[part.layer] = max(part.losses)
    return found
