"""Marks in the band: what the model or a user writes moves no medium and breaks no chat, or is refused by name."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mminfer import Engine, InputError
from mminfer.inputs import transcript
from mminfer.inputs.content import MediaOptions
from mminfer.layout import Modality
from tests.processors import CONTROL, PROCESSORS, model_and_processor, reader_of

IMAGE = {"type": "image", "image": Image.new("RGB", (32, 32), "red")}
OURS = ["\u27e6mminfer:answer:0\u27e7", "\u27e6mminfer:answer:1\u27e7", "\u27e6mminfer:open\u27e7", "Frame1: ", "IMAGE"]


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


def answered(engine, tokens, **options):
    """A chat whose first answer is of these tokens."""
    chat, left = engine.chat(output_logits=True, **options), iter(tokens)
    chat.send([IMAGE, "What?"], len(tokens), prefix_allowed_tokens_fn=lambda *_: [next(left)])
    return chat


@pytest.mark.parametrize("mark", ["<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<|pad|>", "<|user|>"])
@pytest.mark.parametrize("size", [None, 100])
def test_a_mark_in_an_answer_is_text(engine, tmp_path, mark, size):
    """In its middle and at its end; with a medium in the next turn, after a fork, and from a file."""
    token = engine.processor.tokenizer.convert_tokens_to_ids(mark)
    chat = answered(engine, [300, token, 301, token], prefill_chunk_size=size)
    chat.save(tmp_path / "chat.safetensors")
    loaded = engine.load_chat(tmp_path / "chat.safetensors", prefill_chunk_size=size, output_logits=True)
    for content in ("Which?", [IMAGE, "Which?"], [{"type": "embedding", "embedding": torch.ones(2, 192)}, "Which?"]):
        turns = [one.send(content, 2) for one in (chat.fork(), loaded.fork())]
        assert turns[0].token_ids == turns[1].token_ids
        assert torch.equal(turns[0].logits, turns[1].logits) and turns[0].logits.isfinite().all()


def test_the_row_of_a_mark_is_what_the_host_reads(engine):
    """The host takes a token of an answer by its row, whatever it is."""
    token = engine.processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    ids = engine.prepare(["What?"])["input_ids"]
    chat, left = engine.chat(output_logits=True), iter([300, token])
    chat.send("What?", 2, prefix_allowed_tokens_fn=lambda *_: [next(left)])
    ours = chat.send("Which?", 1).logits[0]
    template = engine.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}], add_generation_prompt=True
    )
    rest = engine.processor.tokenizer("<|end|>" + template, return_tensors="pt").input_ids
    whole = torch.cat([ids, torch.tensor([[300, token]]), rest], 1)
    with torch.no_grad():
        theirs = engine.model(input_ids=whole).logits[0, -1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [None, 100])
def test_texts_that_quote_our_marks_are_text(engine, size):
    for mark in OURS:
        content = [f"a {mark} b", IMAGE, f"{mark} c {mark}", IMAGE, mark]
        at_once = engine.generate(content, 2, output_logits=True)
        chat = engine.chat(prefill_chunk_size=size, output_logits=True)
        torch.testing.assert_close(chat.fork().send(content, 2).logits, at_once.logits, rtol=0, atol=1e-4)
        chat.read(content)
        chat.send("What?", 2)
        assert chat.send([mark, IMAGE], 2).logits.isfinite().all()


def test_no_two_marks_are_alike():
    marks = {transcript.new_mark("open") for _ in range(100)}
    assert len(marks) == 100 and all(mark.isprintable() for mark in marks)


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("images", [0, 2])
def test_a_placeholder_out_of_two_texts_is_refused(family, images):
    """No part holds it, so that it shows in the rendered text alone; no layer has run by then."""
    engine = Engine(*model_and_processor(family))
    mark, ran = engine.processor.image_token, []
    hook = engine.adapter.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    content = [mark[:3], {"type": "text", "text": mark[3:]}, *[IMAGE] * images, "What?"]
    try:
        for size in (None, 1000):
            with pytest.raises(InputError):
                engine.generate([{"role": "user", "content": content}], 1, prefill_chunk_size=size)
        assert not ran
    finally:
        hook.remove()


def test_the_filler_in_the_system_prompt_is_named(engine):
    filler, part = engine.reader.markers.filler, {"type": "embedding", "embedding": torch.ones(2, 192)}
    for size in (None, 100):
        chat = engine.chat(system=f"a {filler} b", prefill_chunk_size=size)
        for content in ([part, "What?"], iter([part, "What?"])):
            with pytest.raises(InputError, match="stands for rows of embeddings"):
                chat.send(content, 1)
        assert chat.send("What?", 1).token_ids


def test_requests_without_a_processor_are_refused(engine):
    wrong = Engine(engine.model, None)
    for act in (
        lambda: wrong.generate("Hi", 1),
        lambda: wrong.generate("Hi", 1, prefill_chunk_size=9),
        lambda: wrong.stream("Hi", 1),
        lambda: wrong.chat().send("Hi", 1),
        lambda: wrong.chat(system="a"),
    ):
        with pytest.raises(InputError, match=r"the processor is .*wanted the model's own"):
            act()


@pytest.mark.parametrize("family", PROCESSORS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_marks_of_every_family_move_no_medium(family, data):
    """Texts of all its marks beside an image: refused by name, or the host's own tokens at once and in pieces."""
    reader, tokenizer = reader_of(family), model_and_processor(family)[1].tokenizer
    quoted = st.sampled_from([*tokenizer.get_added_vocab(), *OURS, "a", " ", "\n"])
    before, after = (data.draw(st.lists(quoted, max_size=3).map("".join)) for _ in range(2))
    rows = data.draw(st.sampled_from([[], [{"type": "embedding", "embedding": np.ones((2, 64), np.float32)}]]))
    chat = [{"role": "user", "content": [before, IMAGE, after, IMAGE, *rows, "What?"]}]
    try:
        whole = reader.inputs([chat], MediaOptions())
    except InputError as error:
        assert len(str(error)) < 400
        with pytest.raises(InputError):
            list(reader.readings(chat, MediaOptions(), 1)())
        return
    pieces = list(reader.readings(chat, MediaOptions(), 1)())
    assert torch.cat([piece["input_ids"] for piece in pieces], 1).tolist() == whole["input_ids"].tolist()
    images = (whole["input_ids"] == reader._adapter.placeholder_id(Modality.IMAGE)).sum()
    alone = reader.inputs([[IMAGE, IMAGE]], MediaOptions())["input_ids"]
    assert int(images) == int((alone == reader._adapter.placeholder_id(Modality.IMAGE)).sum())


@pytest.mark.parametrize("family", PROCESSORS)
def test_any_mark_may_end_an_answer(family):
    """Of every family: the next turn has a medium, at once and in pieces, and both give the same."""
    engine = Engine(*model_and_processor(family))
    control = engine.processor.tokenizer.convert_tokens_to_ids(CONTROL)
    for token in sorted(engine.reader.markers.added_ids - set(control)):
        logits = []
        for size in (None, 40):
            chat = answered(engine, [50, token], prefill_chunk_size=size)
            logits.append(chat.send(["a", IMAGE, "b", IMAGE, "What?"], 1).logits)
        assert logits[0].isfinite().all()
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
