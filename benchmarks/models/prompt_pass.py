"""FLOPs and time of the prompt pass: the unpatched host, everything off, and settings of ours, interleaved in one run.

    python -m benchmarks.models.prompt_pass --repeats 5

FLOPs are counted while the pass runs (matrix products and attention), the language model alone: visual features are
ready made. The speed-up is the time with everything off over the setting's.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import interleaved, write_rows
from benchmarks.models.geometries import llava_onevision_05b, nano_prompt, video_prompt
from mminfer import InferenceConfig, patched
from mminfer.metrics.flops import measured_flops

PRESETS = ("off", "aim", "aim-merge", "aim-prune", "lookm-20", "skip-ffn", "balanced", "fast")


def runs_of(model: Any, inputs: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """One call for the host and one for each preset."""

    @torch.no_grad()
    def host() -> None:
        model(**inputs)

    def ours(name: str) -> Callable[[], None]:
        config = InferenceConfig.from_preset(name)

        def run() -> None:
            with patched(model, config):
                model(**inputs)

        return run

    return {"host": host, **{name: ours(name) for name in PRESETS}}


def measure(name: str, model: Any, inputs: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """One row a run."""
    runs = runs_of(model, inputs)
    flops = {}
    for run_name, run in runs.items():
        with measured_flops() as counter:
            run()
        flops[run_name] = counter.get_total_flops()
    times = interleaved(runs, repeats)
    rows = []
    for run_name in runs:
        flops_ratio = flops["off"] / flops[run_name]
        speedup = times["off"]["median_ms"] / times[run_name]["median_ms"]
        rows.append({
            "model": name, "tokens": inputs["input_ids"].shape[1], "setting": run_name,
            "gflops": round(flops[run_name] / 1e9, 2),
            **{key: round(value, 2) for key, value in times[run_name].items()}, "flops_ratio": round(flops_ratio, 3),
            "speedup": round(speedup, 3), "share_of_ratio": round(speedup / flops_ratio, 3), "repeats": repeats,
        })  # fmt: skip
        print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--frames", type=int, default=8, help="frames of 196 tokens for LLaVA-OneVision-0.5B's geometry"
    )
    parser.add_argument("--images", type=int, nargs="+", default=[32, 128], help="pictures of 64 tokens for nano")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["nano", "llava-onevision-0.5b"])
    parser.add_argument("--out", default="prompt_pass", help="name of the CSV file in benchmarks/results; '-' for none")
    args = parser.parse_args()
    rows = []
    if "nano" in args.models:
        for images in args.images:
            rows += measure("nano", *nano_prompt(images), args.repeats * 2)
    if "llava-onevision-0.5b" in args.models:
        model = llava_onevision_05b()
        rows += measure("llava-onevision-0.5b", model, video_prompt(model, args.frames), args.repeats)
    if args.out != "-":
        print(write_rows(args.out, rows, key=("model", "tokens", "setting")))


if __name__ == "__main__":
    main()
