"""Calibrations and what becomes of their promises on samples that nobody saw, beside every preset on the same samples.

    python -m benchmarks.quality.calibrated --models nano --targets flops latency cache --kl 0.01 0.05 0.2
    python -m benchmarks.quality.calibrated --models nano --targets flops --kl 0.05 --seeds 2 3 4 5 --no-presets
    python -m benchmarks.quality.calibrated --models SmolLM2 --samples 8 --held-out 0.5 --unseen 16

What is less work or time for the prompt is asked in-prompt, and what is fewer entries in the next turn. Of one model
and seed, a calibration goes on with what those before it measured.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import show_rows
from benchmarks.quality.calibrated_models import MODELS, Asked, Subject, subject_of
from mminfer import Calibration, Engine, InferenceConfig, MminferError, calibrate
from mminfer.bench.protocols import Protocol
from mminfer.calibration import Plan
from mminfer.calibration.beside import rival_presets
from mminfer.calibration.costs import Target
from mminfer.calibration.judging import timed_ratio
from mminfer.calibration.progress import Progress
from mminfer.calibration.samples import Sample, checked_samples
from mminfer.calibration.store import Store
from mminfer.calibration.trials import Bench
from mminfer.forward.native_build import prepare_kernels

KEY = ("model", "setting", "protocol", "seed")
UNSEEN_SEED = 7777
ANSWER = 6  # tokens, in which the right answer must stand
PROTOCOLS = {
    Target.FLOPS: Protocol.IN_PROMPT,
    Target.LATENCY: Protocol.IN_PROMPT,
    Target.CACHE: Protocol.NEXT_TURN,
}
OFF = InferenceConfig()


@dataclass(frozen=True)
class Judge:
    """Samples that no calibration saw, by one protocol.

    Args:
        subject: the model and what it is asked.
        asked: the samples.
        bench: which knows what the uncompressed model says about them.
        checked: the samples, as the bench takes them.
        full: how many the uncompressed model answers right.
    """

    subject: Subject
    asked: list[Asked]
    bench: Bench
    checked: list[Sample]
    full: int

    @classmethod
    def of(cls, subject: Subject, protocol: Protocol, count: int) -> "Judge":
        """Asks the uncompressed model."""
        asked = subject.samples(count, UNSEEN_SEED)
        prepare_kernels(subject.engine.device)
        bench = Bench(subject.engine, OFF, [protocol], subject.tokens, Store(None, {}), Progress(False, {}))
        checked = checked_samples(subject.engine, [own.chat for own in asked])
        bench.refer(checked)
        made = cls(subject, asked, bench, checked, 0)
        return replace(made, full=made.right(OFF))

    def right(self, config: InferenceConfig) -> int:
        """How many are answered right."""
        engine, found = Engine(self.subject.engine.model, self.subject.engine.processor, config), 0
        for own in self.asked:
            if own.is_right is not None:
                told = self._answer(engine, own.chat)
                found += own.is_right(told)
        return found

    def _answer(self, engine: Engine, chat: list[dict[str, Any]]) -> str:
        if self.bench.protocols[0] is Protocol.IN_PROMPT:
            return engine.generate(chat, max_new_tokens=ANSWER, do_sample=False).text
        *context, question = chat[-1]["content"]
        talk = engine.chat()
        talk.read(context)
        return talk.send(question["text"], max_new_tokens=ANSWER, do_sample=False).text

    def figures(self, config: InferenceConfig) -> dict[str, Any]:
        """What settings lose and cost here."""
        trial, off = self.bench.trial(config, self.checked), self.bench.trial(OFF, self.checked)
        usual = sorted(self.checked, key=lambda sample: self.bench.known(sample)[0].rows)[len(self.checked) // 2]
        prompt, engine = self.bench.known(usual)[0], self.bench.engine
        time = 1.0 if config == OFF else timed_ratio(engine, config, OFF, prompt, 2.0)
        knows = self.asked[0].is_right is not None
        return {
            "unseen": len(self.checked),
            "unseen_kl": f"{trial.kl:.5g}",
            "flops": round(100 * trial.flops / off.flops, 1),
            "time": round(100 * time, 1),
            "cache": round(100 * trial.cache_bytes / off.cache_bytes, 1),
            "right": self.right(config) if knows else "",
            "full_right": self.full if knows else "",
            "config": _plain(config).to_json(),
        }


def calibrated_row(judge: Judge, found: Calibration, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A calibration, and what becomes of its promise."""
    promise, figures = found.promise, judge.figures(_plain(found.config))
    told = {
        "kl": promise.kl,
        "held_out": promise.contents,
        "bound": f"{promise.bound:.5g}",
        "held_out_kl": f"{promise.held_out_kl:.5g}",
        "kept": int(float(figures["unseen_kl"]) <= promise.kl),
        "saves": int(found.saves),
        "calibration_s": found.facts["seconds"],
    }
    return {"setting": f"{found.target} {promise.kl:g}", "target": found.target, **facts, **told, **figures}


def preset_rows(judge: Judge, targets: list[Target], facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every preset that could have saved some of these targets."""
    spec = judge.subject.engine.adapter.spec
    presets = {"off": OFF}
    for target in targets:
        presets |= rival_presets(spec, target)
    told = dict.fromkeys(("kl", "held_out", "bound", "held_out_kl", "kept", "saves", "calibration_s"), "")
    for name, config in presets.items():
        yield {"setting": name, "target": "", **facts, **told, **judge.figures(config)}


def rows(subject: Subject, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of one model: calibrations seed by seed, then the presets."""
    by_protocol: dict[Protocol, list[Target]] = {}
    for target in map(Target, args.targets):
        by_protocol.setdefault(PROTOCOLS[target], []).append(target)
    for protocol, targets in by_protocol.items():
        judge = Judge.of(subject, protocol, args.unseen)
        facts = {"model": subject.name, "protocol": str(protocol)}
        for seed in args.seeds:
            chats = [own.chat for own in subject.samples(args.samples, seed)]
            with tempfile.TemporaryDirectory() as folder:
                state = Path(folder) / "state"
                plan = Plan((str(protocol),), subject.tokens, args.held_out, seed=seed, state=state, keep=True)
                for target in targets:
                    for kl in args.kl:
                        found = calibrate(subject.engine, chats, kl, target, sys.stderr.isatty(), plan)
                        yield calibrated_row(judge, found, facts | {"seed": seed, "samples": len(chats)})
        if not args.no_presets:
            yield from preset_rows(judge, targets, facts | {"seed": "", "samples": ""})


def _plain(config: InferenceConfig) -> InferenceConfig:
    """Without the model they are for, which other runs have none of."""
    return replace(config, calibrated_on=None)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    for name in args.models:
        for row in rows(subject_of(name, args.cache), args):
            show_rows(args.out, [row], key=KEY)  # row by row: a long run may be stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano"], choices=MODELS)
    parser.add_argument("--targets", nargs="+", default=list(Target), choices=list(Target))
    parser.add_argument("--kl", type=float, nargs="+", default=[0.01, 0.05, 0.2], help="loss that is allowed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of samples and their split")
    parser.add_argument("--samples", type=int, default=24, help="that a calibration has")
    parser.add_argument("--held-out", type=float, default=2 / 3, help="fraction of them")
    parser.add_argument("--unseen", type=int, default=32, help="samples that promises are held against")
    parser.add_argument("--no-presets", action="store_true", help="calibrations alone")
    parser.add_argument("--cache", type=Path, help="folder of the prepared real model; default: in the user's cache")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="calibrated", help="name of the CSV file in benchmarks/results; '-' for none")
    try:
        run(parser.parse_args())
    except MminferError as error:
        sys.exit(f"calibrated: {error}")


if __name__ == "__main__":
    main()
