"""Whatever the host has renamed, users of ours hear nothing of it."""

import logging
import warnings

import pytest

from mminfer import Engine, InferenceConfig, LookM, nano, patched

SHORT = nano.sample_messages()[0]["content"][:3]


def _generate(engine):
    engine.generate([{"role": "user", "content": SHORT}], 2, num_beams=2)


def _sample_in_chunks(engine):
    engine.generate(SHORT, 2, do_sample=True, num_return_sequences=2, prefill_chunk_size=70)


def _stream(engine):
    list(engine.stream(SHORT, 2))


def _chat(engine):
    chat = engine.chat()
    chat.read(SHORT)
    chat.send("Which code?", 2)


def _patched(engine):
    inputs = dict(engine.prepare([[{"role": "user", "content": SHORT}]]))
    with patched(engine.model, InferenceConfig()):
        engine.model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("act", [_generate, _sample_in_chunks, _stream, _chat, _patched])
def test_no_call_of_ours_is_told_to_change(act, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                warnings.simplefilter("error", kind)
            act(Engine.from_pretrained("nano", InferenceConfig(cache=LookM(0.5, 0.3))))
    finally:
        logger.removeHandler(caplog.handler)
    assert [line for line in caplog.messages if "deprecat" in line.lower() or "removed in" in line.lower()] == []
