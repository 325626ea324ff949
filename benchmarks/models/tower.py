"""What the vision tower takes, patches that repeat left out or not: by kind of page, beside pictures kept encoded.

    python -m benchmarks.models.tower --layers 4

Weights are random and geometries real: Qwen2.5-VL's tower (1,280 wide, windows and one layer without) over drawn pages,
and LLaVA-OneVision's (SigLIP, 384 pixels) over the same pages made small. Towers are cut to so many layers. Encoders of
all settings run in turn, back and forth, in one process; CPU time of the whole process, projector and the search for
repeats included.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import mminfer_kernels
import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLImageProcessor,
    SiglipVisionConfig,
)

from benchmarks.common import SEED, show_rows
from benchmarks.models.sheets import KINDS, sheet
from mminfer import InferenceConfig, PatchDedup
from mminfer.layout import Modality
from mminfer.metrics.vision import encoded_flops
from mminfer.models.encoder_cache import EncoderCache
from mminfer.models.encoding import HostEncoder
from mminfer.models.registry import adapter_for

OFF, DEDUP, KEPT = "off", "PatchDedup(0)", "kept encoded"
SETTINGS = {OFF: InferenceConfig(), DEDUP: InferenceConfig(tower=PatchDedup()), KEPT: InferenceConfig()}
KEY = ("model", "layers", "pages_are", "pages", "pixels", "setting")
TEXT: dict[str, Any] = {
    "hidden_size": 896, "intermediate_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 2048,
}  # fmt: skip


def qwen(layers: int) -> tuple[Any, Any]:
    """A model with Qwen2.5-VL's tower, and its image processor."""
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 8, 8]}
    vision = {"depth": layers, "out_hidden_size": TEXT["hidden_size"], "fullatt_block_indexes": [layers - 1]}
    text = {**TEXT, "rope_parameters": rotary}
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=2046, video_token_id=2047, vision_start_token_id=2044,
        vision_end_token_id=2045,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa"), Qwen2VLImageProcessor()


def onevision(layers: int) -> tuple[Any, Any]:
    """A model with LLaVA-OneVision's tower, and its image processor."""
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=layers, num_attention_heads=16, image_size=384,
        patch_size=14,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=2046, video_token_id=2047
    )
    made = LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    return made, LlavaOnevisionImageProcessor()


MODELS: Mapping[str, Callable[[int], tuple[Any, Any]]] = {"Qwen2.5-VL": qwen, "LLaVA-OneVision": onevision}


def measure(name: str, layers: int, kind: str, pages: int, size: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """One row a setting; the first round counts not."""
    torch.manual_seed(SEED)
    model, processor = MODELS[name](layers)
    adapter = adapter_for(model.eval())
    images = [sheet(kind, size, SEED + page) for page in range(pages)]
    inputs = dict(processor(images=images, return_tensors="pt"))
    if name == "LLaVA-OneVision":  # pages among others are not cut into tiles
        inputs |= {"pixel_values": inputs["pixel_values"][:, :1], "batch_num_images": torch.tensor([pages])}
    encoders = {
        OFF: HostEncoder(adapter),
        DEDUP: HostEncoder(adapter, SETTINGS[DEDUP].tower),
        KEPT: HostEncoder(adapter, None, EncoderCache(2**30)),
    }
    seconds: dict[str, list[float]] = {setting: [] for setting in encoders}
    gflop, whole = {}, adapter.tower.work(Modality.IMAGE, inputs).rows
    (call,) = encoders[DEDUP].encode(inputs).calls
    repeated = round(100 * (1 - (whole if call.ragged is None else call.ragged.rows) / whole), 1)
    for turn in range(repeats + 1):
        for setting, encoder in list(encoders.items())[:: -1 if turn % 2 else 1]:
            start = time.process_time()
            encoded = encoder.encode(inputs)
            spent = time.process_time() - start
            gflop[setting] = encoded_flops(adapter, encoded).total / 1e9
            if turn:
                seconds[setting].append(1e3 * spent)
    rows = []
    for setting, own in seconds.items():
        faster = median(a / b for a, b in zip(seconds[OFF], own, strict=True))
        facts = {"model": name, "layers": layers, "pages_are": kind, "pages": pages}
        facts |= {"pixels": f"{size[0]} x {size[1]}", "setting": setting}
        times = {"cpu_ms_median": round(median(own), 2), "cpu_ms_min": round(min(own), 2)}
        times |= {"times_less": round(faster, 3), "times_less_of_min": round(min(seconds[OFF]) / min(own), 3)}
        rows.append(facts | {"repeated": repeated, "gflop": round(gflop[setting], 2)} | times | {"repeats": repeats})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--pages", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=[827, 1169], help="width and height of a page in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="tower", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    mminfer_kernels.prepare("cpu")
    for name in args.models:
        for kind in args.kinds:
            show_rows(args.out, measure(name, args.layers, kind, args.pages, tuple(args.size), args.repeats), KEY)


if __name__ == "__main__":
    main()
