"""Settings on many samples: what they lose by each protocol, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import mean

from mminfer.bench.fidelity import Continuation
from mminfer.bench.protocols import Protocol
from mminfer.calibration.bounds import likely, upper_bound
from mminfer.calibration.judging import Outcome, answer_of, outcome_of
from mminfer.calibration.progress import Progress
from mminfer.calibration.prompts import Prompt, prompt_of, turn_of
from mminfer.calibration.samples import Sample
from mminfer.calibration.store import Store
from mminfer.config import InferenceConfig
from mminfer.engine import Engine
from mminfer.errors import MminferError
from mminfer.forward.host_check import check_host

FEWEST = 2  # samples after which settings that lose far too much are given up


@dataclass(frozen=True)
class Trial:
    """Settings on some samples.

    Args:
        config: the settings.
        samples: those that were asked.
        outcomes: of each protocol, of each of these samples.
    """

    config: InferenceConfig
    samples: tuple[Sample, ...]
    outcomes: tuple[tuple[Outcome, ...], ...]

    @property
    def means(self) -> tuple[float, ...]:
        """Of each protocol, the mean loss."""
        return tuple(mean(losses) for losses in self.by_content)

    @property
    def kl(self) -> float:
        """The mean loss of the protocol by which it is largest."""
        return max(self.means)

    @property
    def likely(self) -> float:
        """One standard error above that."""
        return max(likely(losses) for losses in self.by_content)

    def bound(self, confidence: float, allowed: float) -> float:
        """What the mean loss is below, by every protocol, with this confidence; allowed: as of `upper_bound`."""
        return max(upper_bound(losses, confidence, allowed) for losses in self.by_content)

    @property
    def by_content(self) -> list[list[float]]:
        """Of each protocol the mean loss of every content: samples of one content are no independent ones."""
        contents = dict.fromkeys(sample.content for sample in self.samples)
        return [
            [mean(o.kl for o, s in zip(own, self.samples, strict=True) if s.content == c) for c in contents]
            for own in self.outcomes
        ]

    @property
    def flops(self) -> float:
        return mean(outcome.flops for outcome in self.outcomes[0])

    @property
    def cache_bytes(self) -> float:
        return mean(outcome.cache_bytes for outcome in self.outcomes[0])


class Bench:
    """Asks the model about samples under any settings; nothing is read, answered or measured twice.

    Args:
        engine: of the model.
        positions: settings that lose nothing: where tokens stand, as the user's engine has it.
        protocols: how context and question meet.
        tokens: of an answer at most.
        store: what was measured.
        progress: told of every prompt.
    """

    def __init__(
        self,
        engine: Engine,
        positions: InferenceConfig,
        protocols: Sequence[Protocol],
        tokens: int,
        store: Store,
        progress: Progress,
    ) -> None:
        self.engine, self.off, self.protocols = engine, positions, tuple(protocols)
        self.store, self.progress = store, progress
        self._tokens = tokens
        self._end_ids = engine.runner.settings({}).end_ids
        self._prepared: set[InferenceConfig] = set()
        self._known: dict[tuple[str, Protocol], tuple[Prompt, Continuation]] = {}

    def refer(self, samples: Sequence[Sample]) -> None:
        """Notes what the uncompressed model says about these samples.

        Raises:
            InputError: it answers nan, or a sample does not fit a protocol.
        """
        for sample in samples:
            for protocol in self.protocols:
                prompt = prompt_of(self.engine, sample, protocol)
                answer, outcome = answer_of(self.engine, self.off, prompt, self._tokens, self._end_ids)
                self._known[sample.digest, protocol] = prompt, answer
                self.store.note(self.off, _where(sample, protocol), outcome)
                self.progress.advance("reading")

    def known(self, sample: Sample, protocol: Protocol | None = None) -> tuple[Prompt, Continuation]:
        """A sample's prompt and the uncompressed model's answer; by the first protocol unless one is named."""
        return self._known[sample.digest, protocol or self.protocols[0]]

    def trial(
        self, config: InferenceConfig, samples: Sequence[Sample], limit: float | None = None, phase: str = "searching"
    ) -> Trial:
        """Settings on samples, all of them unless it is plain before that they lose more than the limit.

        Args:
            config: the settings.
            samples: to be asked, in order.
            limit: mean loss beyond which it does not matter how large it is; None: none.
            phase: of the progress.
        """
        self._prepare(config)
        found: list[list[Outcome]] = [[] for _ in self.protocols]
        for place, sample in enumerate(samples, 1):
            for own, protocol in zip(found, self.protocols, strict=True):
                own.append(self._outcome(config, sample, protocol))
                self.progress.advance(phase)
            if limit is not None and place >= FEWEST and max(mean(o.kl for o in own) for own in found) > limit:
                break
        return Trial(config, tuple(samples[:place]), tuple(map(tuple, found)))

    def _prepare(self, config: InferenceConfig) -> None:
        """Lets branches be found that layers are to leave out; settings that do not fit are refused when asked."""
        if config not in self._prepared:
            with suppress(MminferError), turn_of(self.engine):
                check_host(self.engine.adapter, config, verify=False)
            self._prepared.add(config)

    def _outcome(self, config: InferenceConfig, sample: Sample, protocol: Protocol) -> Outcome:
        prompt, answer = self._known[sample.digest, protocol]
        where = _where(sample, protocol)
        return self.store.outcome(config, where, lambda: outcome_of(self.engine, config, prompt, answer))


def _where(sample: Sample, protocol: Protocol) -> str:
    return f"{sample.digest} {protocol}"
