"""Tokens per second of decoding: eight chats of different lengths in one batch against one by one, interleaved.

    python -m benchmarks.models.batch_decode --tokens 24 --repeats 3

The language model of LLaVA-OneVision-0.5B's geometry, weights random; only decoding steps are timed, not the prompts.
"""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.common import write_rows
from benchmarks.models.geometries import llava_onevision_05b
from mminfer import InferenceConfig, patched


def prompts(model: Any, count: int) -> list[torch.Tensor]:
    """Text prompts of 60, 100, 140, ... tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size - 1000
    return [torch.randint(0, vocabulary, (60 + 40 * i,), generator=generator) for i in range(count)]


def step_seconds(model: Any, config: InferenceConfig, rows: list[torch.Tensor], tokens: int) -> float:
    """Seconds of all decoding steps of one call."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    with patched(model, config) as handle:
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        return sum(handle.step_ms) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="batch_decode", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    model, config = llava_onevision_05b(), InferenceConfig()
    rows = prompts(model, args.batch)
    together, alone = [], []
    step_seconds(model, config, rows, 3)  # warm-up
    for _ in range(args.repeats):
        together.append(step_seconds(model, config, rows, args.tokens))
        alone.append(sum(step_seconds(model, config, [row], args.tokens) for row in rows))
    steps = args.batch * (args.tokens - 1)
    batched, single = steps / statistics.median(together), steps / statistics.median(alone)
    row = {
        "model": "llava-onevision-0.5b", "batch": args.batch, "new_tokens": args.tokens, "repeats": args.repeats,
        "batched_tokens_per_s": round(batched, 2),
        "single_tokens_per_s": round(single, 2), "ratio": round(batched / single, 2),
    }  # fmt: skip
    print(row)
    if args.out != "-":
        print(write_rows(args.out, [row]))


if __name__ == "__main__":
    main()
