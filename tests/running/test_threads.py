"""Threads on one model: each gets what it gets alone, and nobody waits for himself."""

import copy
import sys
import threading
from functools import partial

import pytest
import torch

from mminfer import V2PE, AIMMerge, Engine, InferenceConfig, InputError, LookM, OperatorSkip, nano, patched
from tests.tiny import IMAGE, tiny_inputs, tiny_model

QUESTION = "What is the code of owl?"
SKIPPED = InferenceConfig(V2PE(1 / 16), skip=OperatorSkip(ffn=[1, 2], attention=[3]), cache=LookM(0.5, 0.2))


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano", SKIPPED)


@pytest.fixture
def often_switching():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def all_at_once(jobs, rounds):
    """What went wrong in threads that each do one job so often; each must give what it gives alone."""
    wanted, wrong = [job() for job in jobs], []

    def work(job, want):
        for _ in range(rounds):
            try:
                if job() != want:
                    wrong.append("another answer")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(jobs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "waits for ever"
    return wrong


def host_answer(model, inputs):
    return model.generate(**inputs, max_new_tokens=5, min_new_tokens=5).tolist()


def base_states(model, inputs):
    with torch.no_grad():
        return model.model(**inputs).last_hidden_state.sum().item()


def test_engines_streams_and_the_host_on_one_model_at_once(engine, often_switching):
    model, messages = engine.model, nano.sample_messages()
    other = Engine(model, engine.processor, InferenceConfig(merge=AIMMerge(0.25)))
    padded = dict(engine.prepare([messages, QUESTION]))
    jobs = [
        partial(host_answer, model, padded),
        partial(base_states, model, padded),
        lambda: engine.generate(messages, max_new_tokens=5).token_ids,
        lambda: other.generate([messages, QUESTION], max_new_tokens=5)[1].token_ids,
        lambda: "".join(engine.stream(messages, max_new_tokens=5)),
    ]
    assert not all_at_once(jobs, 3)


def test_threads_on_a_patched_model(engine, often_switching):
    model = engine.model
    asks = [dict(engine.prepare([messages])) for messages in (nano.sample_messages(), QUESTION)]
    with patched(model, InferenceConfig(V2PE(1 / 16), cache=LookM(0.5, 0.2))):
        assert not all_at_once([partial(host_answer, model, inputs) for inputs in asks], 4)


def test_the_host_answers_while_a_stream_runs(engine):
    inputs = dict(engine.prepare([nano.sample_messages()]))
    before = host_answer(engine.model, inputs)
    with engine.stream(QUESTION, 5000, min_new_tokens=5000) as stream:
        next(stream)
        assert host_answer(engine.model, inputs) == before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_pass_is_for_its_own_thread(implementation):
    """Neither the route of the attention nor the hooks of skipping are seen by who runs the model's parts meanwhile."""
    model = copy.deepcopy(tiny_model("llava"))
    model.set_attn_implementation(implementation)
    inputs, seen = tiny_inputs("llava", [[4, IMAGE, 5], [6]]), []
    host = base_states(model, inputs)
    layer = model.model.language_model.layers[1]

    def elsewhere(*args):
        if threading.current_thread() is threading.main_thread():
            seen.append(in_a_thread(lambda: base_states(model, inputs)))

    with patched(model, InferenceConfig(skip=OperatorSkip(block=[1]))):
        for skipped in (layer.mlp.gate_proj, layer.self_attn.k_proj):
            skipped.register_forward_pre_hook(elsewhere)
        model(**inputs)
    assert seen == [host] * 2


def in_a_thread(ask):
    """What it gives or raises, asked from another thread that this one waits for."""
    out = []

    def work():
        try:
            out.append(ask())
        except InputError as error:
            out.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert out, "waits for ever"
    return out[0]


def asks_of(engine):
    return {
        "generate": lambda: engine.generate(QUESTION, max_new_tokens=1).text,
        "chat": lambda: engine.chat().send(QUESTION, max_new_tokens=1).text,
        "stream": lambda: "".join(engine.stream(QUESTION, max_new_tokens=1)),
    }


def parts(ask):
    yield {"type": "text", "text": "The code of owl is 12."}
    yield {"type": "text", "text": ask()}


@pytest.mark.parametrize("name", ["generate", "chat", "stream"])
def test_content_that_asks_the_model_that_reads_it(engine, name):
    """In the thread that reads it, that is refused; another thread that the content waits for gets its answer."""
    ask = asks_of(engine)[name]
    chat = engine.chat(prefill_chunk_size=64)
    with pytest.raises(InputError, match="asks the model that reads it"):
        chat.read(parts(ask))
    chat.read(parts(lambda: str(in_a_thread(ask))))
    stream = engine.stream(parts(lambda: str(in_a_thread(ask))), 1, prefill_chunk_size=64)
    assert in_a_thread(lambda: "".join(stream)) is not None


def test_a_stream_that_began_before_may_be_read_from_content(engine):
    with engine.stream(QUESTION, 300, min_new_tokens=300) as stream:
        engine.chat(prefill_chunk_size=64).read(parts(lambda: next(stream)))


@pytest.mark.parametrize("name", ["generate", "chat", "stream"])
def test_a_streamer_that_asks_the_model_is_told_so(engine, name):
    class Asks:
        def put(self, value):
            asks_of(engine)[name]()

        def end(self):
            pass

    with pytest.raises(InputError, match="asks the model that is calling it"):
        engine.generate(QUESTION, max_new_tokens=2, streamer=Asks())
    assert engine.generate(QUESTION, max_new_tokens=1).token_ids


def test_a_chat_has_one_turn_at_a_time(engine):
    """Whatever is asked of it meanwhile, by its own content or by another thread, is refused and changes nothing."""
    chat, refused = engine.chat(prefill_chunk_size=64, max_new_tokens=1), []

    def content():
        yield {"type": "text", "text": "Hi."}
        calls = {
            "send": lambda: chat.send(QUESTION), "read": lambda: chat.read("x"), "fork": chat.fork,
            "save": lambda: chat.save("/nowhere"),
        }  # fmt: skip
        for name, call in calls.items():
            for where in (lambda call: call(), in_a_thread):
                try:
                    error = where(call)
                except InputError as raised:
                    error = raised
                refused.append(f"{name}() while send()" in str(error))
        yield {"type": "text", "text": QUESTION}

    chat.send(content())
    assert refused == [True] * 8
    assert chat.cache.tokens == (len(chat._transcript.ids),) and len(chat._transcript.messages) == 2
    chat.fork().send(QUESTION)


def test_threads_on_one_chat_leave_it_whole(engine, often_switching):
    chat, errors = engine.chat(max_new_tokens=2), []

    def send(number):
        try:
            chat.send(f"Question {number}")
        except InputError as error:
            errors.append(error)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(chat._transcript.messages) == 2 * (4 - len(errors)) >= 2
    assert chat.cache.tokens == (len(chat._transcript.ids),)
