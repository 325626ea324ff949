"""Random models of real geometries, and prompts for them with their visual features ready made."""

from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mminfer import Engine, InferenceConfig
from mminfer.nano.build import CHAT_TEMPLATE, build_tokenizer
from mminfer.nano.data import draw_images, sample_context, to_content

TOKENS_PER_FRAME = 196


def llava_onevision_05b() -> Any:
    """The language model of LLaVA-OneVision-0.5B, weights random, behind a token tower: features come ready made."""
    return behind_a_token_tower(_qwen2_05b(), image_token_id=151_646, video_token_id=151_647)


def llava_onevision_05b_engine(config: InferenceConfig) -> Engine:
    """LLaVA-OneVision-0.5B's geometry with its vision tower and a processor; weights random, nano's tokenizer."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_id, video_id = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384,
        patch_size=14,
    )  # fmt: skip
    made = LlavaOnevisionConfig(
        vision_config=vision, text_config=_qwen2_05b(), tie_word_embeddings=True, image_token_id=image_id,
        video_token_id=video_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration._from_config(made, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, 0
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(),
        tokenizer,
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE.replace("<IMG_CONTEXT>", "<image>"),
    )
    return Engine(model, processor, config)


def _qwen2_05b() -> Qwen2Config:
    return Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=152_000, max_position_embeddings=32_768, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )  # fmt: skip


def llava_onevision_mha() -> Any:
    """A language model of 100 million weights with as many key heads as query heads, and next to no vocabulary."""
    text = Qwen2Config(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=2048, max_position_embeddings=65_536, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )  # fmt: skip
    return behind_a_token_tower(text, image_token_id=2046, video_token_id=2047)


def behind_a_token_tower(text: Qwen2Config, **ids: int) -> Any:
    """A language model of this geometry, weights random, behind a token tower; ids: of the placeholders."""
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=384, patch_size=14
    )  # fmt: skip
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **ids)
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


def video_prompt(model: Any, frames: int, text_tokens: int = 100, vocabulary: int = 150_000) -> dict[str, Any]:
    """One video of so many frames of 196 tokens between two halves of random text; no newline token among them."""
    generator = torch.Generator().manual_seed(0)
    visual = frames * TOKENS_PER_FRAME + 1
    text = torch.randint(0, vocabulary, (1, text_tokens), generator=generator)
    placeholders = torch.full((1, visual), model.config.video_token_id)
    ids = torch.cat([text[:, : text_tokens // 2], placeholders, text[:, text_tokens // 2 :]], 1)
    features = 0.02 * torch.randn(1, visual, model.config.get_text_config().hidden_size, generator=generator)
    features[:, -1] = model.model.image_newline.detach()
    encoded = {"video": BaseModelOutputWithPooling(pooler_output=features)}
    return {"input_ids": ids, "mm_encoder_outputs": encoded, "logits_to_keep": 1, "use_cache": True}


def nano_prompt(num_images: int) -> tuple[Any, dict[str, Any]]:
    """The bundled model, and a context of so many pictures with a question; the vision tower has run already."""
    import random

    engine = Engine.from_pretrained("nano")
    context = sample_context(random.Random(0), num_images)
    content = to_content(context, draw_images(context, "test", 0))
    inputs = engine.prepare([[*content, {"type": "text", "text": context.questions[0].text}]])
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        features = engine.model.model.get_image_features(pixel_values=pixels, return_dict=True)
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=features.pooler_output)}
    return engine.model, {**inputs, "mm_encoder_outputs": encoded, "logits_to_keep": 1, "use_cache": True}
