"""Time and memory of prompts that no memory would hold whole: pieces in, a cache of fixed size.

    python -m benchmarks.models.long_context                     # the bundled model, up to a million visual tokens
    python -m benchmarks.models.long_context --model 0.5b        # LLaVA-OneVision-0.5B's geometry, 32,850

Every run is a process of its own, so that its peak memory is its own. nano runs as `mminfer generate --frames`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mminfer_kernels

from benchmarks.common import write_rows
from mminfer import V2PE, InferenceConfig, LookM

PER_PICTURE = {"nano": 64, "0.5b": 730}  # visual tokens
BUNDLED = 8  # labelled pictures
SETTINGS = {"nano": (8192, 2048), "0.5b": (4096, 2200)}  # budget and chunk
TOKENS = {"nano": [65_536, 262_144, 1_048_576], "0.5b": [8_030, 32_850]}


def config_of(model: str) -> InferenceConfig:
    return InferenceConfig(V2PE(1 / 256), cache=LookM(budget=SETTINGS[model][0]))


def run(model: str, tokens: int) -> dict[str, Any]:
    """One run in a process of its own."""
    pictures, (budget, chunk) = tokens // PER_PICTURE[model], SETTINGS[model]
    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder) / "config.json", Path(folder) / "out.json"
        config.write_text(config_of(model).to_json())
        if model == "nano":
            entry = str(Path(sys.executable).parent / "mminfer")
            command = [entry, "generate", "--json", "--frames", str(pictures - BUNDLED)]
            command += ["--config", str(config), "--prefill-chunk-size", str(chunk), "--max-new-tokens", "2"]
        else:
            command = ["-m", "benchmarks.models.long_context", "--model", model, "--child", str(pictures)]
        mminfer_kernels.prepare("cpu")  # the other process finds them built
        start = time.perf_counter()
        process = os.posix_spawn(
            sys.executable,
            [sys.executable, *command],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, str(out), os.O_WRONLY | os.O_CREAT, 0o600)],
        )
        _, status, usage = os.wait4(process, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"{' '.join(command)} ended with {status}")
        stats = json.loads(out.read_text())["stats"]
    reading_s = stats["ttft_ms"] / 1e3
    return {
        "model": model,
        "visual_tokens": stats["visual_tokens"],
        "prompt_tokens": stats["prompt_tokens"],
        "budget": budget,
        "chunk": chunk,
        "entries": max(stats["layer_entries"]),
        "cache_mib": round(stats["cache_bytes"] / 2**20, 1),
        "full_cache_mib": round(stats["full_cache_bytes"] / 2**20, 1),
        "peak_rss_mib": round(usage.ru_maxrss / 1024, 1),
        "seconds": round(reading_s, 1),
        "tokens_per_s": round(stats["prompt_tokens"] / reading_s, 1),
        "process_s": round(seconds, 1),
    }


def pictures(count: int) -> Iterator[dict[str, Any]]:
    """Pictures of noise, made as they are taken."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for _ in range(count):
        small = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        yield {"type": "image", "image": small.resize((384, 384), Image.Resampling.BICUBIC)}
    yield {"type": "text", "text": "What is the code of owl?"}


def child(model: str, count: int) -> None:
    from benchmarks.models.geometries import llava_onevision_05b_engine

    engine = llava_onevision_05b_engine(config_of(model))
    output: Any = engine.generate(pictures(count), max_new_tokens=2, prefill_chunk_size=SETTINGS[model][1])
    print(json.dumps({"stats": output.stats.to_dict()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", choices=list(SETTINGS))
    parser.add_argument("--tokens", type=int, nargs="+", help="visual tokens; default: as above")
    parser.add_argument("--out", default="long_context", help="name of the CSV in benchmarks/results; '-' for none")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.model, args.child)
        return
    rows = []
    for tokens in args.tokens or TOKENS[args.model]:
        rows.append(run(args.model, tokens))
        print(rows[-1], flush=True)
    if args.out != "-":
        print(write_rows(args.out, rows, key=("model", "visual_tokens")))


if __name__ == "__main__":
    main()
