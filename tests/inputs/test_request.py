"""Chats become the host's inputs, or are refused before any forward pass with the place of the mistake."""

import copy
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from mminfer import nano
from mminfer.errors import InputError
from mminfer.inputs.content import MediaOptions
from mminfer.inputs.markers import Markers
from mminfer.inputs.messages import is_batch, normalise_messages
from mminfer.inputs.model_inputs import InputBuilder
from mminfer.inputs.parts import ImagePart, Message, TextPart
from mminfer.inputs.reader import RequestReader
from mminfer.output import GenerationOutput

TOKENS_PER_IMAGE = 64
PICTURE = np.full((32, 32, 3), 90, np.uint8)
FRAMES = np.stack([np.full((32, 32, 3), 20 * k, np.uint8) for k in range(4)])
KINDS = st.lists(st.sampled_from(["text", "image", "video"]), min_size=1, max_size=5)
IMAGE, VIDEO = {"type": "image", "image": PICTURE}, {"type": "video", "video": FRAMES}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(nano.checkpoint_path())


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def inputs_of(processor, *chats, dtype=torch.float32):
    return builder(processor, dtype).batch([normalise_messages(c) for c in chats])


def builder(processor, dtype=None):
    return InputBuilder(processor, Markers(processor), "cpu", dtype)


def same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=0)


def test_every_spelling_of_one_chat_is_the_same():
    wanted = [Message("user", (TextPart("Hello"),))]
    text = {"type": "text", "text": "Hello"}
    for messages in (
        "Hello",
        ["Hello"],
        [text],
        (text,),
        user("Hello"),
        user(text),
        [{"role": "user", "content": "Hello"}],
    ):
        assert normalise_messages(messages) == wanted


def test_media_are_loaded_from_every_key(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    for key in ("image", "path", "url"):
        chat = user({"type": "image", key: str(tmp_path / "a.png")})
        (part,) = normalise_messages(chat)[0].parts
        assert isinstance(part, ImagePart)
        np.testing.assert_array_equal(np.asarray(part.image), PICTURE)
    for key in ("video", "path", "url"):
        part = {"type": "video", key: FRAMES}
        (loaded,) = normalise_messages(user(part), MediaOptions(num_frames=2))[0].parts
        np.testing.assert_array_equal(loaded.frames, FRAMES)


def test_a_video_becomes_images_where_videos_are_not_supported():
    reader = RequestReader(None, SimpleNamespace(tokenizer=object()), None)  # a processor that takes no videos
    (message,) = reader.check(user("a", VIDEO, "b"), MediaOptions())
    assert [part.kind for part in message.parts] == ["text"] + ["image"] * 4 + ["text"]
    for part, frame in zip(message.parts[1:5], FRAMES, strict=True):
        np.testing.assert_array_equal(np.asarray(part.image), frame)


def test_what_was_given_is_left_alone(processor):
    given = [{"role": "system", "content": "Be brief."}, *user("a", IMAGE, VIDEO)]
    before = copy.deepcopy(given)
    checked = normalise_messages(given)
    lists = [message.parts for message in checked]
    builder(processor).batch([checked])
    assert [message.parts for message in checked] == lists
    assert given[0] == before[0]
    assert given[1]["content"][0] == "a" and given[1]["content"][1]["image"] is PICTURE


@pytest.mark.parametrize(
    "messages,found",
    [
        (None, "NoneType"),
        (5, "int"),
        ([], "empty list"),
        ({"role": "user", "content": "a"}, "dict"),
        ("", "prompt is empty"),
        (" \n", "prompt is empty"),
        (user(), "prompt is empty"),
        (user(" ", {"type": "text", "text": ""}), "prompt is empty"),
        ([{"role": "user"}], "'role'"),
        ([{"content": "a"}], "'content'"),
        ([{"role": "user", "content": "a"}, "b"], "message 1 is str"),
        ([{"role": "user", "content": None}], "content is NoneType"),
        ([{"role": "user", "content": {"type": "text"}}], "content is dict"),
        ([{"role": "tool", "content": "a"}], "role 'tool'"),
        ([{"role": None, "content": "a"}], "role None"),
        ([{"role": ["user"], "content": "a"}], "role"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the assistant's"),
        ([{"role": "system", "content": "a"}], "the system's"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, *user("c")], "message 1"),
        (user("a", {"type": "audio", "audio": "a.wav"}), "message 0, part 1: a part of type 'audio'"),
        (user({"text": "a"}), "type None"),
        (user({"type": ["image"], "image": PICTURE}), "type"),
        (user(3), "message 0, part 0: int"),
        (user({"type": "text"}), '"text" is NoneType'),
        (user({"type": "text", "text": 3}), '"text" is int'),
        (user({"type": "image"}), "image part with none of image, path, url"),
        (user({"type": "image", "image": None}), "image part with none"),
        (user({"type": "video"}), "video part with none of video, path, url"),
        (user({"type": "image", "image": PICTURE, "url": "a.png"}), "'image' and 'url'"),
        (user("a", {"type": "image", "image": "gone.png"}), "message 0, part 1: gone.png"),
        (user({"type": "image", "url": "http://host/a.png"}), "remote sources are off"),
        (user({"type": "video", "path": "gone.mp4"}), "gone.mp4"),
        ([user("a"), user("b")], "one chat was wanted"),
    ],
)
def test_bad_chats_are_refused(messages, found):
    with pytest.raises(InputError, match=r"wanted|pass ") as caught:
        normalise_messages(messages)
    assert found in str(caught.value)


def test_batches_are_told_from_chats():
    assert is_batch([user("a")])
    assert is_batch([user("a"), "b"])
    assert is_batch([["a"], ["b"]])
    assert is_batch(["a", "b"]) and is_batch(("a",))
    for chat in ("a", ["a", IMAGE], user("a"), user("a") + user("b"), [IMAGE], [], None):
        assert not is_batch(chat)


def test_inputs_are_the_hosts(processor):
    chat = [{"role": "system", "content": "You are helpful"}, *nano.sample_messages()]
    host = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    same(dict(inputs_of(processor, chat)), dict(host))


def test_rows_of_a_batch_are_padded_on_the_left(processor):
    chats = [nano.sample_messages(), user("Image QX:", IMAGE, "What digit is in image QX?"), "What is this?"]
    batch = inputs_of(processor, *chats)
    length = batch["input_ids"].shape[1]
    pixel_rows = []
    for row, chat in enumerate(chats):
        alone = inputs_of(processor, chat)
        pad = length - alone["input_ids"].shape[1]
        assert batch["attention_mask"][row].tolist() == [0] * pad + [1] * (length - pad)
        assert torch.equal(batch["input_ids"][row, pad:], alone["input_ids"][0])
        assert (batch["input_ids"][row, :pad] == processor.tokenizer.pad_token_id).all()
        pixel_rows += [alone["pixel_values"]] if "pixel_values" in alone else []
    assert torch.equal(batch["pixel_values"], torch.cat(pixel_rows))


def test_padding_is_on_the_left_whatever_the_tokenizer_is_set_to(processor):
    wanted = inputs_of(processor, "a", user("a b c"))
    processor.tokenizer.padding_side = "right"
    try:
        same(dict(inputs_of(processor, "a", user("a b c"))), dict(wanted))
        assert processor.tokenizer.padding_side == "right"
        with pytest.raises(InputError):
            inputs_of(processor, "\ud800")
        assert processor.tokenizer.padding_side == "right"
    finally:
        processor.tokenizer.padding_side = "left"


def test_only_floats_are_cast(processor):
    inputs = inputs_of(processor, user(IMAGE, "a"), dtype=torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == torch.int64


@settings(max_examples=25, deadline=None)
@given(chats=st.lists(KINDS, min_size=1, max_size=3))
def test_every_picture_has_its_placeholders(processor, chats):
    parts = {"text": "a word", "image": IMAGE, "video": VIDEO}
    inputs = inputs_of(processor, *(user(*(parts[kind] for kind in chat)) for chat in chats))
    pictures = [sum({"text": 0, "image": 1, "video": 4}[kind] for kind in chat) for chat in chats]
    placeholders = (inputs["input_ids"] == processor.image_token_id).sum(1)
    assert placeholders.tolist() == [TOKENS_PER_IMAGE * n for n in pictures]
    assert len(inputs.get("pixel_values", [])) == sum(pictures)


@pytest.mark.parametrize("mark", ["<IMG_CONTEXT>", "<video>"])
def test_placeholders_in_texts_are_refused(processor, mark):
    system = {"role": "system", "content": mark}
    for chat in (f"look {mark} here", user(IMAGE, mark), [system, *user("a")]):
        with pytest.raises(InputError, match=f"holds '{mark}'"):
            inputs_of(processor, chat)


def test_what_the_processor_cannot_take_is_an_input_error(processor):
    with pytest.raises(InputError, match="batch is empty"):
        builder(processor).batch([])
    with pytest.raises(InputError, match="InternVLProcessor refused the chat") as caught:
        inputs_of(processor, "\ud800")
    assert caught.value.__cause__ is not None
    broken = copy.copy(processor)
    broken.chat_template = "{{ raise_exception('no systems') }}"
    with pytest.raises(InputError, match="no systems"):
        inputs_of(broken, "a")


def test_a_piece_is_what_the_whole_chat_holds_of_it(processor):
    chat = normalise_messages(user("Image QX:", IMAGE, VIDEO, "What digit is in image QX?"))
    make, parts = builder(processor, torch.float32), chat[0].parts
    bare = [make.markers.template_part(part) for part in parts]
    rendered = processor.apply_chat_template(user(*bare), add_generation_prompt=True)
    whole = make.batch([chat])
    same(make.piece(rendered, parts, first=True), whole)
    cut = rendered.index("<video>")
    pieces = [
        make.piece(text, part, first=not n)
        for n, (text, part) in enumerate([(rendered[:cut], parts[:2]), (rendered[cut:], parts[2:])])
    ]
    for key, axis in (("input_ids", 1), ("pixel_values", 0)):
        assert torch.equal(torch.cat([piece[key] for piece in pieces], axis), whole[key])
    with pytest.raises(InputError, match="refused the turn"):
        make.piece("no placeholder", parts[1:2], first=True)


def test_a_videos_times_reach_the_processor(tmp_path):
    """Qwen3-VL writes each frame's second into the prompt; 20 frames at 10 a second, every fifth taken."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame(64, 32, "yuv420p")))
        container.mux(stream.encode())
    tokenizer = AutoTokenizer.from_pretrained(nano.checkpoint_path())
    tokenizer.add_tokens(["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    template = (
        "{% for part in messages[0]['content'] %}{{ part['text'] if part['type'] == 'text' "
        "else '<|vision_start|><video><|vision_end|>' }}{% endfor %}"
    )
    images, videos = Qwen2VLImageProcessor(), Qwen3VLVideoProcessor()
    processor = Qwen3VLProcessor(images, tokenizer, videos, chat_template=template)
    chat = normalise_messages(user({"type": "video", "path": path}, "What happens?"), MediaOptions(num_frames=4))
    inputs = builder(processor).batch([chat])
    text = tokenizer.decode(inputs["input_ids"][0])
    assert inputs["video_grid_thw"][0, 0] == 2  # two frames a step
    assert "<0.2 seconds>" in text and "<1.2 seconds>" in text


def test_an_output_cannot_be_changed():
    output = GenerationOutput("a", [1], None)
    with pytest.raises(AttributeError):
        output.text = "b"
