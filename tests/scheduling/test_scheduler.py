"""Requests that share steps: each gets what it gets alone, in its turn, and whatever goes wrong is its own."""

import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from mminfer import V2PE, DynamicNTK, Engine, InferenceConfig, InputError, nano
from mminfer.errors import ConfigError
from mminfer.inputs.content import MediaOptions
from mminfer.running import lock_of
from mminfer.scheduling import AnswerRequest, Busy, Cancelled, Closed, Limits, Scheduler, WholePrompt
from mminfer.scheduling import scheduler as scheduler_module
from mminfer.scheduling.scheduler import chunk_size_for
from mminfer.scheduling.waiting import WaitingLine

CHUNK = 128
SHORT, OTHER = "What is the code of owl?", "Tell me of the nest and the owl, please."
OFF = InferenceConfig()
ANSWER = {"max_new_tokens": 12, "min_new_tokens": 12}
SAMPLED = {**ANSWER, "do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 0.95, "repetition_penalty": 1.2}


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


class Waiter:
    """Keeps what it is told; `each` is called with every token."""

    def __init__(self, each=None):
        self.ids, self.error, self.logits = [], None, []
        self._each, self._over = each, threading.Event()

    def take(self, token_id, logits):
        self.ids.append(token_id)
        self.logits.append(logits.clone())
        return bool(self._each and self._each(self))

    def end(self, cache, row):
        self.held = cache.tokens[row]
        self._over.set()

    def fail(self, error):
        self.error = error
        self._over.set()

    def wait(self):
        assert self._over.wait(120), "waits for ever"
        return self


def with_config(engine, config):
    return Engine(engine.model, engine.processor, config)


def ask(scheduler, engine, messages, given=ANSWER, waiters=None, seed=None):
    waiters = waiters or [Waiter()]
    requests = [
        AnswerRequest(engine.runner.settings(given), waiter, None if seed is None else seed + n)
        for n, waiter in enumerate(waiters)
    ]
    size = chunk_size_for(engine.config, CHUNK)
    prompt = WholePrompt(engine.reader.readings(messages, MediaOptions(), size))
    return scheduler.submit(prompt, engine.config, requests), waiters[0]


def alone(engine, messages, given=ANSWER, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    size = chunk_size_for(engine.config, CHUNK)
    return engine.generate(messages, prefill_chunk_size=size, **given).token_ids


def mixed(engine):
    """Requests of several settings: engine, messages, arguments and seed of each."""
    pictures = nano.sample_messages()
    replay, scaled, packed = (
        with_config(engine, config)
        for config in (
            InferenceConfig.from_preset("replay-20"),
            InferenceConfig(DynamicNTK(window=64)),
            InferenceConfig(V2PE(1 / 16)),
        )
    )
    return [
        (engine, pictures, ANSWER, None),
        (engine, SHORT, ANSWER, None),
        (replay, pictures, SAMPLED, 1),
        (scaled, OTHER, ANSWER, None),
        (packed, SHORT, SAMPLED, 2),
        (engine, OTHER, {**SAMPLED, "max_new_tokens": 30, "min_new_tokens": 20}, 3),
        (replay, OTHER, ANSWER, None),
        (engine, [{"role": "system", "content": "Say little."}, {"role": "user", "content": SHORT}], SAMPLED, 4),
        (scaled, pictures, ANSWER, None),
    ]


def test_answers_are_those_alone(engine):
    """Greedy and seeded, of several settings, joining while others are decoded and leaving before they are done."""
    asked = mixed(engine)
    wanted = [alone(*one) for one in asked]
    with Scheduler(engine.adapter, Limits(running=5, chunk_size=CHUNK, gap_s=0.0)) as scheduler:
        waiters = [ask(scheduler, e, m, given, seed=seed)[1] for e, m, given, seed in [*asked, *asked[:3]]]
        found = [waiter.wait().ids for waiter in waiters]
    assert [waiter.error for waiter in waiters] == [None] * len(waiters)
    assert found == [*wanted, *wanted[:3]]
    assert waiters[1].held == len(engine.prepare([SHORT])["input_ids"][0]) + len(found[1]) - 1


def test_several_answers_of_one_prompt_have_seeds_of_their_own(engine):
    wanted = [alone(engine, SHORT, SAMPLED, seed) for seed in (7, 8, 9)]
    with Scheduler(engine.adapter, Limits(chunk_size=CHUNK)) as scheduler:
        waiters = [Waiter() for _ in range(3)]
        ask(scheduler, engine, SHORT, SAMPLED, waiters, seed=7)
        assert [waiter.wait().ids for waiter in waiters] == wanted
        with pytest.raises(InputError, match="17 answers"):
            ask(scheduler, engine, SHORT, waiters=[Waiter()] * 17)


def test_logits_are_the_models_own(engine):
    given = {**SAMPLED, "output_logits": True}
    torch.manual_seed(5)
    whole = engine.generate(SHORT, prefill_chunk_size=CHUNK, **given)
    with Scheduler(engine.adapter, Limits(chunk_size=CHUNK)) as scheduler:
        ask(scheduler, engine, OTHER, ANSWER)
        waiter = ask(scheduler, engine, SHORT, given, seed=5)[1].wait()
    torch.testing.assert_close(torch.stack(waiter.logits), whole.logits, rtol=0, atol=1e-4)


class Told(WholePrompt):
    """A prompt that says how little there is of it."""

    text_left = 40


def test_short_prompts_go_through_together(engine, monkeypatch):
    """By one pass for each setting; every answer is that alone, and what goes wrong or goes away takes nobody along."""
    passes, read = [], scheduler_module.read_pieces

    def note(group, *rest):
        passes.append(len(group))
        read(group, *rest)

    monkeypatch.setattr(scheduler_module, "read_pieces", note)
    replay = with_config(engine, InferenceConfig.from_preset("replay-20"))
    asked = [(one, text) for one in (engine, replay) for text in (SHORT, OTHER, "Tell me.", "What is it? " * 6)]
    wanted = [alone(*one) for one in asked]

    def submit(prompt, one=engine):
        waiter = Waiter()
        return scheduler.submit(prompt, one.config, [AnswerRequest(one.runner.settings(ANSWER), waiter)]), waiter

    with Scheduler(engine.adapter, Limits(running=12, chunk_size=CHUNK)) as scheduler:
        with lock_of(engine.model).turn():  # nothing is read before all are there
            waiters = [submit(Told(one.reader.readings(text, MediaOptions(), CHUNK)), one)[1] for one, text in asked]
            broken = submit(Told(lambda: 1 / 0))[1]
            ticket, gone = submit(Told(engine.reader.readings(SHORT, MediaOptions(), CHUNK)))
            ticket.cancel()
        assert [waiter.wait().ids for waiter in waiters] == wanted
        assert isinstance(broken.wait().error, ZeroDivisionError) and isinstance(gone.wait().error, Cancelled)
    assert sorted(passes) == [4, 4]


def test_a_pass_of_several_that_fails_is_tried_one_by_one(engine, monkeypatch):
    read = scheduler_module.read_pieces

    def fail(group, *rest):
        if len(group) > 1 or group[0].prompt is bad:
            raise RuntimeError("out of memory")
        read(group, *rest)

    monkeypatch.setattr(scheduler_module, "read_pieces", fail)
    wanted = alone(engine, SHORT)
    prompts = [Told(engine.reader.readings(SHORT, MediaOptions(), CHUNK)) for _ in range(3)]
    bad, waiters = prompts[1], [Waiter() for _ in prompts]
    with Scheduler(engine.adapter, Limits(chunk_size=CHUNK)) as scheduler:
        with lock_of(engine.model).turn():
            for prompt, waiter in zip(prompts, waiters, strict=True):
                scheduler.submit(prompt, OFF, [AnswerRequest(engine.runner.settings(ANSWER), waiter)])
        assert [waiter.wait().ids for waiter in waiters] == [wanted, [], wanted]
    assert str(waiters[1].error) == "out of memory"


def test_short_prompts_overtake_a_long_one_and_nobody_who_waits_for_room():
    line = WaitingLine()
    tickets = [SimpleNamespace(text_left=left, requests=[0] * n) for left, n in [(None, 1), (9, 1), (4096, 1), (9, 3)]]
    for ticket in tickets:
        line.add(ticket)
    assert line.brief(room=0) == [] and line.first(room=0) is None
    assert line.brief(room=5) == [tickets[1]]  # the next is too much for one pass, the last one has no room
    assert line.first(room=1) is tickets[0] and list(line) == tickets[2:]
    assert line.brief(room=5) == [tickets[2]] and len(line) == 1


def test_criteria_and_processors_of_the_callers_are_asked(engine):
    given = {
        **ANSWER, "min_new_tokens": None, "eos_token_id": None,
        "logits_processor": [lambda ids, scores: scores.index_fill(1, ids[0, -1:], -1e9)],  # no token twice
        "stopping_criteria": [lambda ids, scores, **_: torch.tensor([ids.shape[1] % 7 == 0])],
    }  # fmt: skip
    wanted = alone(engine, SHORT, given)
    assert len(wanted) < ANSWER["max_new_tokens"] and len(set(wanted[:2])) == 2
    with Scheduler(engine.adapter, Limits(chunk_size=CHUNK)) as scheduler:
        assert ask(scheduler, engine, SHORT, given)[1].wait().ids == wanted


def test_steps_go_on_while_a_prompt_is_read(engine):
    """Behind every layer of a prompt, if they are due, and prompts are read in the order in which they came."""
    layers, order = len(engine.adapter.layers), []
    long = {"max_new_tokens": 400, "min_new_tokens": 400}
    with Scheduler(engine.adapter, Limits(chunk_size=CHUNK, gap_s=0.0)) as scheduler:
        begun = threading.Event()
        ticket, first = ask(scheduler, engine, SHORT, long, [Waiter(lambda _: begun.set())])
        assert begun.wait(60)
        before = []
        note = [Waiter(partial(lambda n, w: before.append(len(first.ids)) or order.append(n), n)) for n in range(3)]
        asked = [ask(scheduler, engine, nano.sample_messages(), {"max_new_tokens": 1}, [w])[1] for w in note]
        at_first = len(first.ids)
        for waiter in asked:
            waiter.wait()
        ticket.cancel()
        assert isinstance(first.wait().error, Cancelled)
    assert order == [0, 1, 2]
    pieces = 576 // CHUNK  # of the pictures
    assert before[-1] - at_first >= min(3 * layers * pieces // 2, 300)


def test_a_request_is_cancelled_wherever_it_is(engine):
    long = {"max_new_tokens": 2000, "min_new_tokens": 2000}
    with Scheduler(engine.adapter, Limits(running=2, waiting=2, chunk_size=CHUNK)) as scheduler:
        begun = threading.Event()
        decoding, first = ask(scheduler, engine, SHORT, long, [Waiter(lambda w: len(w.ids) > 2 and begun.set())])
        assert begun.wait(60)
        both = ask(scheduler, engine, OTHER, waiters=[Waiter(), Waiter()])  # no room for them
        other = ask(scheduler, engine, SHORT)
        with pytest.raises(Busy, match="2 requests wait"):
            ask(scheduler, engine, SHORT)
        both[0].cancel()
        third = ask(scheduler, engine, SHORT)[1]  # in the place of the one that has gone
        assert (other[1].wait().error, third.wait().error) == (None, None)
        assert other[1].ids == third.ids == alone(engine, SHORT)
        decoding.cancel()
        assert isinstance(first.wait().error, Cancelled) and isinstance(both[1].wait().error, Cancelled)

        def cancel(waiter):
            reading.cancel()

        reading, last = ask(scheduler, engine, SHORT, long, [Waiter(cancel)])
        assert isinstance(last.wait().error, Cancelled) and len(last.ids) <= 2
        assert scheduler.running == scheduler.waiting == 0


def test_what_goes_wrong_is_one_requests_own(engine):
    def bad(*_, **__):
        raise RuntimeError("of this request")

    wanted = alone(engine, SHORT)
    with Scheduler(engine.adapter, Limits(chunk_size=CHUNK, prompt_tokens=300)) as scheduler:
        good = ask(scheduler, engine, SHORT)[1]
        failing = [
            ask(scheduler, engine, SHORT, waiters=[Waiter(bad)])[1],
            ask(scheduler, engine, SHORT, {**ANSWER, "logits_processor": [bad]})[1],
            ask(scheduler, engine, SHORT, {**ANSWER, "stopping_criteria": [bad]})[1],
        ]
        too_long = ask(scheduler, engine, nano.sample_messages())[1]
        broken = Waiter()
        prompt = WholePrompt(bad)
        scheduler.submit(prompt, OFF, [AnswerRequest(engine.runner.settings(ANSWER), broken)])
        again = ask(scheduler, engine, SHORT)[1]
        assert [str(waiter.wait().error) for waiter in (*failing, broken)] == ["of this request"] * 4
        assert "wanted 300 at most" in str(too_long.wait().error)
        assert good.wait().ids == again.wait().ids == wanted


def test_engines_of_the_same_model_go_on_meanwhile(engine):
    wanted = alone(engine, SHORT)
    with Scheduler(engine.adapter, Limits(chunk_size=CHUNK)) as scheduler:
        ticket, first = ask(scheduler, engine, OTHER, {"max_new_tokens": 2000, "min_new_tokens": 2000})
        assert alone(engine, SHORT) == wanted
        assert "".join(engine.stream(SHORT, 3)) is not None
        assert not first.error
        ticket.cancel()


def test_a_scheduler_that_has_ended_says_so(engine):
    scheduler = Scheduler(engine.adapter)
    _, waiter = ask(scheduler, engine, SHORT, {"max_new_tokens": 4000, "min_new_tokens": 4000})
    scheduler.close()
    assert isinstance(waiter.wait().error, Closed)
    with pytest.raises(Closed):
        ask(scheduler, engine, SHORT)


@pytest.mark.parametrize("given", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_answers_of_several_rows_are_refused(engine, given):
    with pytest.raises(InputError, match="one row by itself"):
        AnswerRequest(engine.runner.settings({"max_new_tokens": 2, **given}), Waiter())


@pytest.mark.parametrize("wrong", [{"running": 0}, {"chunk_size": 1.5}, {"waiting": None}, {"gap_s": float("nan")}])
def test_limits_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)
