"""Time a decoded token: the unpatched host, everything off, compiled, and compressed caches, interleaved in one run.

    python -m benchmarks.models.decode --repeats 5

nano: from one token to the next in the host's own `generate`, unpatched and patched with everything off.
llava-onevision-0.5b: single steps over caches of random entries, of the host and of ours with everything off.
cache: the same over a long prompt's whole cache, 20 % and 5 % of it, in a model with as many key heads as query heads,
where the cache outweighs the weights; the speed-up is over the whole cache.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch._inductor.config
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from benchmarks.common import interleaved, quantiles, write_rows
from benchmarks.models.geometries import llava_onevision_05b, llava_onevision_mha, nano_prompt
from mminfer import InferenceConfig, patch, patched
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache, Continuation
from mminfer.forward.kv_layer import PaddedLayer
from mminfer.technique import CacheEntries

OFF = InferenceConfig()


class Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(1e3 * time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""

    @property
    def token_ms(self) -> list[float]:
        """From one token to the next; the prompt and the first token come before."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]


def generate_rows(name: str, model: Any, inputs: dict[str, Any], tokens: int, repeats: int, compile: bool) -> list[Any]:
    """The host, ours with everything off and, on demand, ours compiled, inside `generate`."""
    kwargs = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    settings = {"host": None, "off": False, **({"off, compiled": True} if compile else {})}
    times: dict[str, list[float]] = defaultdict(list)
    compile_ms: dict[str, float] = defaultdict(float)
    for repeat in range(repeats + 1):  # the first is a warm-up
        for setting, compiled in settings.items():
            clock, handle = Clock(), None if compiled is None else patch(model, OFF, compile=compiled)
            model.generate(**inputs, **kwargs, streamer=clock)
            if handle is not None:
                compile_ms[setting] += handle.compile_ms
                handle.undo()
            if repeat:
                times[setting] += clock.token_ms
    found = {setting: quantiles(values) for setting, values in times.items()}
    return [
        row(name, inputs["input_ids"].shape[1], setting, found[setting], found["host"], repeats, compile_ms[setting])
        for setting in settings
    ]


def random_cache(model: Any, entries: int, tokens: int) -> CompressedCache:
    """What a prompt of so many tokens would leave, with so many entries a head."""
    text = model.config.get_text_config()
    shape = (1, text.num_key_value_heads, entries, text.hidden_size // text.num_attention_heads)
    cache = CompressedCache()
    layers = [
        PaddedLayer([CacheEntries(torch.randn(shape), torch.randn(shape))], [tokens], cache)
        for _ in range(text.num_hidden_layers)
    ]
    end = torch.tensor([float(tokens)], dtype=torch.float64)
    cache.commit(layers, tokens, [tokens], Continuation.behind_text(end))
    return cache


def host_cache(model: Any, tokens: int) -> DynamicCache:
    """The host's own, as full."""
    cache, text = DynamicCache(config=model.config), model.config.get_text_config()
    shape = (1, text.num_key_value_heads, tokens, text.hidden_size // text.num_attention_heads)
    for layer in range(text.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def step_rows(name: str, model: Any, tokens: int, shares: dict[str, float], base: str, repeats: int) -> list[Any]:
    """Single steps in turn: the host over its own cache, ours over caches that hold these shares of the prompt."""
    ids = torch.tensor([[7]])

    def step(cache: Any, ours: bool) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            with patched(model, OFF) if ours else nullcontext():
                model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True)

        return run

    runs = {"host": step(host_cache(model, tokens), False)}
    runs |= {held: step(random_cache(model, round(share * tokens), tokens), True) for held, share in shares.items()}
    found = interleaved(runs, repeats)
    return [row(name, tokens, setting, found[setting], found[base], repeats) for setting in runs]


def row(
    model: str,
    tokens: int,
    setting: str,
    times: dict[str, float],
    base: dict[str, float],
    repeats: int,
    compile_ms: float = 0.0,
) -> dict[str, Any]:
    """One line of the results; the speed-up is over `base`."""
    out = {
        "model": model, "prompt_tokens": tokens, "setting": setting,
        **{key: round(times[key], 3) for key in ("p20_ms", "median_ms", "p80_ms")},
        "tokens_per_s": round(1e3 / times["median_ms"], 2), "speedup": round(base["median_ms"] / times["median_ms"], 3),
        "compile_ms": round(compile_ms), "repeats": repeats,
    }  # fmt: skip
    print(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano", "llava-onevision-0.5b", "cache"])
    parser.add_argument("--tokens", type=int, default=32_768, help="of the prompt behind the caches")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; one where others use the machine too")
    parser.add_argument("--compile", action="store_true", help="nano compiled too; the first use takes a minute or so")
    parser.add_argument("--out", default="decode", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    torch._inductor.config.force_disable_caches = True  # or a second run would compile in no time
    torch.set_num_threads(args.threads or torch.get_num_threads())
    rows = []
    if "nano" in args.models:
        model, inputs = nano_prompt(8)
        inputs = {k: v for k, v in inputs.items() if k not in ("logits_to_keep", "use_cache")}
        rows += generate_rows("nano", model, inputs, 64, args.repeats, args.compile)
    if "llava-onevision-0.5b" in args.models:
        rows += step_rows("llava-onevision-0.5b", llava_onevision_05b(), 1000, {"off": 1.0}, "host", 6 * args.repeats)
    if "cache" in args.models:
        shares = {"full cache": 1.0, "cache 20 %": 0.2, "cache 5 %": 0.05}
        model = llava_onevision_mha()
        rows += step_rows("8 layers, 16/16 heads", model, args.tokens, shares, "full cache", 3 * args.repeats)
    if args.out != "-":
        print(write_rows(args.out, rows, key=("model", "prompt_tokens", "setting")))


if __name__ == "__main__":
    main()
