"""OpenVINO GenAI's side of the comparison, run as a file by the Python of its own environment, without mminfer.

Steps are commands of their own, so that an error says which of them a model did not pass.
"""

from importlib import metadata
from pathlib import Path
from typing import Any

import openvino
import openvino_genai
import torch
import transformers
from optimum.exporters.openvino import main_export
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from wire import serve

SPECIALS = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
state: dict[str, Any] = {}  # "pipeline"


def versions() -> dict[str, str]:
    """Of what runs here."""
    return {name: metadata.version(name) for name in ("openvino-genai", "optimum-intel", "transformers")}


def make(folder: str) -> dict[str, Any]:
    """A random Qwen2-VL of 24 million weights, in the format of this environment's transformers; newer ones read it."""
    tokenizer = _tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIALS}
    text = {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 32_768, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}, "initializer_range": 0.1,
        "eos_token_id": ids["im_end"], "bos_token_id": ids["endoftext"], "pad_token_id": ids["endoftext"],
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 128, "num_heads": 4, "hidden_size": 512, "mlp_ratio": 4}
    marks = {f"{name}_token_id": ids[name] for name in ("vision_start", "vision_end")}
    marks |= {"image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"]}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, initializer_range=0.1, **marks)
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).float().eval()
    model.generation_config.update(eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"])
    model.save_pretrained(folder)
    media = transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen2VLVideoProcessor()
    transformers.Qwen2VLProcessor(*media, chat_template=TEMPLATE).save_pretrained(folder)
    return {}


def _tokenizer() -> Any:
    """A token for each printable character of ASCII: any generated text can be compared."""
    alphabet = [pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(n))[0][0] for n in range(32, 127)]
    vocabulary = {letter: n for n, letter in enumerate([*alphabet, "Ċ"])}  # the last is the end of a line
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in SPECIALS])
    return transformers.Qwen2TokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def export(model: str, out: str) -> dict[str, Any]:
    """OpenVINO's form of a checkpoint, tokenizer included."""
    main_export(model, out, task="image-text-to-text", convert_tokenizer=True)
    return {"files": sorted(path.name for path in Path(out).glob("*.xml"))}


def load(exported: str, threads: int) -> dict[str, Any]:
    """The pipeline over an exported model, float32 throughout as the other side."""
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    state["pipeline"] = openvino_genai.VLMPipeline(exported, "CPU", ENABLE_CPU_PINNING=False, **settings)
    return {}


def generate(images: str, prompt: str, tokens: int, pruning_ratio: int) -> dict[str, Any]:
    """Answers greedily with so many tokens about pictures, uint8 [n, height, width, 3], of a file."""
    pictures = load_file(images)["images"].numpy()
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = tokens
    config.do_sample, config.pruning_ratio = False, pruning_ratio
    given = [openvino.Tensor(picture[None]) for picture in pictures]
    result = state["pipeline"].generate(prompt, images=given, generation_config=config)
    times = result.perf_metrics
    return {
        "tokens": times.get_num_input_tokens(),
        "text": result.texts[0],
        "ttft_ms": times.get_ttft().mean,
        "tpot_ms": times.get_tpot().mean,
    }


if __name__ == "__main__":
    serve({"versions": versions, "make": make, "export": export, "load": load, "generate": generate})
