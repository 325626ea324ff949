"""Real processor classes over a small tokenizer that cuts words as Qwen's does, with models whose marks are theirs.

The tokenizer is made here, from a handful of sentences: bytes, merged, split by the rule of GPT-4. So what a processor
writes for a medium grows together with the text beside it, as it does with real ones.
"""

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ImageProcessor,
    Gemma3Processor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from mminfer.inputs.reader import RequestReader
from mminfer.models.registry import adapter_for
from tests import tiny_models
from tests.tiny_models import ANYRES

WORDS = (
    "Then comes a clip: xFrame1: Frame2: aFrame1 <0.2 seconds> <1.5 seconds> a=<0 b=<1 c=<2 a=<0 b=<1 c=<2 x ?<"
    "\n\n\n\n\n\n a b c \n\nYou are provided the following series of two frames from a 0:00:02 [H:MM:SS] video."
    "\nFrame from 00:00: Which digit is in it?"
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_SIZE = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
QWEN_SIZE |= {"size": {"shortest_edge": 64, "longest_edge": 64 * 64}}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% elif p['type'] == 'video' %}VIDEO"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _template(image, video=""):
    return TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def byte_tokenizer(**marks):
    """A tokenizer with these marks; each is there under its name and the name's id, as on real ones."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=460, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([WORDS] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*CONTROL[2:], *marks.values()]})
    for name, mark in marks.items():
        setattr(tokenizer, name, mark)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(mark))
    return tokenizer


def _qwen(family):
    names = ("vision_start_token", "vision_end_token", "image_token", "video_token")
    tokenizer = byte_tokenizer(**dict(zip(names, VISION, strict=True)))
    template = _template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
    kinds = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
    videos = Qwen3VLVideoProcessor if family == "qwen3_vl" else Qwen2VLVideoProcessor
    return kinds[family](
        image_processor=Qwen2VLImageProcessor(**QWEN_SIZE),
        tokenizer=tokenizer,
        video_processor=videos(**QWEN_SIZE),
        chat_template=template,
    )


def _internvl():
    from transformers import GotOcr2ImageProcessor

    tokenizer = byte_tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    size = {"height": 32, "width": 32}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=_template("<IMG_CONTEXT>", "<video>"),
    )


def _llava_onevision():
    tokenizer = byte_tokenizer(image_token="<image>", video_token="<video>")
    size = {"height": 16, "width": 16}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=ANYRES["image_grid_pinpoints"]),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy=ANYRES["vision_feature_select_strategy"],
        chat_template=_template("<image>", "<video>"),
    )


def _gemma3():
    tokenizer = byte_tokenizer(boi_token="<boi>", eoi_token="<eoi>", image_token="<soft>")
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return Gemma3Processor(images, tokenizer, image_seq_length=16, chat_template=_template("<boi>"))


def _idefics3():
    marks = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    tokenizer = byte_tokenizer(**marks, global_image_token="<global-img>", end_of_utterance_token="<end_of_utterance>")
    size = {"longest_edge": 32}
    images = Idefics3ImageProcessor(size=size, max_image_size=size)
    return Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=_template("<image>"))


def _smolvlm():
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor
    from transformers.models.smolvlm import processing_smolvlm

    if not processing_smolvlm.num2words:  # a package that writes numbers as words
        processing_smolvlm.num2words = str
    marks = {"image_token": "<image>", "video_token": "<video>", "fake_image_token": "<fake_token_around_image>"}
    size = {"longest_edge": 32}
    return SmolVLMProcessor(
        SmolVLMImageProcessor(size=size, max_image_size=size),
        byte_tokenizer(**marks, global_image_token="<global-img>", end_of_utterance_token="<end_of_utterance>"),
        SmolVLMVideoProcessor(size=size, max_image_size=size),
        image_seq_len=16,
        chat_template=_template("<image>", "<video>"),
    )


PROCESSORS = {
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": lambda: _qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: _qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: _qwen("qwen3_vl"),
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
}
MARKS = {
    "image_token_id": ("image_token", "context_image_token"), "video_token_id": ("video_token",),
    "vision_start_token_id": ("vision_start_token",), "vision_end_token_id": ("vision_end_token",),
}  # fmt: skip


@cache
def model_and_processor(family):
    """A tiny random model that knows the marks of its processor."""
    processor = PROCESSORS[family]()
    tokenizer = processor.tokenizer
    model = getattr(tiny_models, family)().float().eval()
    model.resize_token_embeddings(len(tokenizer))
    for name, attributes in MARKS.items():
        ids = [getattr(tokenizer, f"{attribute}_id", None) for attribute in attributes]
        found = [token for token in ids if token is not None]
        if hasattr(model.config, name) and found:
            setattr(model.config, name, found[0])
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, processor


@cache
def reader_of(family):
    model, processor = model_and_processor(family)
    return RequestReader(model, processor, adapter_for(model))
