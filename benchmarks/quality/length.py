"""Needles among 4 to 4,096 pictures: where positions leave the trained window, how far V2PE and its rivals carry.

    python -m benchmarks.quality.length --images 4 16 64 256 1024
    python -m benchmarks.quality.length --images 4096 --positions 1 1/16 1/256 --caches "streamed 5 %"

Labelled pictures and facts stand at eight depths of a context, frames without a label between them. The context is read
in chunks; then every question goes on from a copy of the cache (next-turn). full: nothing is evicted. streamed: LOOK-M
behind every chunk, at a share of the tokens read so far.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.common import write_rows
from mminfer import V2PE, Engine, InferenceConfig, LookM
from mminfer.needle.labels import Labels
from mminfer.needle.runner import Asking, run
from mminfer.needle.scores import Answer
from mminfer.positions import DynamicNTK, LinearScaling
from mminfer.technique import CacheTechnique, PositionTechnique

CHUNK = 4096
DEPTHS = tuple(k / 7 for k in range(8))
DELTAS = ["1", *(f"1/{2**k}" for k in range(1, 9))]
POSITIONS = [*DELTAS, "linear", "ntk"]
CACHES: dict[str, CacheTechnique | None] = {
    "full": None,
    "streamed 20 %": LookM(0.1, 0.1, merge="average"),
    "streamed 5 %": LookM(0.025, 0.025, merge="average"),
}


def tokens_of(images: int) -> int:
    """Of a context: pictures with their marks, labels, facts."""
    return 66 * images + 3 * labelled(images) + 7 * len(depths_of(images)) + 30


def labelled(images: int) -> int:
    return len(depths_of(images)) * needles_of(images)


def depths_of(images: int) -> tuple[float, ...]:
    return DEPTHS if images >= 16 else DEPTHS[::2][:4]


def needles_of(images: int) -> int:
    """Labelled pictures at each depth."""
    return 1 if images < 16 else 2 if images < 64 else 4


def positions_of(name: str, images: int, window: int) -> PositionTechnique | None:
    """Frequencies are scaled for the whole context, as far as it leaves the window: pieces need a number."""
    tokens = tokens_of(images)
    if name == "linear":
        return LinearScaling(max(1.0, tokens / window))
    if name == "ntk":
        return DynamicNTK(length=tokens)
    above, _, below = name.partition("/")
    return V2PE(float(above) / float(below or 1))


def config_of(name: str, cache: str, images: int, window: int) -> InferenceConfig:
    """What a cell is measured with."""
    return InferenceConfig(positions_of(name, images, window), cache=CACHES[cache])


def row_of(answers: list[Answer], facts: dict[str, Any]) -> dict[str, Any]:
    hits: dict[str, list[bool]] = {}
    for answer in answers:
        for metric, right in answer.verdict.right.items():
            hits.setdefault(metric, []).append(right)
    every = [hit for of_metric in hits.values() for hit in of_metric]
    row = {**facts, "questions": len(every), "accuracy": round(100 * sum(every) / len(every), 1)}
    for metric, of_metric in hits.items():
        row[metric] = round(100 * sum(of_metric) / len(of_metric), 1)
    row["cache_kept"] = round(100 * answers[0].cache_bytes / answers[0].full_cache_bytes, 2)
    return row


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    plain = Engine.from_pretrained("nano")
    window = plain.adapter.spec.max_position_embeddings
    for images in args.images:
        protocol = Labels(needles=needles_of(images), depths=depths_of(images))
        samples = args.samples or (8 if images <= 16 else 4 if images <= 64 else 2 if images <= 256 else 1)
        for cache in args.caches:
            for name in args.positions:
                engine = Engine(plain.model, plain.processor, config_of(name, cache, images, window))
                start = time.perf_counter()
                asking = Asking(next_turn=True, max_new_tokens=2, prefill_chunk_size=CHUNK)
                answers = run({name: engine}, protocol, [images], samples, args.seed, asking)
                facts = {"positions": name, "cache": cache, "images": images, "tokens": tokens_of(images)}
                facts |= {"labelled": labelled(images), "contexts": samples, "seed": args.seed, "window": window}
                row = row_of(answers, facts)
                print(row, f"{time.perf_counter() - start:.0f} s", flush=True)
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--positions", nargs="+", default=POSITIONS, choices=POSITIONS)
    parser.add_argument("--caches", nargs="+", default=list(CACHES), choices=list(CACHES))
    parser.add_argument("--samples", type=int, help="contexts of a cell; default: fewer of long ones")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", default="length", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for row in rows(args):
        if args.out != "-":  # row by row: a long run may be stopped
            write_rows(args.out, [row], key=("positions", "cache", "images"))


if __name__ == "__main__":
    main()
