"""Prompts that the engine takes in piece by piece, from lists and iterators, equal the prompt at once."""

import gc
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from mminfer import V2PE, AIMMerge, ConfigError, Engine, InferenceConfig, InputError, LookM, nano
from mminfer.forward.kv_layer import CompressedLayer
from mminfer.inputs.content import MediaOptions
from mminfer.inputs.reader import RequestReader
from mminfer.inputs.reading import Reading
from mminfer.inputs.transcript import Transcript
from tests.tiny_models import llava_onevision_engine

QUESTION = {"type": "text", "text": "Which image shows a blue 1?"}


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


@pytest.fixture(scope="module")
def content():
    return nano.sample_messages()[0]["content"][:-1]


def with_config(engine, config):
    return Engine(engine.model, engine.processor, config)


def chat_of(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("size", [70, *(pytest.param(n, marks=pytest.mark.slow) for n in (140, 333)), 10_000])
@pytest.mark.parametrize(
    "config", [InferenceConfig(), InferenceConfig(V2PE(1 / 16), AIMMerge(0.5)), InferenceConfig(cache=LookM(1.0))]
)
def test_pieces_equal_the_prompt_at_once(engine, content, config, size):
    """From a list and from an iterator; texts stand between the pictures and behind the last one."""
    engine, whole_content = with_config(engine, config), [*content, QUESTION]
    whole = engine.generate(chat_of(whole_content), output_logits=True)
    for given in (whole_content, iter(whole_content)):
        pieces = engine.generate(chat_of(given), prefill_chunk_size=size, output_logits=True)
        assert pieces.token_ids == whole.token_ids
        torch.testing.assert_close(pieces.logits, whole.logits, rtol=0, atol=1e-4)
        ours, theirs = pieces.stats, whole.stats
        for name in ("prompt_tokens", "visual_tokens", "merged_tokens", "layer_rows", "layer_entries", "cache_bytes"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.full_prompt_flops == theirs.full_prompt_flops


def test_an_iterator_without_a_chunk_size_is_read_at_once(engine, content):
    whole = engine.generate([*content, QUESTION], output_logits=True)
    assert torch.equal(engine.generate(iter([*content, QUESTION]), output_logits=True).logits, whole.logits)


def test_images_of_an_iterator_stand_one_after_the_other(engine, content):
    paths = [part["image"] for part in content if part["type"] == "image"]
    runs = [{"type": "images", "images": iter(paths)}, QUESTION]
    single = [*({"type": "image", "image": path} for path in paths), QUESTION]
    whole = engine.generate(single, output_logits=True)
    pieces = engine.generate(iter(runs), prefill_chunk_size=130, output_logits=True)
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=0, atol=1e-4)
    assert pieces.stats.prompt_tokens == whole.stats.prompt_tokens


@pytest.mark.slow
def test_history_batches_beams_and_streams(engine, content):
    history = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [*content[:4], "What is this?"]},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": [*content[4:], QUESTION]},
    ]
    chats = [history, chat_of([QUESTION]), chat_of([*content, QUESTION])]
    whole = engine.generate(chats, output_logits=True)
    pieces = engine.generate(chats, prefill_chunk_size=150, output_logits=True)
    for ours, theirs in zip(pieces, whole, strict=True):
        assert ours.token_ids == theirs.token_ids
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)
    for kwargs in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        ours, theirs = (
            engine.generate(chats, max_new_tokens=4, prefill_chunk_size=size, **kwargs) for size in (150, None)
        )
        assert [o.token_ids for o in ours] == [o.token_ids for o in theirs]
    stream = engine.stream(iter([*content, QUESTION]), prefill_chunk_size=150)
    assert "".join(stream).strip() == whole[2].text
    assert stream.output.stats.prompt_tokens == whole[2].stats.prompt_tokens


def test_a_chat_reads_from_an_iterator(engine, content):
    config = InferenceConfig(V2PE(1 / 16))
    chat = with_config(engine, config).chat(prefill_chunk_size=100, output_logits=True)
    chat.read(iter(content[:6]))
    chat.read(part for part in content[6:])
    whole = with_config(engine, config).generate([*content, QUESTION], output_logits=True)
    torch.testing.assert_close(chat.fork().send(QUESTION["text"]).logits, whole.logits, rtol=0, atol=1e-4)
    assert chat.send(iter([QUESTION])).token_ids == whole.token_ids
    assert chat.send("What is the code of nest?").text == "66"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LookM")
def test_memory_is_bounded_by_chunk_and_budget(engine, content):
    """Pictures are asked for when their piece comes, and the cache is back at its budget."""
    chat = with_config(engine, InferenceConfig(V2PE(1 / 256), cache=LookM(budget=200))).chat(prefill_chunk_size=140)
    ahead = []

    def pictures():
        for k in range(60):
            ahead.append(k - sum(chat.cache.tokens) // 66)
            yield content[2]

    chat.read(pictures())
    assert max(ahead) < 24  # two in a piece, and a group for the template
    assert chat.cache.lengths == [[200]] * 6
    assert chat.cache.tokens == (60 * 66 + 1,)


def broken(content):
    yield from content[:7]
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    "content_of",
    [
        broken,
        lambda content: iter([*content[:7], {"type": "image", "image": "/nowhere.png"}]),
        lambda content: iter([*content[:7], 3]),
    ],
)
def test_an_iterator_that_breaks_names_its_item_and_leaves_nothing(engine, content, content_of):
    forward = engine.model.forward
    with pytest.raises(InputError, match=r"message 0, part 7"):
        engine.generate(chat_of(content_of(content)), prefill_chunk_size=100)
    chat = engine.chat(prefill_chunk_size=100)
    chat.read(content)
    layers, entries = chat.cache.layers, chat.cache.lengths
    with pytest.raises(InputError, match=r"part 7"):
        chat.read(content_of(content))
    assert chat.cache.layers is layers and chat.cache.lengths == entries
    assert engine.model.forward == forward
    assert chat.send(QUESTION["text"]).text == engine.generate([*content, QUESTION]).text


def test_a_stop_in_the_middle_gives_everything_back(engine, content):
    def stopped():
        yield from content[:7]
        raise KeyboardInterrupt

    chat = engine.chat(prefill_chunk_size=100)
    for act in (lambda: engine.generate(stopped(), prefill_chunk_size=100), lambda: chat.read(stopped())):
        with pytest.raises(KeyboardInterrupt):
            act()
    assert chat.cache.layers == [] and chat.cache.tokens == ()
    assert "forward" not in engine.model.__dict__
    assert engine.generate([*content, QUESTION]).text == "WB"


def test_mistakes_of_a_list_are_found_before_anything_runs(engine, content, monkeypatch):
    monkeypatch.setattr(type(engine.runner), "answer", lambda *_, **__: pytest.fail("ran"))
    for part in ({"type": "image", "image": "/nowhere.png"}, {"type": "images", "images": 3}, {"type": "x"}, 3):
        with pytest.raises(InputError, match="message 0, part 18"):
            engine.generate(chat_of([*content, part]), prefill_chunk_size=100)
    with pytest.raises(ConfigError, match="prefill_chunk_size='a'"):
        engine.generate(content, prefill_chunk_size="a")
    with pytest.raises(ConfigError, match="prefill_chunk_size=0"):
        engine.chat(prefill_chunk_size=0)
    auto = with_config(engine, InferenceConfig(V2PE("auto")))
    with pytest.raises(ConfigError, match=r"V2PE.delta"):
        auto.generate(content, prefill_chunk_size=100)


def test_a_chunk_smaller_than_an_image_is_refused(engine, content):
    with pytest.raises(InputError, match=r"prefill_chunk_size=40.* 64 tokens"):
        engine.generate(content, prefill_chunk_size=40)


class Numbering:
    """A processor whose template writes the number of each image before it."""

    def __init__(self, processor):
        self._processor, self.tokenizer = processor, processor.tokenizer
        self.image_token, self.video_token = processor.image_token, processor.video_token

    def __call__(self, *args, **kwargs):
        return self._processor(*args, **kwargs)

    def apply_chat_template(self, messages, **kwargs):
        template = (
            "{% set count = namespace(n=0) %}{% for m in messages %}{% for p in m['content'] %}"
            "{% if p['type'] == 'image' %}{% set count.n = count.n + 1 %}{{ count.n }}<IMG_CONTEXT>"
            "{% else %}{{ p['text'] }}{% endif %}"
            "{% endfor %}{% endfor %}"
        )
        return self._processor.apply_chat_template(messages, chat_template=template, **kwargs)


def test_templates_that_number_images_are_refused(engine, content):
    """What a piece says would depend on the pieces before it."""
    reader, parts = RequestReader(engine.model, Numbering(engine.processor), engine.adapter), [content[2]] * 40
    with pytest.raises(InputError, match="depend on the images before"):
        list(reader.readings(chat_of(iter(parts)), MediaOptions(), 200)())
    assert len(list(reader.turn(Transcript(), parts, MediaOptions(), closes=True, size=None))) == 1


def test_a_list_may_come_by_a_template_that_numbers_images(engine, content):
    """It is rendered as a whole, so that each image has its number in whatever piece."""
    engine, parts = Engine(engine.model, Numbering(engine.processor)), [*[content[2]] * 12, QUESTION]
    whole, pieces = (engine.generate(parts, 3, output_logits=True, prefill_chunk_size=size) for size in (None, 200))
    assert whole.stats.prompt_tokens == pieces.stats.prompt_tokens
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_an_image_in_a_piece_is_encoded_as_in_the_whole_prompt(content, count):
    """This processor cuts an image that comes alone into tiles, so no piece of a prompt of many holds only one."""
    engine = Engine(*llava_onevision_engine())
    images = [part for part in content if part["type"] == "image"][:count]
    whole, pieces = (
        engine.generate([*images, "What is the code?"], max_new_tokens=3, output_logits=True, prefill_chunk_size=size)
        for size in (None, 60)
    )
    assert pieces.stats.visual_tokens == whole.stats.visual_tokens
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_what_was_read_is_let_go_of_after_a_stop(engine, content):
    """No layer of a cache outlives the call that was stopped, and no tensor either."""

    def held():
        """Layers of caches that are alive, and the bytes of everything that tensors hold (process memory drifts)."""
        gc.collect()
        things = gc.get_objects()
        tensors = (
            x for x in things if type(x) is torch.Tensor and x.layout == torch.strided and x.device.type == "cpu"
        )
        storages = {storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, tensors)}
        return sum(isinstance(thing, CompressedLayer) for thing in things), sum(storages.values())

    def stopped():
        yield from (content[2] for _ in range(200))
        raise KeyboardInterrupt

    layers, size = held()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.generate(stopped(), prefill_chunk_size=1000)
    layers_after, size_after = held()
    assert layers_after == layers
    assert size_after - size < 10 * 2**20  # two caches would be 80 MiB


@pytest.mark.parametrize("order", ["ivivi", "viiv", "ivvvi"])
def test_videos_do_not_count_among_a_pieces_two_images(content, order):
    engine = Engine(*llava_onevision_engine())
    image = next(part for part in content if part["type"] == "image")
    video = {"type": "video", "video": np.zeros((2, 16, 16, 3), np.uint8)}
    parts = [image if kind == "i" else video for kind in order]
    whole, pieces = (
        engine.generate([*parts, "What?"], max_new_tokens=2, output_logits=True, prefill_chunk_size=size)
        for size in (None, 60)
    )
    assert pieces.stats.visual_tokens == whole.stats.visual_tokens
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=0, atol=1e-4)


def test_pieces_of_one_token_go_in(engine, content):
    chat, whole = (engine.chat(output_logits=True) for _ in range(2))
    for text in ("Hi", "you"):
        chat.read(text)
    whole.read(["Hi", "you"])
    assert chat.cache.tokens == whole.cache.tokens
    torch.testing.assert_close(chat.send("").logits, whole.send("").logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [None, 100])
def test_an_empty_prompt_is_refused_and_an_empty_reading_adds_nothing(engine, content, size):
    for nothing in ("", [], iter([]), ["  "]):
        with pytest.raises(InputError, match="empty"):
            engine.generate(chat_of(nothing), prefill_chunk_size=size)
    chat = engine.chat(prefill_chunk_size=size)
    with pytest.raises(InputError, match="empty"):
        chat.send([])
    chat.read(content)
    held = chat.cache.lengths
    chat.read(iter([]))
    assert chat.cache.lengths == held and chat.send(QUESTION["text"]).text == "WB"


def test_an_iterator_that_asks_the_model_is_told_so(engine, content):
    with pytest.raises(InputError, match="asks the model that reads it"):
        engine.chat(prefill_chunk_size=100).read(engine.generate(content[:3]).text for _ in range(2))
    assert engine.generate([*content, QUESTION]).text == "WB"


def test_a_stream_stops_while_its_prompt_is_read(engine, content):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield content[2]

    stream = engine.stream(endless(), prefill_chunk_size=200)
    while len(taken) < 50:
        time.sleep(0.01)
    stream.close()
    count = len(taken)
    time.sleep(0.1)
    assert len(taken) == count and stream.output is None
    assert list(stream) == []


def test_generation_arguments_are_looked_at_before_the_prompt(engine, content, monkeypatch):
    monkeypatch.setattr(Reading, "__iter__", lambda self: pytest.fail("read"))
    with pytest.raises(InputError, match="max_new_tokns"):
        engine.generate([*content, QUESTION], prefill_chunk_size=100, max_new_tokns=3)
    with pytest.raises(InputError, match="goes on from one answer"):
        engine.chat(prefill_chunk_size=100).send("x", generation_config=GenerationConfig(num_beams=2))


def test_beams_of_a_generation_config(engine, content):
    config = GenerationConfig(num_beams=3, max_new_tokens=3, eos_token_id=1, pad_token_id=0)
    ours, theirs = (
        engine.generate([*content, QUESTION], prefill_chunk_size=size, generation_config=config) for size in (150, None)
    )
    assert ours.token_ids == theirs.token_ids


def test_pieces_grow_no_faster_than_twofold(engine, content):
    """What one image takes may grow from piece to piece."""
    reading = engine.reader.readings(chat_of([content[2]] * 40), MediaOptions(), 100_000)()
    held = [piece["pixel_values"].shape[0] for piece in reading]
    assert held[0] == 1 and sum(held) == 40
    assert all(later <= 2 * earlier for earlier, later in pairwise(held))


def test_placeholders_in_history_are_named(engine, content):
    history = [
        {"role": "user", "content": "what is <IMG_CONTEXT>?"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": [*content, QUESTION]},
    ]
    with pytest.raises(InputError, match=r"'what is <IMG_CONTEXT>.'.* holds"):
        engine.generate(history, prefill_chunk_size=100)


PARTS = {
    "i": lambda: {"type": "image", "image": Image.new("RGB", (64, 64), "red")},
    "1": lambda: {"type": "embedding", "embedding": torch.full((1, 192), 0.1)},
    "e": lambda: {"type": "embedding", "embedding": torch.full((4, 192), 0.1)},
    "E": lambda: {"type": "embedding", "embedding": torch.full((40, 192), 0.1)},
    "t": lambda: "ab cd. ",
}
IMAGES_FIRST = [67, *[132] * 9, 148]


@pytest.mark.parametrize(
    ("kinds", "size", "tokens"),
    [
        ("ie", 5000, [73]),
        ("iiee", 150, [67, 76]),
        ("eitit", 150, [76, 73]),
        ("tete", 150, [21]),
        ("e" * 20, 5000, [83]),
        ("E" * 40, 150, [1281, 322]),
        ("E" * 40, 5000, [1603]),
        ("et" * 20, 150, [145, 38]),
        ("ieiet" * 6, 150, [71, *[145] * 5, 77]),
        ("ieiet" * 6, 5000, [71, 145, 286, 371]),
        ("iE" * 12, 150, [107, *[106] * 10, 108]),
        ("i" * 20 + "e" * 20, 150, IMAGES_FIRST),
        ("1" * 50 + "i" + "1" * 30, 5000, [130, 19]),
        ("i" * 5 + "E" * 30 + "t", 150, [67, 132, 66, 506, 640, 127]),
    ],
)
def test_pieces_begin_at_media_and_at_every_sixteenth_part_or_so(engine, kinds, size, tokens):
    """An embedding belongs to the piece of what stands before it, but for one that a group of parts begins with."""
    for given in (list, iter):
        content = given([PARTS[kind]() for kind in kinds])
        reading = engine.reader.readings(chat_of(content), MediaOptions(), size)()
        assert [inputs["input_ids"].shape[1] for inputs in reading] == tokens


@pytest.mark.parametrize("size", [150, 5000])
def test_embeddings_of_the_turns_before_make_no_pieces(engine, size):
    history = [*chat_of(["a", *(PARTS[kind]() for kind in "ieE")]), {"role": "assistant", "content": "7"}]
    reading = engine.reader.readings([*history, *chat_of([PARTS["i"](), PARTS["e"]()])], MediaOptions(), size)()
    assert [inputs["input_ids"].shape[1] for inputs in reading] == [117, 72]


def test_embeddings_behind_an_image_go_in_with_it(engine):
    """Where the prompt fits in a chunk, evicting settings give what the prompt at once gives."""
    engine = with_config(engine, InferenceConfig.from_preset("digest-50"))
    rows = torch.randn(4, 192, generator=torch.Generator().manual_seed(3))
    content = [PARTS["i"](), {"type": "embedding", "embedding": rows}, "What digit is it?"]
    for size in (None, 5000):
        assert engine.generate(chat_of(content), prefill_chunk_size=size).token_ids == [739, 1]


def test_texts_that_no_tokenizer_takes_are_refused(engine):
    for size in (None, 50):
        with pytest.raises(InputError, match="refused the"):
            engine.generate("\ud800", 2, prefill_chunk_size=size)
