"""FLOPs and time of the prompt pass: the unpatched host, everything off, and settings of ours, interleaved in one run.

    python -m benchmarks.models.prompt_pass --repeats 5

FLOPs are counted while the pass runs (matrix products and attention), the language model alone: visual features are
ready made. The speed-up is the host's time over the setting's; the share is the time that merging, scores, pruning and
eviction themselves take of the setting's.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch

from benchmarks.common import done_at, interleaved, write_rows
from benchmarks.models.geometries import llava_onevision_05b, nano_prompt, video_prompt
from mminfer import AIMMerge, AIMPrune, Digest, InferenceConfig, LookM, patched
from mminfer.forward import rows
from mminfer.metrics.flops import measured_flops

PRESETS = ("off", "aim", "aim-merge", "aim-prune", "lookm-20", "digest-20", "skip-ffn", "balanced", "fast")


class Stopwatch:
    """Seconds spent in what it wraps."""

    seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = done_at()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += done_at() - start

        return timed


@contextmanager
def techniques_timed() -> Iterator[Stopwatch]:
    """Times what the techniques themselves do; the scores that come with an attention are in the attention's time."""
    watch = Stopwatch()
    wrapped = [(AIMMerge, "apply"), (AIMPrune, "apply"), (LookM, "apply"), (rows, "keep_rows")]
    wrapped += [(Digest, "layer_demand"), (Digest, "compress_layers")]
    wrapped += [(technique, name) for technique in (LookM, Digest) for name in ("held", "apply_layers")]  # on a GPU
    patches = [mock.patch.object(owner, name, watch.around(getattr(owner, name))) for owner, name in wrapped]
    for patch in patches:
        patch.start()
    try:
        yield watch
    finally:
        for patch in patches:
            patch.stop()


def share_of_techniques(run: Callable[[], None], repeats: int = 3) -> float:
    """Median over runs of the techniques' part of the time."""
    shares = []
    for _ in range(repeats):
        start = done_at()
        with techniques_timed() as watch:
            run()
        shares.append(watch.seconds / (done_at() - start))
    return median(shares)


def runs_of(model: Any, inputs: dict[str, Any], settings: list[str]) -> dict[str, Callable[[], None]]:
    """One call for the host and one for each setting."""

    @torch.no_grad()
    def host() -> None:
        model(**inputs)

    def ours(name: str) -> Callable[[], None]:
        config = InferenceConfig.from_preset(name)

        def run() -> None:
            with patched(model, config):
                model(**inputs)

        return run

    return {"host": host, **{name: ours(name) for name in settings}}


def measure(name: str, model: Any, inputs: dict[str, Any], settings: list[str], repeats: int) -> list[dict[str, Any]]:
    """One row a run."""
    runs = runs_of(model, inputs, settings)
    flops = {}
    for run_name, run in runs.items():
        with measured_flops() as counter:
            run()
        flops[run_name] = counter.get_total_flops()
    times = interleaved(runs, repeats)
    rows = []
    for run_name in runs:
        flops_ratio = flops["host"] / flops[run_name]
        speedup = times["host"]["median_ms"] / times[run_name]["median_ms"]
        share = 0.0 if run_name in ("host", "off") else share_of_techniques(runs[run_name])
        rows.append({
            "model": name, "tokens": inputs["input_ids"].shape[1], "setting": run_name,
            "gflops": round(flops[run_name] / 1e9, 2),
            **{key: round(value, 2) for key, value in times[run_name].items()}, "flops_ratio": round(flops_ratio, 3),
            "speedup": round(speedup, 3), "share_of_ratio": round(speedup / flops_ratio, 3),
            "techniques_share": round(share, 4), "repeats": repeats,
        })  # fmt: skip
        print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[8, 32], help="of 196 tokens, for LLaVA-OneVision-0.5B's geometry"
    )
    parser.add_argument("--images", type=int, nargs="+", default=[32, 128], help="pictures of 64 tokens for nano")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--settings", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--models", nargs="+", default=["nano", "llava-onevision-0.5b"])
    parser.add_argument("--out", default="prompt_pass", help="name of the CSV file in benchmarks/results; '-' for none")
    args = parser.parse_args()
    rows = []
    if "nano" in args.models:
        for images in args.images:
            rows += measure("nano", *nano_prompt(images), args.settings, args.repeats * 2)
    if "llava-onevision-0.5b" in args.models:
        model = llava_onevision_05b()
        for frames in args.frames:
            rows += measure("llava-onevision-0.5b", model, video_prompt(model, frames), args.settings, args.repeats)
    if args.out != "-":
        print(write_rows(args.out, rows, key=("model", "tokens", "setting")))


if __name__ == "__main__":
    main()
