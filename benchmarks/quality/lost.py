"""Where a compressed cache loses what it loses: layer by layer and head by head, on the real language model.

    python -m benchmarks.quality.lost --seed 102 --books 4

A setting of `Replay` compresses the cache of a book as ever, and then the entries of some layer, or of one key/value
head, are what they were: what that brings back of the divergence was lost there. And the other way round: everything is
what it was but one layer. Budgets stay shared out as they are for the whole cache.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.common import show_rows
from benchmarks.quality.smol import loaded
from benchmarks.quality.smol_cells import MODELS, Reading, ask, refer
from benchmarks.reader.assembling import prepared
from benchmarks.reader.books import books
from mminfer import Engine, InferenceConfig, MminferError, Replay
from mminfer.bench.protocols import Protocol
from mminfer.technique import CacheEntries, ReplayedStretch

KEY = ("model", "setting", "seed", "what", "layer", "head")
FULL = Replay(ratio=1.0)


@dataclass(frozen=True)
class Partly(Replay, register=False):
    """`Replay` with some heads' entries left as they were.

    Args:
        whole: layer and head of those that stay whole.
    """

    whole: frozenset[tuple[int, int]] = frozenset()

    def compress_replayed(
        self,
        layers: Sequence[CacheEntries],
        replayed: Sequence[Sequence[ReplayedStretch]],
        tokens_seen: Sequence[int],
    ) -> list[CacheEntries]:
        compressed = super().compress_replayed(layers, replayed, tokens_seen)
        untouched = FULL.compress_replayed(layers, replayed, tokens_seen)
        return [
            CacheEntries.of_heads(
                [
                    (whole if (layer, head) in self.whole else kept).weighed()
                    for head, (whole, kept) in enumerate(zip(old.heads(), new.heads(), strict=True))
                ]
            )
            for layer, (old, new) in enumerate(zip(untouched, compressed, strict=True))
        ]


def told(plain: Engine, readings: Sequence[Reading], setting: Replay) -> dict[str, Any]:
    """Divergence, answers and entries under a setting."""
    engine = Engine(plain.model, plain.processor, InferenceConfig(cache=setting))
    said = [ask(engine, reading, Protocol.NEXT_TURN) for reading in readings]
    pairs = [(own, was) for one in said for own, was in zip(one.answers, one.reading.answers, strict=True)]
    return {
        "kl": round(mean(f.kl for one in said for f in one.long), 5),
        "full_right": sum(was.right for _, was in pairs),
        "stayed": sum(own.right and was.right for own, was in pairs),
        "entries": [list(layer) for layer in said[-1].stats.head_entries],
    }


def rows(plain: Engine, readings: Sequence[Reading], budget: int, heads_of: int) -> Iterator[dict[str, Any]]:
    """All compressed, then each layer restored and each compressed alone, then the heads of the layers that lost most.

    Args:
        plain: without techniques.
        readings: what is read and asked.
        budget: percent of the entries.
        heads_of: how many layers are taken apart by head.
    """
    spec = plain.adapter.spec
    every = {(layer, head) for layer in range(spec.num_layers) for head in range(spec.num_key_value_heads)}
    setting = Partly(ratio=budget / 100)
    asked = partial(told, plain, readings)
    all_compressed = asked(setting)
    entries = all_compressed["entries"]
    share = sum(map(sum, entries)) / len(every) / 100

    def row(what: str, layer: int | str, head: int | str, found: dict[str, Any]) -> dict[str, Any]:
        of_layers = entries if layer == "" else [entries[int(layer)]]
        own = [n for heads in of_layers for n in (heads if head == "" else [heads[int(head)]])]
        facts = {"setting": f"Replay {budget} %", "what": what, "layer": layer, "head": head}
        facts |= {"of_even_share": round(mean(own) / share)}
        return facts | {name: found[name] for name in ("kl", "full_right", "stayed")}

    yield row("all compressed", "", "", all_compressed)
    restored: dict[int, float] = {}
    for layer in range(spec.num_layers):
        own = frozenset(pair for pair in every if pair[0] == layer)
        found = asked(replace(setting, whole=own))
        restored[layer] = found["kl"]
        yield row("layer restored", layer, "", found)
        yield row("layer alone compressed", layer, "", asked(replace(setting, whole=frozenset(every - own))))
    for layer in sorted(restored, key=lambda n: restored[n])[:heads_of]:
        for head in range(spec.num_key_value_heads):
            found = asked(replace(setting, whole=frozenset({(layer, head)})))
            yield row("head restored", layer, head, found)


def run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    plain = loaded(prepared(args.cache))
    made = list(islice(books(300, args.seed, plain.processor.tokenizer), args.books))
    readings = [refer(plain, book, args.model, Protocol.NEXT_TURN).reading for book in made]
    facts = {"model": args.model, "seed": args.seed, "books": len(made)}
    for row in rows(plain, readings, args.budget, args.heads_of):
        show_rows(args.out, [facts | row], key=KEY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODELS[0], choices=MODELS, help="how pages go in")
    parser.add_argument("--budget", type=int, default=20, help="percent of all entries")
    parser.add_argument("--seed", type=int, default=102, help="of pages and questions")
    parser.add_argument("--books", type=int, default=4, help="how many are read")
    parser.add_argument("--heads-of", type=int, default=4, help="layers that are taken apart by head")
    parser.add_argument("--cache", type=Path, help="folder of the prepared model; default: in the user's cache folder")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", default="lost", help="name of the CSV file in benchmarks/results; '-' for none")
    try:
        run(parser.parse_args())
    except MminferError as error:
        sys.exit(f"lost: {error}")


if __name__ == "__main__":
    main()
