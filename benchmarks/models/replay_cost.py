"""What replaying costs: seconds of reading a context, beside those of the plain pass over the same rows.

    python -m benchmarks.models.replay_cost --repeats 7
    python -m benchmarks.models.replay_cost --model smol path/to/a/model --rows 288 1152

`smol` is the model of the yardstick. A context is pages of 64 embeddings, rows of the model's own table drawn by lot,
with a few words before each: no tower runs. All settings read in turn, back and forth, in one process. `extra` is what
a setting takes beyond the plain pass of the same round, as a share of that, in time of the process on the CPU.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import mminfer_kernels
import torch

from benchmarks.common import SEED, show_rows
from benchmarks.quality.smol import loaded
from benchmarks.reader.assembling import prepared
from mminfer import Engine, InferenceConfig, Replay

PAGE = 64  # embeddings, as many as a page of the yardstick and a picture of the bundled model have
PLAIN = "off"
SETTINGS = {
    PLAIN: None,
    "replay-50": Replay(0.5),
    "replay-30": Replay(0.3),
    "replay-20": Replay(0.2),
    "replay-30, fit=0": Replay(0.3, fit=0),
    "replay-fast-30": Replay(0.3, fast=True),
    "replay-fast-30, fit=0": Replay(0.3, fit=0, fast=True),
}
Seconds = dict[str, list[tuple[float, float]]]  # of each setting and round: on the CPU, and on the clock


def content_of(engine: Engine, rows: int) -> list[dict[str, Any]]:
    """Pages that fill so many rows, the words before them and the chat's own left out; the last page is the shorter."""
    table = engine.model.get_input_embeddings().weight.detach()
    drawn = torch.randint(len(table), (rows,), generator=torch.Generator().manual_seed(SEED))
    parts: list[dict[str, Any]] = []
    for number, ids in enumerate(drawn.split(PAGE), 1):
        parts.append({"type": "text", "text": f"Report {number}:"})
        parts.append({"type": "embedding", "embedding": table[ids.to(table.device)]})
    return parts


def timed(engines: Mapping[str, Engine], content: Sequence[dict[str, Any]], repeats: int) -> tuple[Seconds, int]:
    """Every engine reads the content into a new chat, in turn, every other round backwards; the first counts not.

    Returns:
        Seconds, and how many tokens were read.
    """
    mminfer_kernels.prepare("cpu")
    seconds: Seconds = {name: [] for name in engines}
    tokens = 0
    for turn in range(repeats + 1):
        for name, engine in list(engines.items())[:: -1 if turn % 2 else 1]:
            chat = engine.chat()
            cpu, wall = time.process_time(), time.perf_counter()
            chat.read(content)
            spent = time.process_time() - cpu, time.perf_counter() - wall
            tokens = chat.cache.tokens[0]
            if turn:
                seconds[name].append(spent)
    return seconds, tokens


def rows_of(model: str, tokens: int, seconds: Seconds) -> list[dict[str, Any]]:
    """One row a setting."""
    rows = []
    for setting, spent in seconds.items():
        shares = [own[0] / plain[0] - 1 for own, plain in zip(spent, seconds[PLAIN], strict=True)]
        fastest = min(cpu for cpu, _ in spent) / min(cpu for cpu, _ in seconds[PLAIN]) - 1
        row: dict[str, Any] = {"model": model, "tokens": tokens, "setting": setting}
        for name, values in zip(("cpu", "wall"), zip(*spent, strict=True), strict=True):
            row |= {f"{name}_s_min": round(min(values), 4), f"{name}_s_median": round(median(values), 4)}
        row |= {"extra_of_min": round(fastest, 3), "extra_median": round(median(shares), 3), "repeats": len(spent)}
        rows.append(row)
    return rows


def measure(plain: Engine, model: str, rows: int, repeats: int) -> list[dict[str, Any]]:
    """Every setting on one context."""
    engines = {n: Engine(plain.model, plain.processor, InferenceConfig(cache=c)) for n, c in SETTINGS.items()}
    seconds, tokens = timed(engines, content_of(plain, rows), repeats)
    return rows_of(model, tokens, seconds)


def opened(model: str, cache: Path | None) -> tuple[str, Engine]:
    """A name for the table, and the model."""
    if model == "smol":
        return model, loaded(prepared(cache))
    return Path(model).name, Engine.from_pretrained(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["nano"], help="nano, smol, or folders of models")
    parser.add_argument("--cache", type=Path, help="folder of the prepared model smol; default: the user's")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096], help="visual rows of a context")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="replay_cost", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for model in args.model:
        name, plain = opened(model, args.cache)
        for count in args.rows:
            rows = measure(plain, name, count, args.repeats)
            show_rows(args.out, rows, ("model", "tokens", "setting"))


if __name__ == "__main__":
    main()
