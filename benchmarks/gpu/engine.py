"""What a user waits for on a GPU: prompt passes and decoding steps of a 7B geometry, beside the host's own.

    python -m benchmarks.gpu.engine --out DIR

A prompt pass is timed by the wall, waited for at its end; once more under a profiler, that counts the time in which the
GPU was busy, launches and calls that wait. `first_ms` is the first call of this length, `next_length_ms` the first of
another one behind it. Decoding steps go over random entries, the whole cache's, also without CUDA graphs, and shares of
it; the host also with its static cache, compiled as its users do. Then the time to the first token of a model with a
real tower, in parts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import Qwen2Config
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.gpu.clock import counted, wall
from benchmarks.gpu.writing import Rows, in_words, part_parser
from benchmarks.models.caches import host_cache, random_cache
from benchmarks.models.geometries import behind_a_token_tower, llava_onevision_05b_engine, video_prompt
from benchmarks.models.ways import COMPILED, HOST, STATIC
from mminfer import Engine, InferenceConfig, patched
from mminfer.forward.graphed import SWITCH
from mminfer.forward.kv_cache import CACHE_NAME

COLUMNS = (
    "what", "tokens", "batch", "setting", "ms", "of_host", "gpu_ms", "launches", "waits", "to_host", "first_ms",
    "next_length_ms", "peak_mib", "text", "error",
)  # fmt: skip
PROMPT_SETTINGS = (HOST, "off", "aim", "lookm-20", "replay-20", "digest-20", "skip-ffn", "balanced", "regions")
LONG_SETTINGS = (HOST, "off", "aim", "replay-20")
NANO_SETTINGS = ("off", "v2pe-16", "aim", "lookm-20", "replay-20", "digest-20", "skip-ffn", "regions", "balanced")
ROOM = 256  # of a static cache, for the steps that are timed
FRAMES, NEXT_FRAMES, LONG_FRAMES = 32, 33, 160  # of 196 tokens
CACHE, BATCHES, SHARES = 32_768, (1, 8, 32), ((1.0, False), (0.2, False), (0.2, True), (0.05, False))

Run = Callable[[], Any]


def model_of(device: str, tiny: bool) -> Any:
    """LLaVA-OneVision-7B's language model, weights random, in bfloat16; or a small one."""
    sizes = (64, 96, 2, 4, 2, 160_000) if tiny else (3584, 18_944, 28, 28, 4, 152_064)
    hidden, inner, layers, heads, groups, words = sizes
    text = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=words, max_position_embeddings=65_536, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return behind_a_token_tower(text, image_token_id=151_646, video_token_id=151_647)
    finally:
        torch.set_default_dtype(before)


def prompt_of(model: Any, frames: int) -> dict[str, Any]:
    """A video of so many frames between text, on the model's device."""
    inputs = video_prompt(model, frames)
    features = inputs["mm_encoder_outputs"]["video"].pooler_output.to(model.device, model.dtype)
    encoded = {"video": BaseModelOutputWithPooling(pooler_output=features)}
    return {**inputs, "input_ids": inputs["input_ids"].to(model.device), "mm_encoder_outputs": encoded}


def under(model: Any, setting: str) -> AbstractContextManager[Any]:
    """The model as its host is, or patched with a preset."""
    return nullcontext() if setting == HOST else patched(model, InferenceConfig.from_preset(setting))


def measured(run: Run, device: str, repeats: int) -> dict[str, Any]:
    """Columns of a run."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    row: dict[str, Any] = wall(run, device, repeats).columns
    if device == "cuda":
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) >> 20
        row |= counted(run, device).columns
    return row


def prompt_passes(model: Any, device: str, tiny: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """The passes of a prompt, and of another length behind it."""
    lengths = ((2, 3, PROMPT_SETTINGS),) if tiny else ((FRAMES, NEXT_FRAMES, PROMPT_SETTINGS),)
    lengths += () if tiny else ((LONG_FRAMES, LONG_FRAMES + 1, LONG_SETTINGS),)
    for frames, other, settings in lengths:
        inputs, longer, host_ms = prompt_of(model, frames), prompt_of(model, other), None
        for setting in settings:
            row = {"what": "prompt", "tokens": inputs["input_ids"].shape[1], "batch": 1, "setting": setting}
            try:
                with under(model, setting):
                    row |= measured(partial(model, **inputs), device, repeats)
                    row["next_length_ms"] = wall(partial(model, **longer), device, 1).columns["first_ms"]
            except Exception as error:  # the next setting may do
                yield row | {"error": in_words(error)}
                continue
            host_ms = row["ms"] if setting == HOST else host_ms
            yield row | ({} if host_ms is None else {"of_host": round(row["ms"] / host_ms, 3)})


def decoding(model: Any, device: str, tiny: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """Single steps over full and compressed caches, and the host's own, static and compiled too."""
    tokens = 64 if tiny else CACHE
    for batch in (1, 2) if tiny else BATCHES:
        host_ms = None
        for setting, (around, step) in steps(model, batch, tokens).items():
            row = {"what": "decode", "tokens": tokens, "batch": batch, "setting": setting}
            try:
                with around():
                    row |= measured(step(), device, 3 * repeats)
            except Exception as error:  # out of memory, or nothing to compile with
                yield row | {"error": in_words(error)}
                continue
            host_ms = row["ms"] if setting == HOST else host_ms
            yield row | ({} if host_ms is None else {"of_host": round(row["ms"] / host_ms, 3)})


@contextmanager
def ours(model: Any, graphs: bool = True) -> Iterator[None]:
    """The model patched with everything off; graphs: whether steps may be recorded."""
    with mock.patch.dict(os.environ, {SWITCH: str(int(graphs))}), patched(model, InferenceConfig(), verify=False):
        yield


def steps(
    model: Any, batch: int, tokens: int
) -> dict[str, tuple[Callable[[], AbstractContextManager[None]], Callable[[], Run]]]:
    """What is put around the model, and what makes the step, with its cache, of every setting by name."""
    ids = torch.full((batch, 1), 7, device=model.device)

    def step(cache: Callable[[], Any], compiled: bool = False) -> Callable[[], Run]:
        def made() -> Run:
            own = {"input_ids": ids, CACHE_NAME: cache(), "use_cache": True}
            mode = "reduce-overhead" if ids.is_cuda else "default"
            forward = torch.compile(model.forward, mode=mode) if compiled else model
            return partial(forward, **own)

        return made

    found = {
        HOST: (nullcontext, step(lambda: host_cache(model, tokens, batch=batch))),
        STATIC: (nullcontext, step(lambda: host_cache(model, tokens, ROOM, batch))),
        COMPILED: (nullcontext, step(lambda: host_cache(model, tokens, ROOM, batch), True)),
    }
    for share, differing in SHARES:
        entries, heads = round(share * tokens), ", heads differ" if differing else ""
        made = step(lambda n=entries, differing=differing: random_cache(model, n, tokens, batch, differing))
        found[f"ours, {100 * share:g} %{heads}"] = (partial(ours, model), made)
        if share == 1.0:
            found["ours, 100 %, no graphs"] = (partial(ours, model, graphs=False), made)
    return found


def first_tokens(device: str, tiny: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """The time to the first token over pictures: a 0.5B geometry with a tower of its own; tiny: nano."""
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 255, (384, 384, 3), dtype=np.uint8) for _ in range(1 if tiny else 8)]
    content = [{"type": "image", "image": picture} for picture in pictures]
    message = [{"role": "user", "content": [*content, {"type": "text", "text": "What is there?"}]}]
    made = Engine.from_pretrained("nano") if tiny else llava_onevision_05b_engine(InferenceConfig())
    made.model.to(device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    for setting in ("off", "aim", "replay-20"):
        engine = Engine(made.model, made.processor, InferenceConfig.from_preset(setting))
        row: dict[str, Any] = {"what": "first token", "batch": 1, "setting": setting}
        try:
            row |= wall(lambda e=engine: e.generate(message, max_new_tokens=1), device, repeats).columns
            stats = engine.generate(message, max_new_tokens=2).stats
        except Exception as error:  # the next setting may do
            yield row | {"error": in_words(error)}
            continue
        yield row | {"tokens": stats.prompt_tokens, "text": str(stats)[:400]}


def nano_answers(device: str, tiny: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """The bundled model answers on the device what it answers on the CPU, in float32 and bfloat16."""
    from mminfer.nano import sample_messages

    dtypes = (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16)
    for setting in NANO_SETTINGS[: 2 if tiny else None]:
        config = InferenceConfig.from_preset(setting)
        wanted = Engine.from_pretrained("nano", config).generate(sample_messages(), max_new_tokens=8).text
        for dtype in dtypes:
            row: dict[str, Any] = {"what": f"nano, {str(dtype)[6:]}", "batch": 1, "setting": setting}
            try:
                engine = Engine.from_pretrained("nano", config)
                engine.model.to(device=device, dtype=dtype)
                found = engine.generate(sample_messages(), max_new_tokens=8).text
            except Exception as error:  # the next setting may do
                yield row | {"error": in_words(error)}
                continue
            yield row | {"text": found, "error": "" if found == wanted else f"on the CPU {wanted}"}


@torch.no_grad()
def main() -> None:
    parser = part_parser(__doc__, seconds=240)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    out, until = Rows(args.out / "engine.csv", COLUMNS, args.device), time.monotonic() + args.seconds
    model = model_of(args.device, args.tiny)
    sources = (
        prompt_passes(model, args.device, args.tiny, args.repeats),
        decoding(model, args.device, args.tiny, args.repeats),
        nano_answers(args.device, args.tiny, args.repeats),
        first_tokens(args.device, args.tiny, args.repeats),
    )
    for source in sources:
        for row in source:
            out.add(row)
            if time.monotonic() > until:
                return


if __name__ == "__main__":
    main()
