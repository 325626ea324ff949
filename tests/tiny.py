"""Tiny random models of every family, from their Hugging Face configs, and prompts for them.

A prompt is a list: an int n is n text tokens, IMAGE is one image, VIDEO one video of two frames.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

IMAGE, VIDEO = "image", "video"
TEXT_IDS = (10, 400)
IMAGE_ID, VIDEO_ID, START_ID, END_ID, PAD_ID, EOS_ID = 490, 491, 492, 493, 0, 1
LAYERS = 4
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500, "pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "bos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _internvl() -> InternVLForConditionalGeneration:
    vision = InternVLVisionConfig(**VISION, image_size=[32, 32], patch_size=[4, 4])
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE_ID, downsample_ratio=0.5
    )
    return InternVLForConditionalGeneration(config)


def _llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(**VISION, image_size=16, patch_size=4, projection_dim=32)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE_ID, image_seq_length=16
    )
    return LlavaForConditionalGeneration(config)


def _llava_onevision() -> LlavaOnevisionForConditionalGeneration:
    vision = SiglipVisionConfig(**VISION, image_size=16, patch_size=4)
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE_ID, video_token_id=VIDEO_ID,
        image_grid_pinpoints=[[16, 16], [16, 32]], vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def _qwen2_5_vl() -> Qwen2_5_VLForConditionalGeneration:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {
        **TEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_ID, video_token_id=VIDEO_ID,
        vision_start_token_id=START_ID, vision_end_token_id=END_ID,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


@dataclass(frozen=True)
class Family:
    """How to make a family's tiny model and its inputs."""

    make: Any
    image_tokens: int
    video_tokens: int = 0


FAMILIES = {
    "internvl": Family(_internvl, 16),
    "llava": Family(_llava, 16),
    # base 4 x 4 patches, then a row of two tiles: 4 rows of 8 patches and a newline
    "llava_onevision": Family(_llava_onevision, 16 + 4 * 9, 2 * 4 + 1),
    "qwen2_5_vl": Family(_qwen2_5_vl, 4 * 6, 2 * 2 * 4),
}


@cache
def tiny_model(family: str) -> Any:
    """The family's model, weights drawn so that layers matter."""
    torch.manual_seed(1)
    model = FAMILIES[family].make().float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.normal_(0.0, 0.08)
    model.generation_config.pad_token_id = PAD_ID
    model.generation_config.eos_token_id = EOS_ID
    model.set_attn_implementation("sdpa")
    return model


def tiny_inputs(family: str, prompts: list[list[int | str]], seed: int = 0) -> dict[str, torch.Tensor]:
    """A left-padded batch of prompts, with pixels."""
    generator = torch.Generator().manual_seed(seed)
    spec = FAMILIES[family]
    rows = [_ids(spec, family, prompt, generator) for prompt in prompts]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[PAD_ID] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    images, videos = (sum(p.count(kind) for p in prompts) for kind in (IMAGE, VIDEO))
    if images:
        inputs |= _pixels(family, images, generator)
    if videos:
        inputs |= _video_pixels(family, videos, generator)
    if family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()
    return inputs


def _ids(spec: Family, family: str, prompt: list[int | str], generator: torch.Generator) -> list[int]:
    ids: list[int] = []
    for part in prompt:
        if isinstance(part, int):
            ids += torch.randint(*TEXT_IDS, (part,), generator=generator).tolist()
            continue
        visual = [IMAGE_ID] * spec.image_tokens if part == IMAGE else [VIDEO_ID] * spec.video_tokens
        ids += [START_ID, *visual, END_ID] if family in ("qwen2_5_vl", "internvl") else visual
    return ids


def _pixels(family: str, images: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    if family == "qwen2_5_vl":
        grid = torch.tensor([[1, 8, 12]] * images)
        return {
            "pixel_values": torch.randn(images * 96, 3 * 2 * 16, generator=generator),
            "image_grid_thw": grid,
        }
    if family == "llava_onevision":
        pixels = torch.randn(images, 3, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 32]] * images)}
    side = 32 if family == "internvl" else 16
    return {"pixel_values": torch.randn(images, 3, side, side, generator=generator)}


def _video_pixels(family: str, videos: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    if family == "qwen2_5_vl":
        grid = torch.tensor([[2, 4, 8]] * videos)
        return {
            "pixel_values_videos": torch.randn(videos * 64, 3 * 2 * 16, generator=generator),
            "video_grid_thw": grid,
        }
    return {"pixel_values_videos": torch.randn(videos, 2, 3, 16, 16, generator=generator)}
