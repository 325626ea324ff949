"""Time a decoded token: the unpatched host in three ways, everything off, compiled, and compressed caches, in turn.

    python -m benchmarks.models.decode --compile

nano: from one token to the next in the host's own `generate`, unpatched and patched with everything off.
llava-onevision-0.5b: single steps over caches of random entries, of the host and of ours with everything off.
cache: the same over a long prompt's whole cache, 20 % and 5 % of it, in a model with as many key heads as query heads,
where the cache outweighs the weights; the speed-up is over the whole cache.
batch: eight chats of different lengths in one batch against one by one, rows of their own (`batch_decode`).
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config

from benchmarks.common import write_rows
from benchmarks.models.batch_decode import batch_rows
from benchmarks.models.caches import host_cache, random_cache
from benchmarks.models.geometries import llava_onevision_05b, llava_onevision_mha, nano_prompt
from benchmarks.models.ways import HOST, Clock, Timed, Way, host_ways, in_turn, our_way
from mminfer.forward.kv_cache import CACHE_NAME

MODELS = ("nano", "llava-onevision-0.5b", "cache", "batch")


def generate_rows(name: str, model: Any, inputs: dict[str, Any], tokens: int, repeats: int, compile: bool) -> list[Any]:
    """The host's ways and ours with everything off, inside `generate`; compiled on demand."""
    kwargs = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    ways = [*host_ways(model, compile), our_way(model)]
    ways += [our_way(model, "off, compiled", compile=True)] if compile else []

    def call(way: Way) -> list[float]:
        clock = Clock()
        model.generate(**inputs, **kwargs, **way.told, streamer=clock)
        return clock.token_ms

    return rows_of(name, inputs["input_ids"].shape[1], in_turn(ways, call, repeats), HOST, repeats)


def step_rows(
    name: str, model: Any, tokens: int, shares: dict[str, float], repeats: int, compile: bool
) -> list[dict[str, Any]]:
    """Single steps in turn: the host over its own caches, ours over caches that hold these shares of the prompt.

    The speed-up is over the host, or over our whole cache where there are several.
    """
    hosts, ours = host_ways(model, compile), [our_way(model, held) for held in shares]
    growing, static = host_cache(model, tokens), host_cache(model, tokens, room=2 * repeats + 8)
    caches = {way.name: static if way.told else growing for way in hosts}
    caches |= {held: random_cache(model, round(share * tokens), tokens) for held, share in shares.items()}
    ids = torch.tensor([[7]])

    @torch.no_grad()
    def call(way: Way) -> list[float]:
        start = time.perf_counter()
        model(input_ids=ids, **{CACHE_NAME: caches[way.name]}, use_cache=True)
        return [1e3 * (time.perf_counter() - start)]

    base = HOST if len(shares) == 1 else next(iter(shares))
    return rows_of(name, tokens, in_turn([*hosts, *ours], call, repeats), base, repeats)


def rows_of(model: str, tokens: int, found: dict[str, Timed], base: str, repeats: int) -> list[dict[str, Any]]:
    """One line of the results a way; the speed-up is over `base`."""
    rows = []
    for setting, timed in found.items():
        middle, of_base = (one.columns["median_ms"] for one in (timed, found[base]))
        rates = [round(1e3 / middle, 2), round(of_base / middle, 3)] if timed.ms else ["", ""]
        rows.append({
            "model": model, "prompt_tokens": tokens, "setting": setting, **timed.columns, "tokens_per_s": rates[0],
            "speedup": rates[1], "compile_ms": round(timed.compile_ms), "status": timed.status, "repeats": repeats,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def measure(models: Sequence[str], tokens: int, repeats: int, compile: bool) -> list[dict[str, Any]]:
    """Of one chat."""
    rows = []
    if "nano" in models:
        model, inputs = nano_prompt(8)
        inputs = {k: v for k, v in inputs.items() if k not in ("logits_to_keep", "use_cache")}
        rows += generate_rows("nano", model, inputs, 64, repeats, compile)
    if "llava-onevision-0.5b" in models:
        model = llava_onevision_05b()
        rows += step_rows("llava-onevision-0.5b", model, 1000, {"off": 1.0}, 6 * repeats, compile)
    if "cache" in models:
        shares = {"full cache": 1.0, "cache 20 %": 0.2, "cache 5 %": 0.05}
        rows += step_rows("8 layers, 16/16 heads", llava_onevision_mha(), tokens, shares, 3 * repeats, compile)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tokens", type=int, default=32_768, help="of the prompt behind the caches")
    parser.add_argument("--batch", type=int, default=8, help="chats")
    parser.add_argument("--batch-tokens", type=int, default=24, help="decoded for each chat of the batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; one where others use the machine too")
    parser.add_argument("--compile", action="store_true", help="host and nano compiled too, which takes a minute each")
    parser.add_argument("--out", default="decode", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    torch._inductor.config.force_disable_caches = True  # or a second run would compile in no time
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or it would go on uncompiled and say nothing
    torch.set_num_threads(args.threads or torch.get_num_threads())
    rows = measure(args.models, args.tokens, args.repeats, args.compile)
    if rows and args.out != "-":
        print(write_rows(args.out, rows, key=("model", "prompt_tokens", "setting")))
    if "batch" in args.models:
        model, name = llava_onevision_05b(), "llava-onevision-0.5b"
        rows = batch_rows(name, model, args.batch, args.batch_tokens, -(-args.repeats // 2), args.compile)
        if args.out != "-":
            print(write_rows(f"batch_{args.out}", rows))


if __name__ == "__main__":
    main()
