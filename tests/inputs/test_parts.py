"""Parts as types: checked when they are made, and passed through the door as they are."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from mminfer import Engine, InputError, nano
from mminfer.inputs.content import MediaOptions
from mminfer.inputs.messages import normalise_messages, parse_chat
from mminfer.inputs.parts import EmbeddingPart, ImagePart, Message, TextPart, VideoPart

FRAMES = np.stack([np.full((32, 32, 3), 20 * k, np.uint8) for k in range(4)])


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: TextPart(3), '"text" is int: wanted a string'),
        (lambda: ImagePart("a.png"), "the image is str: wanted an RGB"),
        (lambda: ImagePart(Image.new("L", (2, 2))), "the image is L: wanted an RGB"),
        (lambda: ImagePart(Image.new("RGB", (0, 0))), "the image is 0 x 0 pixels"),
        (lambda: VideoPart(FRAMES, metadata=5), "the metadata are int: wanted a dictionary"),
        (lambda: Message("user", 5), "the parts of a message are int"),
        (lambda: Message("user", TextPart("a")), "the parts of a message are TextPart: wanted a tuple"),
        (lambda: VideoPart([1]), "the frames are list: wanted"),
        (lambda: VideoPart(FRAMES.astype(np.float32)), "float32.*wanted uint8"),
        (lambda: EmbeddingPart([[0.0]]), "list: wanted a floating-point"),
        (lambda: EmbeddingPart(torch.zeros(3)), r"shape \[3\]"),
        (lambda: EmbeddingPart(torch.full((1, 2), torch.inf)), "not finite"),
        (lambda: EmbeddingPart(torch.zeros(1, 2), "sound"), "'sound'"),
        (lambda: Message("tool", ()), "role 'tool'"),
        (lambda: Message("user", ({"type": "text", "text": "a"},)), "holds a dict"),
    ],
)
def test_wrong_parts_cannot_be_made(make, found):
    with pytest.raises(InputError, match=found):
        make()


def test_parts_cannot_be_changed():
    part = TextPart("a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.text = "b"


def test_frames_alone_are_the_whole_video():
    part = VideoPart(FRAMES, {"fps": 2.0})
    assert part.metadata["frames_indices"] == [0, 1, 2, 3] and part.metadata["total_num_frames"] == 4
    assert part.metadata["fps"] == 2.0 and (part.metadata["height"], part.metadata["width"]) == (32, 32)


def test_typed_messages_pass_through_untouched(engine):
    image = ImagePart(Image.new("RGB", (32, 32)))
    rows = EmbeddingPart(torch.zeros(2, engine.adapter.spec.hidden_size))
    chat = [Message("system", (TextPart("Look."),)), Message("user", (image, rows, VideoPart(FRAMES), TextPart("a")))]
    for checked in (engine.check(chat), normalise_messages(chat), normalise_messages(parse_chat(chat, MediaOptions()))):
        assert all(new is old for new, old in zip(checked, chat, strict=True))
    limited = engine.check(chat, max_video_tokens=130)
    assert limited[0] is chat[0] and len(limited[1].parts[2].frames) == 2 and len(chat[1].parts[2].frames) == 4


def test_typed_parts_stand_beside_dicts(engine):
    image = nano.sample_messages()[0]["content"][2]
    (loaded,) = normalise_messages([image])[0].parts
    question = "What digit is it?"
    whole = engine.generate([image, question], 3, output_logits=True)
    for content in ([loaded, question], [loaded, TextPart(question)], iter([loaded, question])):
        assert torch.equal(engine.generate(content, 3, output_logits=True).logits, whole.logits)
    run = {"type": "images", "images": [loaded]}
    assert torch.equal(engine.generate([run, question], 3, output_logits=True).logits, whole.logits)
    typed = [Message("user", (loaded, TextPart(question)))]
    first, second = engine.generate([typed, typed], 3)
    assert first.token_ids == second.token_ids == whole.token_ids


def test_typed_embeddings_of_another_width_are_refused_with_their_place(engine):
    part = EmbeddingPart(torch.zeros(2, 7))
    for size in (None, 100):
        with pytest.raises(InputError, match=r"message 0, part 1: .*\[2, 7\].* 192 wide"):
            engine.generate(["Look:", part], prefill_chunk_size=size)


def test_typed_chats_keep_the_order_of_roles():
    with pytest.raises(InputError, match="the last message is the assistant's"):
        normalise_messages([Message("user", (TextPart("a"),)), Message("assistant", (TextPart("b"),))])


def test_typed_media_stand_in_dicts_and_parts_alone_are_chats(engine):
    image = ImagePart(Image.new("RGB", (32, 32)))
    video = VideoPart(FRAMES)
    for given, part in (({"type": "image", "image": image}, image), ({"type": "video", "video": video}, video)):
        assert engine.check([given, "a"])[0].parts[0] is part
    for part in (TextPart("a"), image, video):
        assert engine.check(part)[0].parts == (part,)
        assert engine.check([{"role": "user", "content": part}])[0].parts == (part,)
    message = Message("user", (TextPart("a"),))
    assert engine.check(message)[0] is message
    whole = engine.generate("a", 3)
    for chat in (TextPart("a"), message):
        for size in (None, 100):
            assert engine.generate(chat, 3, prefill_chunk_size=size).token_ids == whole.token_ids
    with pytest.raises(InputError, match="the image is a VideoPart"):
        engine.check({"type": "image", "image": video} for _ in range(1))
