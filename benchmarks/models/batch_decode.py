"""Tokens per second of decoding: chats of different lengths in one batch against one by one.

The language model of LLaVA-OneVision-0.5B's geometry, weights random; only decoding steps are timed, not the prompts.
`python -m benchmarks.models.decode` runs it, so that both tables are of one commit.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.models.ways import Clock, Timed, Way, host_ways, in_turn, our_way


def prompts(model: Any, count: int) -> list[torch.Tensor]:
    """Text prompts of 60, 100, 140, ... tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size - 1000
    return [torch.randint(0, vocabulary, (60 + 40 * i,), generator=generator) for i in range(count)]


def steps_ms(model: Any, way: Way, rows: Sequence[torch.Tensor], tokens: int) -> float:
    """Milliseconds of all decoding steps of one call."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    clock, length = Clock(), {"max_new_tokens": tokens, "min_new_tokens": tokens}
    model.generate(input_ids=ids, attention_mask=mask, do_sample=False, streamer=clock, **length, **way.told)
    return sum(clock.token_ms)


def batch_rows(name: str, model: Any, batch: int, tokens: int, repeats: int, compile: bool) -> list[dict[str, Any]]:
    """The host's ways and ours, each in one batch and one by one; one row a way."""
    chats, ways = prompts(model, batch), [*host_ways(model, compile), our_way(model)]

    def call(way: Way) -> list[float]:
        return [steps_ms(model, way, chats, tokens), sum(steps_ms(model, way, [chat], tokens) for chat in chats)]

    timed = in_turn(ways, call, repeats)
    facts = {"model": name, "batch": batch, "new_tokens": tokens}
    return [facts | _row(way.name, timed[way.name], batch * (tokens - 1)) | {"repeats": repeats} for way in ways]


def _row(setting: str, timed: Timed, steps: int) -> dict[str, Any]:
    """Tokens per second in both forms, and how many times as many a batch makes; empty where it could not be timed."""
    rates = [1e3 * steps / median(timed.ms[form::2]) for form in (0, 1) if timed.ms]
    batched, single, ratio = [round(x, 2) for x in (*rates, rates[0] / rates[1])] if rates else ("", "", "")
    row = {
        "setting": setting, "batched_tokens_per_s": batched, "single_tokens_per_s": single, "ratio": ratio,
        "compile_ms": round(timed.compile_ms), "status": timed.status,
    }  # fmt: skip
    print(row, flush=True)
    return row
