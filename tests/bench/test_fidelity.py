"""Fidelity by each protocol: nothing compressed loses nothing, what is compressed loses something."""

import pytest
import torch

from mminfer import AIMMerge, Engine, InferenceConfig, LookM
from mminfer.bench import fidelity
from mminfer.bench.contexts import Context, made_contexts, own_context
from mminfer.bench.protocols import Protocol, batch_reader, reader
from mminfer.errors import InputError

pytest.importorskip("sklearn")


def engines(engine, **configs):
    return {name: Engine(engine.model, engine.processor, config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def context():
    return made_contexts(3, 1, 2, seed=0, picture_size=None)[0]


def test_rows_of_every_protocol(nano_engine, context):
    settings = engines(nano_engine, off=InferenceConfig(), small=InferenceConfig(cache=LookM(0.1, 0.1)))
    rows = fidelity.measure(settings, [context], list(Protocol), 4, 80)
    assert [(r.setting, r.protocol) for r in rows] == [(s, p) for p in Protocol for s in settings]
    for row in rows:
        assert row.positions == 2 * 4
        if row.setting == "off":
            assert row.kl < 1e-6 and row.top1 == row.cache_kept == row.flops_kept == 100
        else:
            assert row.kl > 1e-3 and row.cache_kept < 45 and row.flops_kept > 100
    in_prompt, next_turn = rows[1], rows[3]
    assert in_prompt.kl != next_turn.kl


def test_a_random_model_of_another_family(tiny_engine, context):
    settings = engines(tiny_engine, off=InferenceConfig(), merged=InferenceConfig(merge=AIMMerge(0.25)))
    off, merged = fidelity.measure(settings, [context], [Protocol.NEXT_TURN], 3, 80)
    assert off.kl < 1e-6 and merged.kl > 0 and merged.flops_kept < 100


def test_forced_tokens_are_said_and_judged(nano_engine, context):
    ask = reader(nano_engine, context.content, Protocol.IN_PROMPT, 80)
    said = fidelity.continuation(ask, context.questions[0], 5)
    assert len(said.token_ids) == 5 == len(said.logits)
    again = fidelity.forced(ask, context.questions[0], said.token_ids)
    assert again.token_ids == said.token_ids
    torch.testing.assert_close(fidelity.logits_of(again), said.logits, rtol=0, atol=1e-4)
    other = [(t + 1) % 500 + 20 for t in said.token_ids]
    moved = fidelity.logits_of(fidelity.forced(ask, context.questions[0], other))
    torch.testing.assert_close(moved[0], said.logits[0], rtol=0, atol=1e-4)  # nothing was forced before it
    assert not torch.allclose(moved[1], said.logits[1], atol=1e-2)


@pytest.mark.parametrize("protocol", Protocol)
def test_a_batch_of_questions_gets_what_each_gets_alone(nano_engine, context, protocol):
    engine = Engine(nano_engine.model, nano_engine.processor, InferenceConfig(cache=LookM(0.1, 0.2)))
    ask, ask_all = (read(engine, context.content, protocol, 80) for read in (reader, batch_reader))
    questions = [*context.questions, "What does WB show, and what else?"]
    alone = [ask(question, max_new_tokens=3, output_logits=True) for question in questions]
    for one, other in zip(alone, ask_all(questions, max_new_tokens=3, output_logits=True), strict=True):
        assert one.token_ids == other.token_ids and one.stats.cache_bytes == other.stats.cache_bytes
        torch.testing.assert_close(other.logits, one.logits, rtol=0, atol=1e-4)
    said = fidelity.continuations(ask_all, questions, 4)
    assert [len(one.token_ids) for one in said] == [4, 4, 4]
    again = fidelity.forced_all(ask_all, questions, [one.token_ids for one in said])
    assert [one.token_ids for one in again] == [one.token_ids for one in said]
    single = fidelity.forced(ask, questions[1], said[1].token_ids)
    torch.testing.assert_close(again[1].logits, single.logits, rtol=0, atol=1e-4)


def test_made_contexts_are_a_function_of_their_arguments():
    first, again, other = (made_contexts(4, 2, 3, seed, None) for seed in (1, 1, 2))
    assert [c.questions for c in first] == [c.questions for c in again] != [c.questions for c in other]
    assert all(len(c.questions) == 3 for c in first)
    assert [sum(p["type"] == "image" for p in c.content) for c in first] == [4, 4]


def test_own_files_need_a_question():
    assert own_context(["a.png"], ["b.mp4"], "What?") == Context(
        ({"type": "image", "image": "a.png"}, {"type": "video", "video": "b.mp4"}), ("What?",)
    )
    with pytest.raises(InputError, match="--prompt"):
        own_context(["a.png"], [], " ")
