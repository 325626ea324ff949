"""What is kept: found by content alone, bounded in bytes, the least used first out."""

import pytest
from PIL import Image

from mminfer import Engine
from mminfer.inputs.parts import ImagePart, Message, TextPart
from mminfer.inputs.transcript import Transcript
from mminfer.serving.content import Chat
from mminfer.serving.prefixes import PrefixStore, PromptFacts, stations_of

IMAGE = ImagePart(Image.new("RGB", (8, 8)))


@pytest.fixture(scope="module")
def cache():
    chat = Engine.from_pretrained("nano").chat()
    chat.read("Some words to keep.")
    return chat.cache


def chat_of(*messages):
    """Of roles and words; a word that begins with # is an image."""
    typed = [
        Message(role, tuple(IMAGE if word.startswith("#") else TextPart(word) for word in words))
        for role, *words in messages
    ]
    return Chat(tuple(typed), tuple(tuple(word.encode() for word in words) for _, *words in messages))


def keys(*messages, beginning=b"settings"):
    stations, end = stations_of(chat_of(*messages), beginning)
    return [station.key for station in stations], end


def test_stations_stand_behind_images_and_answers():
    messages = ("system", "a"), ("user", "b", "#c", "d", "#e", "f"), ("assistant", "g"), ("user", "h")
    stations, _ = stations_of(chat_of(*messages), b"")
    assert [(one.messages, one.parts, one.is_read_to) for one in stations] == [(2, 4, True), (3, 1, False)]
    assert stations_of(chat_of(("user", "only words")), b"")[0] == []


def test_keys_tell_all_that_stands_before_apart():
    turn = ("user", "#a", "b")
    (key,), end = keys(turn)
    assert keys(("user", "#a", "c"))[0] == [key] != keys(("user", "#b", "b"))[0]
    others = [
        keys(turn, beginning=b"other"), keys(("system", "s"), turn), keys(("user", "x", "#a", "b")),
        keys(("user", "#x", "#a", "b")),
    ]  # fmt: skip
    assert len({key, end, *(one[-1] for one, _ in others), *(last for _, last in others)}) == 2 + 2 * len(others)


def test_bytes_are_bounded_and_the_least_used_goes_first(cache):
    one = PrefixStore(2**30)
    one.put(b"a", cache, 0, Transcript(), PromptFacts())
    size = one.nbytes
    store = PrefixStore(2 * size)
    for key in (b"a", b"b"):
        store.put(key, cache, 0, Transcript(), PromptFacts())
    assert store.get(b"a") is not None
    store.put(b"c", cache, 0, Transcript(), PromptFacts())
    assert store.get(b"b") is None and store.get(b"a") and store.get(b"c")
    assert len(store) == 2 and store.nbytes == 2 * size
    assert size == store.get(b"a").cache.allocated_bytes >= cache.nbytes
    for most in (0, size - 1):
        small = PrefixStore(most)
        small.put(b"a", cache, 0, Transcript(), PromptFacts())
        assert len(small) == small.nbytes == 0
