"""What a prompt pass and a decoding step ask of a GPU, told without one: kernels launched, and waits of the host.

    python -m benchmarks.gpu.walk
    python -m benchmarks.gpu.walk --frames 32 --settings off aim --places

The language model has 28 layers, as one of 7 billion weights has, and next to no width: what is launched follows from
the depth. Launches of torch's own ops are one each, those that are several as `pretended.LAUNCHES` has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2Config
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.gpu.pretended import Counts, PretendedGPU, moved, pretended_gpu
from benchmarks.gpu.pretended_graphs import pretended_graphs
from benchmarks.models.geometries import behind_a_token_tower, video_prompt
from mminfer import InferenceConfig, patched
from mminfer.forward.kv_cache import CACHE_NAME
from mminfer.models.entry import embedding_scale

HOST = "host"
SETTINGS = (
    HOST, "off", "v2pe-16", "skip-ffn", "aim-merge", "aim-prune", "aim", "balanced", "fast", "regions", "fastv",
    "downsample", "random-prune", "lookm-20", "lookm-8k", "snapkv-20", "h2o-20", "random-20", "digest-20", "replay-20",
)  # fmt: skip
VOCABULARY = 512


@dataclass(frozen=True)
class Walk:
    """What was asked of the GPU.

    Args:
        prompt: by the pass of a prompt.
        step: by one decoding step behind it, the second: the first lays out tables for many.
    """

    prompt: Counts
    step: Counts


def narrow_model(layers: int = 28) -> Any:
    """A deep language model of next to no width behind a token tower, in bfloat16."""
    text = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=32_768, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    return behind_a_token_tower(text, image_token_id=VOCABULARY - 2, video_token_id=VOCABULARY - 1).bfloat16()


@contextmanager
def on_pretended_gpu(model: Any, frames: int) -> Iterator[tuple[PretendedGPU, dict[str, Any]]]:
    """The model there, and a prompt of so many frames for it."""
    inputs = video_prompt(model, frames, vocabulary=VOCABULARY - 2)
    features = inputs["mm_encoder_outputs"]["video"].pooler_output.to(model.dtype)
    moved(model)
    with pretended_gpu() as gpu:
        encoded = {"video": BaseModelOutputWithPooling(pooler_output=features.to("cuda"))}
        ids = inputs["input_ids"].to("cuda")
        embedding_scale(model.base_model.language_model, model.config.text_config.hidden_size)  # once for each model
        yield gpu, {**inputs, "input_ids": ids, "mm_encoder_outputs": encoded}


@torch.no_grad()
def walked(gpu: PretendedGPU, model: Any, inputs: dict[str, Any], setting: str) -> Walk:
    """A prompt pass and a decoding step of the host, or with a preset."""
    if setting == HOST:
        return _walked(gpu, model, inputs)
    with patched(model, InferenceConfig.from_preset(setting), verify=False):
        return _walked(gpu, model, inputs)


@torch.no_grad()
def replayed(gpu: PretendedGPU, model: Any, inputs: dict[str, Any], setting: str) -> Counts:
    """A decoding step with a preset that is replayed from a CUDA graph: the third, the second is recorded."""
    config = InferenceConfig.from_preset(setting)
    with pretended_graphs(gpu), patched(model, config, verify=False):
        cache, token = getattr(model(**inputs), CACHE_NAME), inputs["input_ids"][:, :1]
        for _ in range(3):
            with gpu.fresh() as step:
                model(**{"input_ids": token, CACHE_NAME: cache})
    return step


def _walked(gpu: PretendedGPU, model: Any, inputs: dict[str, Any]) -> Walk:
    with gpu.fresh() as prompt:
        out = model(**inputs)
    cache, token = getattr(out, CACHE_NAME), inputs["input_ids"][:, :1]
    for _ in range(2):
        with gpu.fresh() as step:
            model(**{"input_ids": token, CACHE_NAME: cache})
    return Walk(prompt, step)


def table(walks: dict[str, Walk]) -> str:
    """One line a setting, and below it where the host waited."""
    lines = [f"{'setting':14} {'launches':>9} {'waits':>6}   {'of a step':>9} {'waits':>6}"]
    for setting, walk in walks.items():
        counts = f"{walk.prompt.num_launches:9} {walk.prompt.num_waits:6}   {walk.step.num_launches:9}"
        lines.append(f"{setting:14} {counts} {walk.step.num_waits:6}")
        for name, of_part in (("prompt", walk.prompt), ("step", walk.step)):
            lines += [f"    {name}: {n} x {op} at {place}" for (place, op), n in of_part.waits.most_common()]
    return "\n".join(lines)


def places(counts: Counts, most: int = 40) -> str:
    """Where most kernels were launched from."""
    return "\n".join(f"    {n:5} x {op} at {place}" for (place, op), n in counts.launched_at.most_common(most))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="'host', or presets")
    parser.add_argument("--frames", type=int, default=32, help="of 196 tokens")
    parser.add_argument("--places", action="store_true", help="also say where kernels are launched from")
    args = parser.parse_args(arguments)
    model = narrow_model()
    with on_pretended_gpu(model, args.frames) as (gpu, inputs):
        walks = {}
        for setting in args.settings:
            walks[setting] = walked(gpu, model, inputs, setting)
            print(table({setting: walks[setting]}).partition("\n")[2], flush=True)
            if setting != HOST:
                step = replayed(gpu, model, inputs, setting)
                print(f"    a recorded step: {step.num_launches} launches, {step.num_waits} waits", flush=True)
            if args.places:
                print(places(walks[setting].prompt))


if __name__ == "__main__":
    main()
