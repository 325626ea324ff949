"""Tiny random models of every family, from their Hugging Face configs; nothing is downloaded."""

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from training.nano.build import CHAT_TEMPLATE, build_tokenizer

IMAGE_ID, VIDEO_ID, START_ID, END_ID, BREAK_ID, PAD_ID, EOS_ID = 490, 491, 492, 493, 494, 0, 1
LAYERS = 4
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500, "pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "bos_token_id": 2,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2
}  # fmt: skip
QWEN_IDS = {
    "image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID, "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
}  # fmt: skip
ANYRES = {
    "image_grid_pinpoints": [[16, 16], [16, 32]], "vision_feature_select_strategy": "full", "vision_feature_layer": -1
}  # fmt: skip


def internvl() -> Any:
    vision = InternVLVisionConfig(**VISION, image_size=[32, 32], patch_size=[4, 4])
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE_ID, downsample_ratio=0.5
    )
    return InternVLForConditionalGeneration(config)


def llava() -> Any:
    vision = CLIPVisionConfig(**VISION, image_size=16, patch_size=4, projection_dim=32)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE_ID, image_seq_length=16
    )
    return LlavaForConditionalGeneration(config)


def llava_next() -> Any:
    vision = SiglipVisionConfig(**VISION, image_size=16, patch_size=4)
    config = LlavaNextConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE_ID, **ANYRES
    )
    return LlavaNextForConditionalGeneration(config)


def llava_onevision() -> Any:
    vision = SiglipVisionConfig(**VISION, image_size=16, patch_size=4)
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE_ID, video_token_id=VIDEO_ID,
        **ANYRES,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def mistral3() -> Any:
    vision = PixtralVisionConfig(**VISION, image_size=32, patch_size=4)
    text = MistralConfig(**TEXT, head_dim=16, sliding_window=None)
    config = Mistral3Config(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, spatial_merge_size=2)
    return Mistral3ForConditionalGeneration(config)


def idefics3() -> Any:
    vision = {**VISION, "image_size": 32, "patch_size": 4}
    config = Idefics3Config(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE_ID, pad_token_id=PAD_ID
    )
    return Idefics3ForConditionalGeneration(config)


def smolvlm() -> Any:
    vision = {**VISION, "image_size": 32, "patch_size": 4}
    config = SmolVLMConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE_ID, pad_token_id=PAD_ID
    )
    return SmolVLMForConditionalGeneration(config)


def gemma3() -> Any:
    vision = SiglipVisionConfig(**VISION, image_size=32, patch_size=4, vision_use_head=False)
    text = Gemma3TextConfig(
        **TEXT, head_dim=16, query_pre_attn_scalar=24, sliding_window=20,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    config = Gemma3Config(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, boi_token_index=START_ID,
        eoi_token_index=END_ID, mm_tokens_per_image=16,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def qwen2_vl() -> Any:
    vision = {
        "depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "hidden_size": 64, "patch_size": 4,
        "spatial_merge_size": 2,
    }  # fmt: skip
    config = Qwen2VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": MROPE}, **QWEN_IDS)
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": MROPE}, **QWEN_IDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "spatial_merge_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip
    text = {**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_IDS))


def llava_onevision_engine() -> tuple[Any, LlavaOnevisionProcessor]:
    """A tiny LLaVA-OneVision with a processor of its own, which cuts an image that comes alone into tiles."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_id, video_id = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    vision = SiglipVisionConfig(**VISION, image_size=16, patch_size=4)
    text = Qwen2Config(**{**TEXT, "vocab_size": len(tokenizer)})
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_id=image_id, video_token_id=video_id, **ANYRES
    )
    size = {"height": 16, "width": 16}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=CHAT_TEMPLATE.replace("<IMG_CONTEXT>", "<image>"),
    )
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration(config).float().eval(), processor
