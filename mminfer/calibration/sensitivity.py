"""What each part does alone: every step of every family, and every operator of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

from mminfer.calibration.costs import CostModel, Target, counted, held, timed, timed_layers
from mminfer.calibration.judging import loss, timed_ratio
from mminfer.calibration.prompts import turn_of, with_answer
from mminfer.calibration.samples import Sample
from mminfer.calibration.space import Choice, Option, Spared, families, operators, visual_steps
from mminfer.calibration.trials import Bench, Trial
from mminfer.config import InferenceConfig
from mminfer.forward.resumed import KeptPass
from mminfer.operators.skip import OperatorSkip
from mminfer.technique import PositionTechnique, Stage, Technique

FAR = 4.0  # times the loss that is allowed: what loses more alone is no part of anything
SKIPPING, TRYING = "leaving operators out", "trying techniques"


@dataclass(frozen=True)
class Sensitivities:
    """What is known of single parts.

    Args:
        model: of what everything costs.
        options: those that lose little enough alone.
        spared: every operator of every layer.
        trials: of the options, and of those that lose too much.
        positions: other visual steps that the model was trained with.
    """

    model: CostModel
    options: tuple[Option, ...]
    spared: tuple[Spared, ...]
    trials: tuple[Trial, ...]
    positions: tuple[PositionTechnique, ...] = ()


class Sensing:
    """Tries single parts on samples.

    Args:
        bench: whom to ask; it knows the samples' answers.
        tuning: the samples.
        target: what is to become less.
        kl: the mean loss that is allowed.
    """

    def __init__(self, bench: Bench, tuning: Sequence[Sample], target: Target, kl: float) -> None:
        self._bench, self._tuning, self._target, self._kl = bench, tuning, target, kl
        self._spec = bench.engine.adapter.spec
        with turn_of(bench.engine):
            self._parts = operators(bench.engine.adapter, target)

    def run(self) -> Sensitivities:
        model = self._cost_model()
        spared = self._spared()
        trials, options = [], []
        found = families(self._spec, self._target)
        for stage in found:
            for family in found[stage]:
                for technique in family.steps:
                    trial = self._alone(technique)
                    trials.append(trial)
                    if trial.kl > FAR * self._kl:
                        break
                    options.append(self._option(technique, trial, model))
        self._bench.progress.end(TRYING)
        steps = visual_steps(self._spec, self._bench.off)
        return Sensitivities(model, tuple(options), tuple(spared), tuple(trials), steps)

    def expected(self) -> dict[str, float]:
        """How many prompts that is at most, by phase."""
        steps = sum(len(f.steps) for own in families(self._spec, self._target).values() for f in own)
        prompts = len(self._tuning) * len(self._bench.protocols)
        return {SKIPPING: len(self._parts) * len(self._tuning) / 2, TRYING: steps * prompts / 2}

    def _cost_model(self) -> CostModel:
        usual = self._usual()
        prompt, answer = self._bench.known(usual)
        if self._target is Target.FLOPS:
            return counted(self._spec, prompt)
        if self._target is Target.CACHE:
            return held(self._spec, prompt)

        def time_them() -> list[float]:
            kept = self._kept(usual, answer.token_ids)
            return timed_layers(self._bench.engine, kept, prompt)

        ms = self._bench.store.numbers("layers", time_them)
        off = self._bench.trial(self._bench.off, [usual], phase=TRYING)
        return timed(ms, self._spec, off.outcomes[0][0].prompt_ms)

    def _usual(self) -> Sample:
        """The sample of middle length."""
        ordered = sorted(self._tuning, key=lambda sample: self._bench.known(sample)[0].rows)
        return ordered[len(ordered) // 2]

    def _kept(self, sample: Sample, token_ids: Sequence[int]) -> KeptPass:
        stretch, engine = with_answer(self._bench.engine, sample, token_ids[:-1]), self._bench.engine
        with turn_of(engine):
            return KeptPass(engine.adapter, self._bench.off.positions, stretch.embeds, stretch.layout)

    def _spared(self) -> list[Spared]:
        """Each operator alone, from the rows that enter its layer anyway; the answer is forced in the same pass."""
        parts = self._parts
        losses: dict[tuple[str, int], list[float]] = {part: [] for part in parts}
        for sample in self._tuning if parts else ():
            found = self._bench.store.numbers(f"spared {sample.digest}", partial(self._losses, sample, parts))
            for part, own in zip(parts, found, strict=True):
                losses[part].append(own)
        self._bench.progress.end(SKIPPING)
        protocols = len(self._bench.protocols)
        return [Spared(name, layer, (mean(own),) * protocols) for (name, layer), own in losses.items()]

    def _losses(self, sample: Sample, parts: Sequence[tuple[str, int]]) -> list[float]:
        engine, answer = self._bench.engine, self._bench.known(sample)[1]
        kept, found, count = self._kept(sample, answer.token_ids), [], len(answer.token_ids)
        for name, layer in parts:
            with turn_of(engine):
                hidden = kept.behind(OperatorSkip(**{name: (layer,)}), layer)
                found.append(loss(answer.logits, engine.adapter.logits(hidden[-count:])))
            self._bench.progress.advance(SKIPPING, 1 - layer / self._spec.num_layers)
        return found

    def _alone(self, technique: Technique) -> Trial:
        config = self.config_of(technique)
        return self._bench.trial(config, self._tuning, FAR * self._kl, TRYING)

    def config_of(self, technique: Technique) -> InferenceConfig:
        """A technique alone."""
        return Choice({technique.stage: Option(technique, (), ())}).config(self._bench.off)

    def _option(self, technique: Technique, trial: Trial, model: CostModel) -> Option:
        off = self._bench.trial(self._bench.off, trial.samples, phase=TRYING)
        shares = []
        for layer in range(self._spec.num_layers):
            entered = []
            for sample, outcome in zip(trial.samples, trial.outcomes[0], strict=True):
                prompt = self._bench.known(sample)[0]
                entered.append((outcome.layer_rows[layer] - prompt.text) / max(prompt.visual, 1))
            shares.append(min(max(mean(entered), 0.0), 1.0))
        option = Option(technique, trial.means, tuple(shares))
        if technique.stage is Stage.CACHE:
            return Option(technique, trial.means, tuple(shares), trial.cache_bytes / off.cache_bytes)
        modelled = Choice({technique.stage: option}).cost(model)
        spent = max(0.0, self._found_cost(trial, off) - modelled)
        return Option(technique, trial.means, tuple(shares), spent=spent)

    def _found_cost(self, trial: Trial, off: Trial) -> float:
        if self._target is Target.CACHE:
            return trial.cache_bytes / off.cache_bytes
        if self._target is Target.FLOPS:
            return trial.flops / off.flops
        return self.time_of(trial.config)

    def time_of(self, config: InferenceConfig, share: float = 1.0) -> float:
        """Measured on the usual sample, in turn with the uncompressed model; share: as of `timed_ratio`."""
        prompt, bench = self._bench.known(self._usual())[0], self._bench

        def time_it() -> list[float]:
            return [timed_ratio(bench.engine, config, bench.off, prompt, share)]

        return bench.store.numbers(f"time {share} {config.to_json()}", time_it)[0]
