"""Build the tokenizer, processor and untrained model of the nano checkpoint.

Everything is a stock Hugging Face class, so the saved directory loads with `AutoProcessor` and
`AutoModelForImageTextToText` and needs no custom code.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mminfer.nano import data

PATCH_SIZE = 4
DOWNSAMPLE = 1.0
WINDOW = 16384  # positions that training used
EMBEDDING_STD = 0.2  # of text embeddings and of visual tokens when the lm stage begins
TOKENS_PER_IMAGE = int((data.IMAGE_SIZE // PATCH_SIZE) ** 2 * DOWNSAMPLE**2)  # 64

PAD, END = "<|pad|>", "<|end|>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
IMG_START, IMG_END, IMG_CONTEXT, VIDEO = "<img>", "</img>", "<IMG_CONTEXT>", "<video>"
SPECIALS = [PAD, END, USER, ASSISTANT, SYSTEM, IMG_START, IMG_END, IMG_CONTEXT, VIDEO]
WORD_START = "\u2581"  # SentencePiece's mark

# Wavelengths up to 1,024 positions stay, those above 2,048 grow 16 times: slow enough to match names over the window.
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 2048,
}

# A space is put between two adjacent text parts, so that every part tokenizes on its own.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<IMG_CONTEXT>' }}"
    "{%- elif part['type'] == 'video' %}{{- '<video>' }}"
    "{%- elif part['type'] == 'text' %}"
    "{%- if loop.previtem is defined and loop.previtem['type'] == 'text' %}{{- ' ' }}{%- endif %}"
    "{{- part['text'] | trim }}"
    "{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A small BPE with byte fallback, in the SentencePiece style.

    Instead of learning merges, each word of the task vocabulary gets the chain of merges that builds it from
    left to right; all other text falls back to characters or bytes.
    """
    vocab, merges = _vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # Runs of white space count as one space; spaces at the end of a segment are dropped.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Replace(Regex(r" $"), "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token="<unk>",
        padding_side="left",
        model_max_length=32 * WINDOW,  # tokens, of which most are visual and need less than a position each
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "start_image_token": IMG_START,
            "end_image_token": IMG_END,
            "context_image_token": IMG_CONTEXT,
            "video_token": VIDEO,
        },
    )


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges: specials, bytes, ASCII, then the words of the tasks."""
    frame = "Image The Which What image shows a an is in of code digit colour number the and "
    words = (frame + "You are helpful assistant").split()
    words += [data.NONE, *data.COLOUR_NAMES, *data.WORDS, *data.DIGIT_NAMES, *data.CODES, *data.IDS]
    vocab = {token: i for i, token in enumerate([*SPECIALS, "<unk>"])}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for char in [WORD_START] + [chr(c) for c in range(33, 127)]:
        vocab[char] = len(vocab)
    merges = []
    for word in words:
        prefix = WORD_START
        for char in word:
            if prefix + char not in vocab:
                vocab[prefix + char] = len(vocab)
                merges.append((prefix, char))
            prefix += char
    return vocab, merges


def build_processor() -> InternVLProcessor:
    """Processor of the checkpoint: one picture is one tile of 64 tokens."""
    size = {"height": data.IMAGE_SIZE, "width": data.IMAGE_SIZE}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=False, min_patches=1, max_patches=1),
        tokenizer=build_tokenizer(),
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=TOKENS_PER_IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerBase, hidden: int = 192, layers: int = 6
) -> InternVLForConditionalGeneration:
    """The model with random weights, float32."""
    vocab = tokenizer.get_vocab()
    vision = InternVLVisionConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        image_size=[data.IMAGE_SIZE] * 2,
        patch_size=[PATCH_SIZE] * 2,
        attention_bias=True,
        layer_scale_init_value=0.5,
        initializer_range=0.05,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        rope_parameters=ROPE,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocab[END],
        pad_token_id=vocab[PAD],
    )
    drawn: dict[str, Any] = {"rope_pos_id_version": "v2pe_rnd"}  # visual steps are drawn in training
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=vocab[IMG_CONTEXT],
        image_seq_length=TOKENS_PER_IMAGE,
        downsample_ratio=DOWNSAMPLE,
        tie_word_embeddings=True,
        **drawn,
    )
    model = InternVLForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=8, eos_token_id=vocab[END], pad_token_id=vocab[PAD]
    )
    return model
