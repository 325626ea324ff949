"""Engines, chats and streams that are copied, pickled, taken into another process, or whose model is cast."""

import copy
import os
import pickle
import signal
from collections.abc import Callable

import pytest
import torch

from mminfer import Engine, InferenceConfig, InputError, LookM
from tests.engines import tiny_engine
from tests.tiny import tiny_model

__all__ = ["tiny_engine"]

ASK = {"max_new_tokens": 4, "min_new_tokens": 4}
QUESTION, OTHER = "w20 w21 w22", "w30 w31"


@pytest.fixture
def engine(tiny_engine):
    return Engine(copy.deepcopy(tiny_model("llava")), tiny_engine.processor, InferenceConfig(cache=LookM(budget=64)))


@pytest.fixture
def talker():
    return Engine.from_pretrained("nano")  # of its own: it is cast


def test_a_copied_engine_has_a_model_of_its_own(engine):
    before = engine.generate(QUESTION, **ASK).token_ids
    deep, flat = copy.deepcopy(engine), copy.copy(engine)
    assert deep.model is not engine.model and flat.model is engine.model
    assert deep.config == engine.config and deep.generate(QUESTION, **ASK).token_ids == before
    for parameter in engine.model.parameters():
        parameter.data.zero_()
    assert deep.generate(QUESTION, **ASK).token_ids == before
    assert flat.generate(QUESTION, **ASK).token_ids == engine.generate(QUESTION, **ASK).token_ids != before


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copied_chat_goes_on_by_itself(talker, copied):
    chat, alone = talker.chat(**ASK), talker.chat(**ASK)
    for one in (chat, alone):
        one.send(QUESTION)
    other = copied(chat)
    wanted = alone.send(OTHER).token_ids
    assert other.send(QUESTION).token_ids is not None
    assert chat.send(OTHER).token_ids == wanted
    assert other.cache is not chat.cache


def test_nothing_of_an_engine_is_pickled(engine):
    with engine.stream(QUESTION, **ASK) as stream:
        for thing in (engine, engine.chat(), stream):
            with pytest.raises(InputError, match="pickled"):
                pickle.dumps(thing)
    with pytest.raises(InputError, match="copied"):
        copy.deepcopy(stream)


def test_a_chat_whose_model_was_cast_stays_as_it_was(talker):
    chat, alone = talker.chat(**ASK), talker.chat(**ASK)
    for one in (chat, alone):
        one.send(QUESTION)
    talker.model.bfloat16()
    with pytest.raises(InputError, match=r"float32.*bfloat16"):
        chat.send(OTHER)
    talker.model.float()  # rounded by now, and so is what the other chat is told
    assert chat.send(OTHER).token_ids == alone.send(OTHER).token_ids


def test_a_default_device_of_others_is_not_where_settings_are_read(engine):
    with torch.device("meta"):
        assert engine.runner.settings({"eos_token_id": [1, 2], "pad_token_id": 3}).end_ids == {1, 2}


def in_a_child(work: Callable[[], bool]) -> bool:
    """What it says in a forked process, which may not take longer than a minute."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        code = 1
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_threads_that_stayed_behind(engine):
    wanted = engine.generate(QUESTION, **ASK).token_ids
    with engine.stream(OTHER, max_new_tokens=1500, min_new_tokens=1500) as stream:
        next(stream)

        def work() -> bool:
            torch.set_num_threads(1)
            with pytest.raises(InputError, match="process that began it"):
                list(stream)
            return engine.generate(QUESTION, **ASK).token_ids == wanted

        assert in_a_child(work)
    assert engine.generate(QUESTION, **ASK).token_ids == wanted
