"""What reading in chunks costs over compressing once: the same budget, smaller and smaller chunks.

    python -m benchmarks.quality.streamed

A context of labelled pictures, frames and facts is read by the bundled model, at once or in chunks, and compressed
behind each. Then every question goes on from a copy of the cache. Compared are the logits of the answer with those of
the whole cache and of the cache compressed once.
"""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import write_rows
from benchmarks.quality.length import DEPTHS, tokens_of
from mminfer import V2PE, Engine, InferenceConfig, LookM
from mminfer.metrics.fidelity import kl_divergence
from mminfer.needle.labels import Labels
from mminfer.needle.protocol import Sample

SHARES = (0.5, 0.2, 0.1, 0.05)
CHUNKS = (None, 2048, 1024, 512, 256)
PROTOCOL = Labels(needles=4, depths=DEPTHS)


def config_of(share: float) -> InferenceConfig:
    """The cache kept at this share; 1: nothing is evicted."""
    cache = None if share == 1 else LookM(share / 2, share / 2, merge="average")
    return InferenceConfig(V2PE(1 / 256), cache=cache)


def answers(engine: Engine, sample: Sample, chunk: int | None) -> tuple[torch.Tensor, list[bool]]:
    """Logits [questions, vocabulary] of each answer's first token, and whether the answer is right."""
    chat = engine.chat(prefill_chunk_size=chunk, output_logits=True)
    chat.read(sample.content(True))
    logits, right = [], []
    for question in sample.questions:
        output = chat.fork().send(question.text, max_new_tokens=2)
        logits.append(output.logits[0])
        right.append(all(PROTOCOL.score(question, output.text).right.values()))
    return torch.stack(logits), right


def rows(images: int, contexts: int, seed: int) -> Iterator[dict[str, Any]]:
    plain = Engine.from_pretrained("nano")

    def engine(share: float) -> Engine:
        return Engine(plain.model, plain.processor, config_of(share))

    found: dict[tuple[float, int | None], list[dict[str, float]]] = {}
    for sample in tqdm(list(PROTOCOL.samples(images, contexts, seed)), "contexts"):
        full, right = answers(engine(1.0), sample, None)
        found.setdefault((1.0, None), []).append({"accuracy": statistics.mean(right), "kl_full": 0.0, "kl_once": 0.0})
        for share in SHARES:
            once = None
            for chunk in CHUNKS:
                logits, right = answers(engine(share), sample, chunk)
                once = logits if once is None else once
                agree = (logits.argmax(-1) == once.argmax(-1)).float().mean().item()
                cell = {"accuracy": statistics.mean(right), "agreement_once": agree}
                cell |= {"kl_full": kl_divergence(full, logits).mean().item()}
                cell |= {"kl_once": kl_divergence(once, logits).mean().item()}
                found.setdefault((share, chunk), []).append(cell)
    for (share, chunk), cells in found.items():
        facts = {"images": images, "tokens": tokens_of(images), "share": share, "chunk": chunk or "whole"}
        means = {name: statistics.mean(c.get(name, 1.0) for c in cells) for name in ("accuracy", "agreement_once")}
        means = {name: round(100 * value, 1) for name, value in means.items()}
        kl = {name: round(statistics.mean(c[name] for c in cells), 4) for name in ("kl_full", "kl_once")}
        yield {**facts, "contexts": contexts, "questions": contexts * len(sample.questions), "seed": seed} | means | kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", default="streamed", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    made = list(rows(args.images, args.contexts, args.seed))
    for row in made:
        print(row)
    if args.out != "-":
        print(write_rows(args.out, made))


if __name__ == "__main__":
    main()
