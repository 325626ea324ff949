"""Ready-made embeddings as parts of a message: an image's own features in its place give what the image gives."""

import numpy as np
import pytest
import torch

from mminfer import V2PE, AIMMerge, Engine, InferenceConfig, InputError, LookM, OperatorSkip, nano
from mminfer.layout import GivenRows, Modality
from mminfer.models.registry import adapter_for
from tests.tiny import FAMILIES, IMAGE, tiny_inputs, tiny_model

QUESTION = "Which image shows a blue 1?"
QUESTION_CHAT = {"role": "user", "content": QUESTION}


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


@pytest.fixture(scope="module")
def content():
    return nano.sample_messages()[0]["content"][:-1]


@pytest.fixture(scope="module")
def features(engine, content):
    """The features of the bundled pictures."""
    inputs = engine.prepare([[{"role": "user", "content": [p for p in content if p["type"] == "image"]}]])
    with torch.no_grad():
        return [unit.features for unit in engine.adapter.visual_units(inputs)[Modality.IMAGE]]


def with_config(engine, config):
    return Engine(engine.model, engine.processor, config)


def embedded(content, features, **how):
    """The content with every image's features, between the marks that the processor puts around an image."""
    given = iter(features)
    parts = []
    for part in content:
        if part["type"] == "image":
            parts += ["<img>", {"type": "embedding", "embedding": next(given), **how}, "</img>"]
        else:
            parts.append(part)
    return parts


@pytest.mark.parametrize("size", [None, 100])
@pytest.mark.parametrize(
    "config",
    [
        InferenceConfig(),
        InferenceConfig(V2PE(1 / 16), AIMMerge(0.5), skip=OperatorSkip(ffn=[3])),
        InferenceConfig(cache=LookM(0.3, 0.1)),
    ],
)
def test_an_images_features_give_what_the_image_gives(engine, content, features, config, size):
    if config.cache is not None and size is not None:
        pytest.skip("pieces end elsewhere, so that other entries leave")
    engine = with_config(engine, config)
    theirs = engine.generate([*content, QUESTION], output_logits=True, prefill_chunk_size=size)
    ours = engine.generate([*embedded(content, features), QUESTION], output_logits=True, prefill_chunk_size=size)
    assert ours.stats.visual_tokens == theirs.stats.visual_tokens == 512
    assert ours.stats.layer_rows == theirs.stats.layer_rows
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)


def test_text_embeddings_are_text(engine):
    """Embeddings of token ids in place of the text they came from, and techniques leave them alone."""
    text = "The code of owl is 47."
    ids = engine.processor.tokenizer(text, return_tensors="pt").input_ids[0]
    rows = engine.model.get_input_embeddings()(ids)
    engine = with_config(engine, InferenceConfig(V2PE(1 / 16), AIMMerge(0.5)))
    part = {"type": "embedding", "embedding": rows, "modality": "text"}
    chats = [[x, "What is the code of owl?"] for x in (part, text)]
    ours, theirs = (engine.generate([chat], output_logits=True)[0] for chat in chats)
    assert ours.stats.visual_tokens == 0
    assert ours.text == theirs.text == "47"
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)


def test_batches_chats_and_arrays(engine, content, features):
    parts = embedded(content, [f.numpy() for f in features])
    chats = [[{"role": "user", "content": c}] for c in ([*parts, QUESTION], [QUESTION], [*content, QUESTION])]
    outs = engine.generate(chats, output_logits=True)
    alone = [engine.generate(chat, output_logits=True) for chat in chats]
    for out, one in zip(outs, alone, strict=True):
        torch.testing.assert_close(out.logits, one.logits, rtol=0, atol=1e-4)
    chat = engine.chat(output_logits=True)
    chat.send("What?", max_new_tokens=1)  # leaves a token unread
    before = engine.chat(output_logits=True)
    before.send("What?", max_new_tokens=1)
    ours, theirs = chat.send([*parts, QUESTION]), before.send([*content, QUESTION])
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_rows_in_place_of_tokens(family):
    """The adapter's part: rows go in as images of their own beside real ones, and keep the prompt's order."""
    model, inputs = tiny_model(family), tiny_inputs(family, [[3, IMAGE, 8], [6]])
    adapter = adapter_for(model)
    embeds, layout = adapter.embed(inputs)
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[0, -4:-1] = mask[1, -3:-1] = True
    rows = torch.randn(5, embeds.shape[1])
    kinds = torch.tensor([1, 1, 1, 0, 0], dtype=torch.int8)
    ours, ready = adapter.embed(inputs, GivenRows(mask, rows, kinds, torch.tensor([0, 0, 0, 1, 1])))
    places = mask[inputs["attention_mask"].bool()].nonzero()[:, 0]
    assert torch.equal(ours[places], rows)
    others = torch.ones(len(layout), dtype=torch.bool).index_fill(0, places, False)
    assert torch.equal(ours[others], embeds[others])
    assert ready.modality[places].tolist() == [1, 1, 1, 0, 0]
    own = ready.image_id[places[:3]].unique()
    assert len(own) == 1 and own[0] >= 0 and not bool((ready.image_id[others] == own).any())
    assert ready.image_id[places[3:]].tolist() == [-1, -1]
    assert torch.equal(ready.position, layout.position)
    if layout.companions is not None:
        assert len(ready.companions) == int(ready.is_visual.sum())
        assert not ready.companions[torch.isin(ready.visual_rows, places)].any()


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ({"embedding": torch.zeros(4, 100)}, r"\[4, 100\].* 192 wide"),
        ({"embedding": torch.zeros(192)}, r"\[192\].*\[n, C\]"),
        ({"embedding": torch.zeros(0, 192)}, r"\[0, 192\].*1 or more"),
        ({"embedding": torch.zeros(4, 192, dtype=torch.int64)}, r"int64.*floating"),
        ({"embedding": torch.full((4, 192), torch.nan)}, "not finite"),
        ({"embedding": np.full((4, 192), np.inf)}, "not finite"),
        ({"embedding": [[0.0] * 192]}, "list: wanted"),
        ({}, "NoneType: wanted"),
        ({"embedding": torch.zeros(4, 192), "modality": "sound"}, "'sound'"),
    ],
)
def test_wrong_embeddings_are_refused(engine, part, wanted):
    for size in (None, 100):
        with pytest.raises(InputError, match=rf"message 0, part 1: .*{wanted}"):
            engine.generate(["Look:", {"type": "embedding", **part}], prefill_chunk_size=size)


def test_the_filler_is_no_token_of_media_or_template(engine):
    assert engine.reader.markers.filler == "<|pad|>"
    part = {"type": "embedding", "embedding": torch.zeros(2, 192)}
    for parts in ([part, "a <|pad|> b"], ["a <|pad|> b", part]):
        for size in (None, 100):
            with pytest.raises(InputError, match=r"'a <\|pad\|> b' holds"):
                engine.generate(parts, prefill_chunk_size=size)
    assert engine.generate("What is <|pad|>?", max_new_tokens=1).token_ids
    history = [{"role": "user", "content": "a <|pad|> b"}, {"role": "assistant", "content": "7"}]
    for content in ([part, "What?"], iter([part, "What?"])):
        with pytest.raises(InputError, match=r"'a <\|pad\|> b' holds"):
            engine.generate([*history, {"role": "user", "content": content}], prefill_chunk_size=100)


def test_one_row_goes_on_in_an_open_turn(engine, features):
    """It is no step of decoding, though it is one token with nothing to see."""
    part = {"type": "embedding", "embedding": features[0][:1]}
    chat = engine.chat(output_logits=True)
    chat.read("Background:")
    chat.read([part])
    assert chat.cache.tokens == engine_tokens(engine, ["Background:", part])
    whole = engine.generate(["Background:", part, QUESTION], output_logits=True)
    torch.testing.assert_close(chat.send(QUESTION).logits, whole.logits, rtol=0, atol=1e-4)


def engine_tokens(engine, content):
    chat = engine.chat()
    chat.read(content)
    return chat.cache.tokens


def test_embeddings_go_with_beams(engine, content, features):
    chats = [[{"role": "user", "content": [*embedded(content[:4], features), QUESTION]}], [QUESTION_CHAT]]
    ours, theirs = (
        engine.generate(chats, max_new_tokens=3, num_beams=3, num_return_sequences=2, prefill_chunk_size=size)
        for size in (None, 5000)
    )
    assert [o.token_ids for o in ours] == [o.token_ids for o in theirs]


@pytest.mark.slow
def test_many_embeddings_come_piece_by_piece(engine, features):
    """An iterator of them is not drained at once, and nothing changes."""
    config = InferenceConfig(V2PE(1 / 16))
    engine, ahead = with_config(engine, config), []
    parts = [{"type": "embedding", "embedding": features[k % 8]} for k in range(120)]
    chat = engine.chat(prefill_chunk_size=200, output_logits=True)

    def given():
        for k, part in enumerate(parts):
            ahead.append(k - sum(chat.cache.tokens) // 64)
            yield part

    chat.read(given())
    assert max(ahead) < 60  # two groups for the template, and one in its piece
    whole = engine.chat(output_logits=True)
    whole.read(parts)
    ours, theirs = chat.send(QUESTION), whole.send(QUESTION)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)
