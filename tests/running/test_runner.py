"""An engine's calls know nothing of each other, also where one fails in the middle."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor

from mminfer import Engine, InferenceConfig, InputError, LookM, nano

QUESTION = "Which image shows a blue 1?"
CONTENT = nano.sample_messages()[0]["content"][:-1]


class Fails(LogitsProcessor):
    """Raises when the second token is about to be chosen."""

    def __init__(self):
        self.steps = 0

    def __call__(self, input_ids, scores):
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("in the middle")
        return scores


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano", InferenceConfig(cache=LookM(0.5, 0.2)))


@pytest.mark.parametrize("chunk_size", [None, 128])
def test_an_answer_after_one_that_failed(engine, chunk_size):
    """Of a batch in which one row ends before the other, so that rows have left when the next call comes."""
    chats = [nano.sample_messages(), "What is the code of owl?"]
    kwargs = {"output_logits": True, "prefill_chunk_size": chunk_size, "max_new_tokens": 4}
    want = engine.generate(chats, **kwargs)
    with pytest.raises(RuntimeError, match="in the middle"):
        engine.generate(chats, logits_processor=[Fails()], **kwargs)
    assert "forward" not in engine.model.__dict__
    for a, b in zip(engine.generate(chats, **kwargs), want, strict=True):
        assert a.token_ids == b.token_ids and torch.equal(a.logits, b.logits)


def test_a_turn_after_one_that_failed(engine):
    """In the middle of the answer, and before the host ever asked for a token."""
    chat = engine.chat()
    chat.read(CONTENT)
    want = chat.fork().send(QUESTION, output_logits=True)
    before = chat.cache.logical_length, chat.cache.lengths
    for kwargs, error in (
        ({"logits_processor": [Fails()]}, "in the middle"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=error):
            chat.send(QUESTION, **kwargs)
        assert (chat.cache.logical_length, chat.cache.lengths) == before
    again = chat.send(QUESTION, output_logits=True)
    assert again.token_ids == want.token_ids and torch.equal(again.logits, want.logits)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_caches_of_callers_are_refused_and_no_cache_at_all(engine, name):
    chat = engine.chat()
    for ask in (engine.generate, engine.stream, chat.send):
        with pytest.raises(InputError, match=name):
            ask("Hi", **{name: DynamicCache()})
    for ask in (
        engine.generate,
        chat.send,
        lambda *args, **kwargs: engine.generate(*args, prefill_chunk_size=64, **kwargs),
    ):
        with pytest.raises(InputError, match="use_cache=False"):
            ask("Hi", use_cache=False)
    assert chat.cache.tokens == ()
