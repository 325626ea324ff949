"""Every text model of the host library that fits under LLaVA: our pass is its own, or it is refused before any pass."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mminfer import InferenceConfig, UnsupportedModelError, patched
from mminfer.models.registry import adapter_for
from tests.tiny_models import IMAGE_ID, TEXT, VISION

# What brings the sizes of mixtures and latent attention down; used where a config has a field of that name.
SMALL = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_shared_experts": 1, "head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "sliding_window": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LARGEST = 20_000_000
# Numbers of a config whose default is often one that changes nothing: factors and caps.
TELLING = ("multiplier", "scal", "softcap", "soft_cap")
# Models that people put under a vision tower; these must run, not only be refused.
MUST_RUN = {
    "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "granite", "helium",
    "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
}  # fmt: skip
MINISTRAL3_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def text_config(kind: str, **sizes: int) -> Any:
    """A small config of the kind, whose factors and caps are none that change nothing."""
    plain = CONFIG_MAPPING[kind]()
    small = {name: value for name, value in SMALL.items() if getattr(plain, name, None) is not None}
    if hasattr(plain, "head_dim"):  # None by default in some that cannot do without
        small["head_dim"] = SMALL["head_dim"]
    telling = {
        name: type(value)(0.7 * value) or value
        for name, value in vars(plain).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and any(part in name for part in TELLING)
    }
    rope = {"rope_parameters": MINISTRAL3_ROPE} if kind == "ministral3" else {}
    return CONFIG_MAPPING[kind](**{**TEXT, **small, **telling, **rope, **sizes})


def config_under_llava(kind: str, **sizes: int) -> LlavaConfig:
    vision = CLIPVisionConfig(**VISION, image_size=16, patch_size=4, projection_dim=32)
    text = text_config(kind, **sizes)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=16)


def skeleton_under_llava(kind: str, **sizes: int) -> Any:
    """The model without weights; raises `ValueError` where it is no small one."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config_under_llava(kind, **sizes))
    size = sum(p.numel() for p in model.parameters())
    if size > LARGEST:
        raise ValueError(f"{size} weights")
    return model


def model_under_llava(kind: str, **sizes: int) -> Any:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config_under_llava(kind, **sizes)).float().eval()
    for p in model.parameters():
        p.data += 0.08 * torch.randn_like(p)  # norms, biases and sinks as well
    return model


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 400, (1, 30), generator=generator)
    ids[0, 4:20] = IMAGE_ID
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def host_answers(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the prompt, and of each token of an answer."""
    with torch.no_grad():
        logits = model(**inputs()).logits
    return logits, torch.stack(model.generate(**inputs(), eos_token_id=None, **GREEDY).logits)


def host_or_skip(kind: str) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]] | None:
    """The model and what it answers by itself; None: it is refused unseen. Skips what is no text model for LLaVA."""
    for sizes in ({}, {"head_dim": 8, "num_key_value_heads": 4}, {"num_key_value_heads": 4}):
        try:
            adapter_for(skeleton_under_llava(kind, **sizes))
            model = model_under_llava(kind, **sizes)
            host = host_answers(model)
            break
        except UnsupportedModelError:
            assert kind not in MUST_RUN
            return None
        except Exception as error:
            reason = f"does not fit under LLaVA: {type(error).__name__}: {str(error)[:100]}"
    else:
        assert kind not in MUST_RUN, reason
        pytest.skip(reason)
    if not all(x.isfinite().all() for x in host):
        pytest.skip("its own logits are not finite")
    return model, host


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_equals_the_host_or_is_refused(kind):
    found = host_or_skip(kind)
    if found is None:
        return
    model, host = found
    try:
        with patched(model, InferenceConfig()):
            ours = host_answers(model)
    except UnsupportedModelError:
        assert kind not in MUST_RUN
        return
    for a, b in zip(ours, host, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
