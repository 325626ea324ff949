"""Beside OpenVINO GenAI: time to the first token and per token, its visual-token pruning beside AIM, same weights.

    python -m benchmarks.peers.openvino --install --images 4 --repeats 5

OpenVINO runs in an environment and a process of its own. Each model goes through its steps there: export, loading,
generating; what does not pass is a row that says at which step and why. Models are the bundled one and a random
Qwen2-VL, made in the peer's environment, since nothing is downloaded. CDPruner removes a share of the visual tokens
before the language model; AIM merges as many away, then prunes inside. Turns alternate, one each; times are those that
each side reports of a whole call, pictures to preprocess included.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import quantiles, write_rows
from benchmarks.peers.exchange import KEY, MEASURED, WORKERS, PeerError, Worker, peer_python, row
from mminfer import Engine, InferenceConfig
from mminfer.nano import checkpoint_path

PEER = "openvino"
PACKAGES = ["openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "transformers==4.57.6", "pillow"]
OURS = {"off": 100, "aim-merge": 25, "aim": 25}  # percent of the visual tokens that enter the language model
THEIRS = {"off": 0, "CDPruner 75 %": 75}  # percent of the visual tokens that are removed
QUESTION = "What is in the pictures?"


@dataclass(frozen=True)
class Model:
    """A checkpoint that both sides are asked to load.

    Args:
        name: for the rows.
        folder: of the checkpoint; the worker makes it where there is none.
        picture_size: pixels of a side, such that neither side resizes.
    """

    name: str
    folder: Path
    picture_size: int


@dataclass(frozen=True)
class Turn:
    """One answer: tokens of the prompt that entered the language model, the text, and what it took."""

    tokens: int
    text: str
    ttft_ms: float
    tpot_ms: float


class Ours:
    """mminfer's engine."""

    name = "mminfer"
    settings = tuple(OURS)

    def __init__(self, model: Model, pictures: Tensor) -> None:
        self._engine = Engine.from_pretrained(str(model.folder))
        images = [{"type": "image", "image": Image.fromarray(picture.numpy())} for picture in pictures]
        self._messages = [{"role": "user", "content": [*images, {"type": "text", "text": QUESTION}]}]

    def turn(self, setting: str, tokens: int) -> Turn:
        engine = Engine(self._engine.model, self._engine.processor, InferenceConfig.from_preset(setting))
        out = engine.generate(self._messages, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return Turn(out.stats.layer_rows[0], out.text, out.stats.ttft_ms, out.stats.tpot_ms)


class Theirs:
    """OpenVINO's pipeline behind its worker, for one model.

    Raises:
        PeerError: the model does not pass a step.
    """

    name = PEER
    settings = tuple(THEIRS)

    def __init__(self, worker: Worker, model: Model, folder: Path, threads: int) -> None:
        self._worker, self._images = worker, str(folder / "images.safetensors")
        exported = str(folder / "exported")
        worker.ask("export", model=str(model.folder), out=exported)
        worker.ask("load", exported=exported, threads=threads)

    def turn(self, setting: str, tokens: int) -> Turn:
        asked = {"images": self._images, "prompt": QUESTION, "tokens": tokens, "pruning_ratio": THEIRS[setting]}
        return Turn(**self._worker.ask("generate", **asked))


def compare(model: Model, worker: Worker | None, missing: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one model: both sides in turn; ours alone where the peer does not load it."""
    facts = {"against": PEER, "model": model.name, "measure": "latency", "images": args.images}
    generator = torch.Generator().manual_seed(0)
    shape = (args.images, model.picture_size, model.picture_size, 3)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        save_file({"images": pictures}, Path(folder, "images.safetensors"))
        theirs, status = None, missing
        if worker is not None:
            try:
                theirs = Theirs(worker, model, Path(folder), args.threads)
            except PeerError as error:
                status = f"not loadable: {error}"
        if status:
            yield from (row(**facts, system=PEER, setting=setting, status=status) for setting in THEIRS)
        ours = [Ours(model, pictures)] if (model.folder / "config.json").exists() else []
        systems = [*ours, *([] if theirs is None else [theirs])]
        yield from _rows(_alternate(systems, args.tokens, args.repeats), facts, args.repeats)


def _alternate(systems: list[Any], tokens: int, repeats: int) -> dict[tuple[str, str], list[Turn] | PeerError]:
    """Turns of every system and setting; the first of each is a warm-up and left out."""
    found: dict[tuple[str, str], list[Turn] | PeerError] = {}
    turns: dict[tuple[str, str], list[Turn]] = defaultdict(list)
    for _ in range(repeats + 1):
        for system in systems:
            for setting in system.settings:
                try:
                    turns[system.name, setting].append(system.turn(setting, tokens))
                except PeerError as error:
                    found[system.name, setting] = error
    return {**{key: own[1:] for key, own in turns.items()}, **found}


def _rows(found: dict[tuple[str, str], list[Turn] | PeerError], facts: dict[str, Any], repeats: int) -> Iterator[Any]:
    plain = found.get((Ours.name, "off"))
    for (system, setting), turns in found.items():
        named = {**facts, "system": system, "setting": setting}
        if isinstance(turns, PeerError):
            yield row(**named, status=f"failed: {turns}")
            continue
        if system == PEER and setting == "off" and isinstance(plain, list):
            named["note"] = f"first {_common(turns[0].text, plain[0].text)} characters as mminfer's"
        times = {name: round(ms, 3) for name, ms in quantiles([turn.tpot_ms for turn in turns]).items()}
        ttft = round(quantiles([turn.ttft_ms for turn in turns])["median_ms"], 1)
        yield row(**named, **times, tokens=turns[0].tokens, ttft_ms=ttft, turns=repeats, status=MEASURED)


def _common(a: str, b: str) -> str:
    """How far two answers agree, a token being a character: "16 of 16"."""
    a, b = a.strip(), b.strip()
    same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"{same} of {max(len(a), len(b))}"


def all_rows(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of every model."""
    models = [Model("nano", checkpoint_path(), 32), Model("random qwen2_vl", folder / "qwen2_vl", 448)]
    try:
        python = peer_python(args.env, PACKAGES, args.install)
        with Worker(python, WORKERS / "openvino_worker.py", args.threads) as worker:
            versions = ", ".join(f"{name} {version}" for name, version in worker.ask("versions").items())
            worker.ask("make", folder=str(models[1].folder))
            for model in models:
                for made in compare(model, worker, "", args):
                    yield {**made, "versions": versions if made["system"] == PEER else ""}
    except PeerError as error:
        for model in models:
            yield from compare(model, None, str(error), args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="generated in a turn")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each setting")
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    parser.add_argument("--env", type=Path, default=Path(".peers/openvino"), help="the peer's own environment")
    parser.add_argument("--install", action="store_true", help="make that environment if it is not there")
    parser.add_argument("--out", default="peers", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for made in all_rows(args, Path(folder)):
            print({name: value for name, value in made.items() if value != ""}, flush=True)
            rows.append(made)
    if rows and args.out != "-":
        print(write_rows(args.out, rows, key=KEY))


if __name__ == "__main__":
    main()
