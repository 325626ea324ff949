"""Beside kvpress's KVzip: of the questions that a model answers right uncompressed, how many stay right.

    python -m benchmarks.peers.replay --install --models embeddings nano --questions 300

Books read by a real language model (the yardstick's, as embeddings or as pixels) and the bundled model's pictures are
taken in and compressed, at once (next-turn) or in chunks (streamed); then every question is asked. kvpress gets the
same token ids in a process of its own, and the whole caches' logits must agree. Its budgets by head are masks: every
entry is held, and a share of them is read; streamed, what was masked behind one chunk stays so. Time is the processor's
for compressing, as a share of the side's own prompt pass.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.common import write_rows
from benchmarks.peers.cases import MODELS, NANO, Case, Take, cases_of, exported, model_folder, plain_engine
from benchmarks.peers.exchange import KEY, MEASURED, WORKERS, PeerError, Worker, peer_python, row
from benchmarks.peers.kvpress import PACKAGES, PEER
from benchmarks.peers.workers.wire import save_prompts
from benchmarks.reader.books import PAGES
from mminfer import Engine, InferenceConfig, MminferError, Replay
from mminfer.bench import protocols
from mminfer.metrics.fidelity import kl_divergence
from mminfer.needle.scores import wilson

WINDOW = {"window_size": 16}  # below every budget: SnapKV's default of 64 may be more than that
TIMED = 8  # contexts of a cell whose prompt pass is timed alone as well
BUDGETS = (50, 30, 20, 10)  # percent of all entries
PROTOCOLS = NEXT_TURN, STREAMED = str(protocols.Protocol.NEXT_TURN), str(protocols.Protocol.STREAMED)
Row = dict[str, Any]


@dataclass(frozen=True)
class Told:
    """What a side says about one context.

    Args:
        said: token ids of each answer.
        logits: [answers, tokens, vocabulary], where the forced answers are foretold.
        tokens: of the context.
        entries: held a head, mean over layers and heads.
        masked: of these, how many nothing reads.
        pass_s: the processor's, of the prompt pass alone; 0: it was not timed.
        read_s: the processor's, of the prompt pass and compressing.
    """

    said: list[list[int]]
    logits: Tensor
    tokens: int
    entries: float
    masked: float
    pass_s: float
    read_s: float


class System(Protocol):
    """One of the two sides; its first setting is the whole cache."""

    name: str
    versions: str
    settings: dict[str, Any]

    def tell(self, setting: str, number: int, chunked: bool) -> Told:
        """About the context of this number, read at once or in chunks."""
        ...


def our_settings(budgets: Sequence[int]) -> dict[str, InferenceConfig]:
    """Replay, its fast form, and with nothing fitted, by name."""
    forms: dict[str, Callable[[float], Replay]] = {
        "Replay": Replay,
        "Replay, fast": lambda ratio: Replay(ratio, fast=True),
        "Replay, nothing fitted": lambda ratio: Replay(ratio, fit=0),
    }
    made = {f"{name} {n} %": InferenceConfig(cache=form(n / 100)) for name, form in forms.items() for n in budgets}
    return {"off": InferenceConfig(), **made}


class Ours:
    """mminfer, by the door of a chat.

    Args:
        engine: uncompressed.
        cases: contexts and questions.
        budgets: percent.
    """

    name, versions = "mminfer", ""

    def __init__(self, engine: Engine, cases: Sequence[Case], budgets: Sequence[int]) -> None:
        self._plain, self._cases, self.settings = engine, cases, our_settings(budgets)
        self._bytes: dict[int, int] = {}  # of whole caches, by number of context

    def tell(self, setting: str, number: int, chunked: bool) -> Told:
        case = self._cases[number]
        chunk = case.chunk if chunked else None
        engine = Engine(self._plain.model, self._plain.processor, self.settings[setting])
        pass_s = 0.0
        if number < TIMED or number not in self._bytes:
            before, pass_s = self._timed(self._plain, case, chunk)
            self._bytes[number] = before.cache.nbytes
        after, read_s = self._timed(engine, case, chunk)
        entries = after.tokens * after.cache.nbytes / self._bytes[number]
        return Told(after.said(case), after.foretold(case), after.tokens, entries, 0.0, pass_s, read_s)

    def _timed(self, engine: Engine, case: Case, chunk: int | None) -> tuple[Take, float]:
        start = time.process_time()
        return Take(engine, case.content, chunk), time.process_time() - start


def their_settings(budgets: Sequence[int]) -> dict[str, tuple[str | None, dict[str, Any]]]:
    """Class and arguments of kvpress's presses; a press within a press is a list of the two."""
    made: dict[str, tuple[str | None, dict[str, Any]]] = {"no press": (None, {})}
    for n in budgets:
        removed = {"compression_ratio": round(1 - n / 100, 2)}
        made |= {
            f"KVzipPress {n} %": ("KVzipPress", removed),
            f"KVzipPress, layerwise {n} %": ("KVzipPress", {**removed, "layerwise": True}),
            f"KVzipPress, KVzip+ {n} %": ("KVzipPress", {**removed, "kvzip_plus_normalization": True}),
            f"KVzipPress, chunks of 64 {n} %": ("KVzipPress", {**removed, "chunk_size": 64}),
            f"AdaKVPress of SnapKVPress {n} %": ("AdaKVPress", {"press": ["SnapKVPress", {**removed, **WINDOW}]}),
            f"AdaKVPress of ExpectedAttentionPress {n} %": (
                "AdaKVPress",
                {"press": ["ExpectedAttentionPress", removed]},
            ),
        }
    return made


class Theirs:
    """kvpress behind its worker.

    Args:
        worker: its process, or why there is none.
        cases: contexts and questions.
        budgets: percent.
        out: file in which logits come back.
    """

    name = PEER

    def __init__(self, worker: Worker | str, cases: Sequence[Case], budgets: Sequence[int], out: Path) -> None:
        self._worker, self._cases, self._out = worker, cases, str(out)
        self.settings, self.versions = their_settings(budgets), ""

    def load(self, checkpoint: Path, prompts: Path, threads: int, template: bool) -> None:
        """Has the worker load a model and the exported prompts; where it cannot, every row says so."""
        asked = {"checkpoint": str(checkpoint), "prompts": str(prompts), "threads": threads, "template": template}
        try:
            versions = self._ask("load", **asked)
        except PeerError as error:
            self._worker = str(error)
            return
        self.versions = ", ".join(f"{name} {version}" for name, version in versions.items())

    def tell(self, setting: str, number: int, chunked: bool) -> Told:
        press, arguments = self.settings[setting]
        case = self._cases[number]
        asked = {"prompt": number, "press": press, "arguments": arguments, "tokens": case.length}
        asked |= {"timed": number < TIMED}
        reply = self._ask("tell", **asked, chunks=case.chunks if chunked else [sum(case.chunks)], out=self._out)
        said = [case.until_end(tokens) for tokens in reply.pop("said")]
        return Told(said=said, logits=load_file(self._out)["logits"], **reply)

    def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        if isinstance(self._worker, str):
            raise PeerError(self._worker)
        return self._worker.ask(command, **arguments)


def kept(systems: Sequence[System], cases: Sequence[Case], chunked: bool, **facts: Any) -> Iterator[Row]:
    """A row for each setting of both sides over these contexts."""
    reference: list[Told] | None = None
    for system in systems:
        full: list[Told] | None = None
        for setting in system.settings:
            own = {"system": system.name, "setting": setting, "versions": system.versions}
            named = {"against": PEER, "measure": "kept", **own, **facts}
            try:
                told = [system.tell(setting, n, chunked) for n in range(len(cases))]
            except (PeerError, MminferError) as error:
                yield row(**named, status=str(error))
                continue
            full = told if full is None else full
            reference = full if reference is None else reference
            if system is not systems[0] and full is told:  # the same weights and prompts give the same logits
                apart = max((a.logits - b.logits).abs().max().item() for a, b in zip(told, reference, strict=True))
                named["logits_differ"] = f"{apart:.1e}"
            yield row(**named, **counts(cases, told, full), **sizes(told), status=MEASURED)


def counts(cases: Sequence[Case], told: Sequence[Told], full: Sequence[Told]) -> Row:
    """What stayed right of what was right, with its 95 % interval, and the divergence over forced answers."""
    right, was = ([hit for c, t in zip(cases, own, strict=True) for hit in c.judged(t.said)] for own in (told, full))
    stayed, full_right = sum(a and b for a, b in zip(right, was, strict=True)), sum(was)
    low, high = wilson(stayed, full_right) if full_right else (0.0, 1.0)
    divergence = [kl_divergence(f.logits, t.logits).flatten() for f, t in zip(full, told, strict=True)]
    figures = {"questions": len(right), "accuracy": _percent(sum(right), len(right)), "full_right": full_right}
    figures |= {"stayed": stayed, "kept": _percent(stayed, full_right)}
    figures |= {"kept_low": round(100 * low, 1), "kept_high": round(100 * high, 1)}
    return figures | {"kl": round(torch.cat(divergence).mean().item(), 4)}


def _percent(part: int, whole: int) -> float | str:
    return round(100 * part / whole, 1) if whole else ""


def sizes(told: Sequence[Told]) -> Row:
    """Entries held and entries read, and what compressing took beside the prompt pass (median over the contexts)."""
    tokens, entries, masked = (statistics.mean(getattr(t, x) for t in told) for x in ("tokens", "entries", "masked"))
    return {
        "tokens": round(tokens),
        "entries": round(entries, 1),
        "cache_kept": round(100 * entries / tokens, 2),
        "attended": round(100 * (entries - masked) / tokens, 2),
        "compress": round(statistics.median((t.read_s - t.pass_s) / t.pass_s for t in told if t.pass_s), 2),
    }


def compare(args: argparse.Namespace, model: str, images: int, folder: Path, worker: Worker | str) -> Iterator[Row]:
    """Rows of one model over contexts of so many images.

    Args:
        args: of the command line.
        model: one of `MODELS`.
        images: of a context.
        folder: for what is exchanged.
        worker: the peer's process, or why there is none.
    """
    plain = plain_engine(model, args.cache)
    cases = cases_of(plain, model, images, args.questions, args.seed)
    save_prompts([exported(plain, case) for case in cases], folder)
    theirs = Theirs(worker, cases, args.budgets, folder / "logits.safetensors")
    theirs.load(model_folder(model, args.cache), folder, args.threads, model == NANO)
    ours = Ours(plain, cases, args.budgets)
    for side in (ours, theirs):
        side.settings = chosen(side.settings, args.settings)
    for protocol in args.protocols:
        facts = {"model": model, "images": images, "protocol": protocol, "seed": args.seed}
        yield from kept((ours, theirs), cases, protocol == STREAMED, **facts)


def chosen(settings: dict[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """The whole cache, and the settings that go by one of these names, whatever their budget; None: all."""
    rules = None if names is None else {name.lower() for name in names}
    kept = (n for n in list(settings)[1:] if rules is None or n.rsplit(" ", 2)[0].lower() in rules)
    return {name: settings[name] for name in (next(iter(settings)), *kept)}


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--images", type=int, nargs="*", default=[8, 16], help="of the bundled model's contexts")
    parser.add_argument("--questions", type=int, default=300, help="least number in a cell")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="percent of the entries")
    parser.add_argument("--settings", nargs="+", help="of either side, without the budget, as 'Replay'; default: all")
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    parser.add_argument("--cache", type=Path, help="folder of the prepared real model; default: in the user's cache")
    parser.add_argument("--env", type=Path, default=Path(".peers/kvpress"), help="the peer's own environment")
    parser.add_argument("--install", action="store_true", help="make that environment if it is not there")
    parser.add_argument("--out", default="peers", help="name of the CSV in benchmarks/results; '-' for none")
    return parser


def run(args: argparse.Namespace) -> None:
    """Writes the rows of every model when they are made: a long run may be stopped."""
    torch.set_num_threads(args.threads)
    for model in args.models:
        for images in args.images if model == NANO else [PAGES]:
            with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
                try:
                    python = peer_python(args.env, PACKAGES, args.install)
                    script = WORKERS / "kvzip_worker.py"
                    worker: Worker | str = stack.enter_context(Worker(python, script, args.threads))
                except PeerError as error:
                    worker = str(error)
                for made in compare(args, model, images, Path(folder), worker):
                    print({name: value for name, value in made.items() if value != ""}, flush=True)
                    if args.out != "-":
                        write_rows(args.out, [made], key=KEY)


def main() -> None:
    args = parser().parse_args()
    try:
        run(args)
    except MminferError as error:
        sys.exit(f"replay: {error}")


if __name__ == "__main__":
    main()
