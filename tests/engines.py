"""Two models to ask: the bundled one, and a random one of another family that takes no videos."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from mminfer import Engine
from tests.tiny import tiny_model
from tests.tiny_models import IMAGE_ID

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture(scope="session")
def nano_engine():
    return Engine.from_pretrained("nano")


@pytest.fixture(scope="session")
def tiny_engine():
    words = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocab = {word: n for n, word in enumerate([*words, *(f"w{n}" for n in range(IMAGE_ID - len(words))), "<image>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens={"image_token": "<image>"}, **special
    )
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images, fast, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    return Engine(tiny_model("llava"), processor)
