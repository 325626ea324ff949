"""Beside kvpress: what the same share of the cache is worth, and how fast it decodes, on the same weights and prompts.

    python -m benchmarks.peers.kvpress --install --images 8 16 --questions 150

The bundled model reads a context and compresses its cache; then every question is asked on a copy (next-turn). kvpress
runs in an environment and a process of its own, with its own transformers, and gets the same token ids and pixels; the
whole caches' logits must agree. Both compress the context alone, so that entries compare; a chat of mminfer compresses
its later turns as well. Decoding alternates between the two processes, one turn each.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import mminfer_kernels
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.common import quantiles, write_rows
from benchmarks.peers.exchange import KEY, MEASURED, WORKERS, PeerError, Worker, peer_python, row, sample_prompts, score
from benchmarks.peers.workers.wire import Prompt, save_prompts
from mminfer import Engine, InferenceConfig, LookM, patched
from mminfer.cache.random_evict import RandomEvict
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from mminfer.nano import checkpoint_path

PEER, PACKAGES = "kvpress", ["kvpress==0.5.5"]
OFF = InferenceConfig()
Row = dict[str, Any]


@dataclass(frozen=True)
class Held:
    """What a reading left in the cache.

    Args:
        tokens: of the context.
        entries: a head, mean over the layers.
        logits: [questions, answer tokens, vocabulary]; None where a turn was timed.
        read_ms: of the context.
        step_ms: of each greedy step.
    """

    tokens: int
    entries: float
    logits: Tensor | None = None
    read_ms: float = 0.0
    step_ms: list[float] = field(default_factory=list)


class System(Protocol):
    """One of the two sides; its first setting is the whole cache."""

    name: str
    versions: str
    settings: dict[str, Any]
    notes: dict[str, str]

    def answer(self, setting: str, prompt: int) -> Held:
        """Logits where the right answers to a prompt's questions are foretold."""
        ...

    def decode(self, setting: str, prompt: int, steps: int) -> Held:
        """Reads the context, asks its first question and times so many greedy steps."""
        ...


Setting = Callable[[int], InferenceConfig]  # of the tokens of a context


def _equal(share: float, technique: type[LookM], **settings: Any) -> Setting:
    """Exactly as many entries as kvpress keeps, text among the rest."""

    def config(tokens: int) -> InferenceConfig:
        budget = max(1, int(tokens * (1 - (1 - share))))  # as kvpress counts, its rounding included
        return InferenceConfig(cache=technique(budget=budget, text_prior=False, **settings))

    return config


def _settings(percent: int) -> dict[str, Setting]:
    share = percent / 100
    preset = InferenceConfig.from_preset(f"lookm-{percent}")
    average = InferenceConfig(cache=LookM(share / 2, share / 2, merge="average"))
    return {
        f"lookm-{percent}": lambda tokens: preset,
        f"lookm-{percent}-average": lambda tokens: average,
        f"lookm-{percent}-no-text-prior": _equal(share, LookM),
        f"lookm-{percent}-average-no-text-prior": _equal(share, LookM, merge="average"),
        f"random-evict-{percent}-no-text-prior": _equal(share, RandomEvict),
    }


def our_settings() -> dict[str, Setting]:
    """All of ours, by name."""
    return {"off": lambda tokens: OFF, **_settings(20), **_settings(5)}


class Ours:
    """mminfer on the exported prompts, by a patched model's own `forward`."""

    name = "mminfer"

    def __init__(self, model: Any, prompts: Sequence[Prompt]) -> None:
        self.versions, self._model, self._prompts = "", model, prompts
        self.settings = our_settings()
        self.notes = {f"lookm-{n}{rest}": "keeps all text" for n in (20, 5) for rest in ("", "-average")}

    def answer(self, setting: str, prompt: int) -> Held:
        asked, logits = self._prompts[prompt], []
        cache = self._read(setting, asked)
        with patched(self._model, OFF):
            for question, tokens in zip(asked.questions, asked.answers, strict=True):
                own = cache.clone()
                logits.append(torch.stack([self._forward(own, ids) for ids in (question, *([t] for t in tokens[:-1]))]))
        return Held(len(asked.input_ids), _entries(cache), torch.stack(logits))

    def decode(self, setting: str, prompt: int, steps: int) -> Held:
        mminfer_kernels.prepare("cpu")
        asked, step_ms = self._prompts[prompt], []
        start = time.perf_counter()
        cache = self._read(setting, asked)
        read_ms, entries = 1e3 * (time.perf_counter() - start), _entries(cache)
        with patched(self._model, OFF):
            token = int(self._forward(cache, asked.questions[0]).argmax())
            for _ in range(steps):
                start = time.perf_counter()
                token = int(self._forward(cache, [token]).argmax())
                step_ms.append(1e3 * (time.perf_counter() - start))
        return Held(len(asked.input_ids), entries, read_ms=read_ms, step_ms=step_ms)

    def _read(self, setting: str, asked: Prompt) -> CompressedCache:
        cache, ids = CompressedCache(), torch.tensor([asked.input_ids])
        with patched(self._model, self.settings[setting](len(asked.input_ids))):
            self._model(input_ids=ids, pixel_values=asked.pixel_values, logits_to_keep=1, **{CACHE_NAME: cache})
        return cache

    def _forward(self, cache: CompressedCache, ids: list[int]) -> Tensor:
        """Logits [vocabulary] behind these tokens."""
        return self._model(input_ids=torch.tensor([ids]), logits_to_keep=1, **{CACHE_NAME: cache}).logits[0, -1]


def _entries(cache: CompressedCache) -> float:
    lengths = [of_layer[0] for of_layer in cache.lengths]
    return sum(lengths) / len(lengths)


def _presses(percent: int) -> dict[str, tuple[str | None, dict[str, Any]]]:
    """Class and arguments; SnapKV also with a window below the budget: its default of 64 may be more than that."""
    removed = {"compression_ratio": 1 - percent / 100}
    return {
        f"SnapKVPress {percent} %": ("SnapKVPress", removed),
        f"SnapKVPress, window 16, {percent} %": ("SnapKVPress", {**removed, "window_size": 16}),
        f"ExpectedAttentionPress {percent} %": ("ExpectedAttentionPress", removed),
        f"KnormPress {percent} %": ("KnormPress", removed),
    }


class Theirs:
    """kvpress behind its worker.

    Args:
        worker: its process; None if there is none.
        folder: with the exported prompts; logits come back there.
        threads: of its libraries.
        missing: why there is no worker.
    """

    name = PEER

    def __init__(self, worker: Worker | None, folder: Path, threads: int, missing: str = "") -> None:
        self._worker, self._out, self._missing = worker, str(folder / "logits.safetensors"), missing
        self.settings = {"no press": (None, {}), **_presses(20), **_presses(5)}
        self.versions, self.notes = "", {}
        if worker is not None:
            versions = worker.ask("load", checkpoint=str(checkpoint_path()), prompts=str(folder), threads=threads)
            self.versions = ", ".join(f"{name} {version}" for name, version in versions.items())

    def answer(self, setting: str, prompt: int) -> Held:
        reply = self._ask("answer", setting, prompt=prompt, out=self._out)
        return Held(reply["tokens"], reply["entries"], load_file(self._out)["logits"])

    def decode(self, setting: str, prompt: int, steps: int) -> Held:
        return Held(**self._ask("decode", setting, prompt=prompt, steps=steps))

    def _ask(self, command: str, setting: str, **arguments: Any) -> dict[str, Any]:
        if self._worker is None:
            raise PeerError(self._missing)
        press, settings = self.settings[setting]
        return self._worker.ask(command, press=press, arguments=settings, **arguments)


def quality(
    systems: Sequence[System], prompts: Sequence[Prompt], numbers: Sequence[int], **facts: Any
) -> Iterator[Row]:
    """A row for each setting: accuracy and divergence over these prompts."""
    asked, reference = [prompts[n] for n in numbers], None
    for system in systems:
        full: list[Tensor] | None = None
        for setting in system.settings:
            named = _named("quality", system, setting, {"protocol": "next-turn", **facts})
            try:
                held = [system.answer(setting, n) for n in numbers]
            except PeerError as error:
                yield row(**named, status=str(error))
                continue
            logits = [h.logits for h in held]
            full = logits if full is None else full
            reference = full if reference is None else reference
            if setting == "no press":  # the same weights and prompts give the same logits
                apart = max((a - b).abs().max().item() for a, b in zip(logits, reference, strict=True))
                named["logits_differ"] = f"{apart:.1e}"
            yield row(**named, **score(asked, logits, full), **_sizes(held), status=MEASURED)


def _named(measure: str, system: System, setting: str, facts: dict[str, Any]) -> Row:
    own = {"system": system.name, "setting": setting, "versions": system.versions}
    return {"against": PEER, "model": "nano", "measure": measure, **own, "note": system.notes.get(setting, ""), **facts}


def _sizes(held: Sequence[Held]) -> dict[str, float]:
    tokens, entries = (sum(values) / len(held) for values in ((h.tokens for h in held), (h.entries for h in held)))
    return {"tokens": round(tokens), "entries": round(entries, 1), "cache_kept": round(100 * entries / tokens, 2)}


def decoding(systems: Sequence[System], prompt: int, steps: int, repeats: int, **facts: Any) -> Iterator[Row]:
    """A row for each setting: medians over all steps of turns that alternate between the systems."""
    ordered = [[(system, setting) for setting in system.settings] for system in systems]
    order = [turn for pair in zip_longest(*ordered) for turn in pair if turn is not None]
    found: dict[tuple[str, str], list[Held]] = defaultdict(list)
    failed: dict[tuple[str, str], str] = {}
    for system, setting in order * (repeats + 1):  # the first of each is a warm-up
        try:
            found[system.name, setting].append(system.decode(setting, prompt, steps))
        except PeerError as error:
            failed[system.name, setting] = str(error)
    for system, setting in order:
        named, held = _named("decode", system, setting, facts), found[system.name, setting][1:]
        if (system.name, setting) in failed:
            yield row(**named, status=failed[system.name, setting])
            continue
        times = quantiles([ms for h in held for ms in h.step_ms])
        named |= {name: round(ms, 3) for name, ms in times.items()}
        named |= {"read_ms": round(quantiles([h.read_ms for h in held])["median_ms"], 1), "turns": repeats}
        yield row(**named, **_sizes(held), status=MEASURED)


def compare(args: argparse.Namespace, folder: Path, stack: ExitStack) -> Iterator[Row]:
    """Rows of all that was asked for."""
    engine = Engine.from_pretrained("nano")
    by_length = {n: sample_prompts(engine.processor, n, args.questions, args.seed) for n in args.images}
    prompts = [p for group in by_length.values() for p in group]
    prompts += sample_prompts(engine.processor, args.decode_images, 1, args.seed)
    save_prompts(prompts, folder)
    try:
        python = peer_python(args.env, PACKAGES, args.install)
        worker = stack.enter_context(Worker(python, WORKERS / "kvpress_worker.py", args.threads))
        theirs = Theirs(worker, folder, args.threads)
    except PeerError as error:
        theirs = Theirs(None, folder, args.threads, missing=str(error))
    ours = Ours(engine.model, prompts)
    first = 0
    for num_images, group in by_length.items():
        numbers = range(first, first + len(group))
        yield from quality([ours, theirs], prompts, numbers, images=num_images, seed=args.seed)
        first += len(group)
    if args.repeats:
        facts = {"images": args.decode_images, "seed": args.seed}
        yield from decoding([ours, theirs], len(prompts) - 1, args.steps, args.repeats, **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[8, 16])
    parser.add_argument("--questions", type=int, default=150, help="least number in a cell")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--decode-images", type=int, default=64, help="pictures of the timed context")
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded in a turn")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each setting; 0 times nothing")
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    parser.add_argument("--env", type=Path, default=Path(".peers/kvpress"), help="the peer's own environment")
    parser.add_argument("--install", action="store_true", help="make that environment if it is not there")
    parser.add_argument("--out", default="peers", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for made in compare(args, Path(folder), stack):
            print({name: value for name, value in made.items() if value != ""}, flush=True)
            rows.append(made)
    if rows and args.out != "-":
        print(write_rows(args.out, rows, key=KEY))


if __name__ == "__main__":
    main()
