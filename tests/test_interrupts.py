"""Ctrl-C at any bytecode: engine, model and chat are usable afterwards, and the model is the user's."""

import threading

import pytest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mminfer import Engine, InferenceConfig, LookM, OperatorSkip, nano, patch, patched
from mminfer.forward.attention import NAME
from tests.by_head import ByLot
from tests.interrupts import Interrupter, places

CONFIG = InferenceConfig(skip=OperatorSkip(ffn=[1], attention=[2]), cache=LookM(0.5, 0.2))
BY_HEAD = InferenceConfig(cache=ByLot(0.9, weighed=True))
CONTENT = nano.sample_messages()[0]["content"]
QUESTION = "What is it?"
# Where something is put on a model, a chat or a lock, and taken off again; the rest computes.
FILES = (
    "patching/", "running/", "chat.py", "forward/turns.py", "forward/attention.py", "forward/call_state.py",
    "forward/kv_cache.py", "forward/packed_layer.py", "operators/skip.py",
)  # fmt: skip
PLACES = 12


@pytest.fixture(scope="module")
def engine():
    engine = Engine.from_pretrained("nano", CONFIG)
    engine.model.train()  # so that modes have to be put back
    engine.model.model.vision_tower.eval()
    engine.generate(nano.sample_messages(), max_new_tokens=1)  # the host leaves marks of its own on a first call
    return engine


def state_of(model):
    implementation = model.base_model.language_model.layers[0].self_attn.config._attn_implementation
    modules = [
        (name, sorted(vars(module)), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return implementation, modules


def in_another_thread(work):
    """What the work gives there, where a lock that was left locked would be waited for."""
    out = []
    thread = threading.Thread(target=lambda: out.append(work()), daemon=True)
    thread.start()
    thread.join(60)
    assert out, "waits for ever"
    return out[0]


def interrupted(work, at):
    """Whether it was, at this bytecode."""
    try:
        Interrupter(at, FILES).run(work)
    except KeyboardInterrupt:
        return True
    return False


def count_of(work):
    counter = Interrupter(files=FILES)
    counter.run(work)
    return counter.count


def test_an_engines_call(engine):
    def answer():
        return engine.generate(QUESTION, max_new_tokens=2).token_ids

    want, before = answer(), state_of(engine.model)
    for at in places(count_of(answer), PLACES):
        assert interrupted(answer, at), at
        assert state_of(engine.model) == before, at
        assert NAME not in ALL_ATTENTION_FUNCTIONS
        assert in_another_thread(answer) == want, at


@pytest.mark.parametrize(("size", "config"), [(None, CONFIG), (70, CONFIG), (None, BY_HEAD)])
def test_a_turn_of_a_chat(engine, size, config):
    """The turn never was, or it is through: what the cache holds is what the chat tells."""
    if config is not CONFIG:
        engine = Engine(engine.model, engine.processor, config)
    begun = engine.chat(prefill_chunk_size=size, max_new_tokens=2)
    begun.read(CONTENT[:2])
    chat, before = begun.fork(), state_of(engine.model)
    untouched, want = (chat.cache.tokens, chat._transcript), begun.fork().send([*CONTENT[2:4], QUESTION]).token_ids
    counted = begun.fork()
    for at in places(count_of(lambda: counted.send([*CONTENT[2:4], QUESTION])), PLACES):
        chat = begun.fork()
        assert interrupted(lambda chat=chat: chat.send([*CONTENT[2:4], QUESTION]), at) or at < PLACES
        assert state_of(engine.model) == before, at
        assert (chat.cache.tokens, chat._transcript) == untouched or chat.cache.tokens == (len(chat._transcript.ids),)
        if chat._transcript == untouched[1]:
            assert in_another_thread(lambda chat=chat: chat.send([*CONTENT[2:4], QUESTION])).token_ids == want, at


def test_a_patch_and_its_undoing(engine):
    model = engine.model
    inputs = dict(engine.prepare([QUESTION]))

    def generate():
        with patched(model, CONFIG):
            return model.generate(**inputs, max_new_tokens=2).tolist()

    before, modes = state_of(model.eval()), model.training
    want = generate()
    for at in places(count_of(generate), PLACES):
        assert interrupted(generate, at), at
        assert state_of(model) == before and model.training == modes, at
        assert in_another_thread(generate) == want, at
    for at in places(count_of(patch(model, CONFIG).undo), 4 * PLACES):
        handle = patch(model, CONFIG)
        assert interrupted(handle.undo, at), at
        handle.undo()  # of use only where the interrupt came before anything was done
        assert state_of(model) == before, at
