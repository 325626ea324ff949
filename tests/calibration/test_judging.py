"""What a calibration measures is what the doors do."""

import pytest
import torch

from mminfer import AIMMerge, AIMPrune, Engine, InferenceConfig, LookM, OperatorSkip, Replay
from mminfer.bench import fidelity
from mminfer.bench.contexts import made_contexts
from mminfer.bench.protocols import Protocol, reader
from mminfer.calibration.judging import answer_of, outcome_of
from mminfer.calibration.prompts import prompt_of, with_answer
from mminfer.calibration.samples import _sample
from mminfer.forward.resumed import KeptPass

pytest.importorskip("sklearn")
OFF = InferenceConfig()
SETTINGS = [
    InferenceConfig(merge=AIMMerge(0.25), prune=AIMPrune(1, 4)),
    InferenceConfig(skip=OperatorSkip(ffn=(1, 4), attention=(2,)), cache=Replay(0.3)),
    InferenceConfig(cache=LookM(0.1, 0.1, merge="average")),
]


@pytest.fixture(scope="module")
def context():
    return made_contexts(3, 1, 2, seed=0, picture_size=None)[0]


def sample_of(engine, context):
    return _sample(engine.check(context.chat(context.questions[0])))


@pytest.mark.parametrize("protocol", [Protocol.IN_PROMPT, Protocol.NEXT_TURN])
def test_losses_and_costs_are_those_of_the_engine(nano_engine, context, protocol):
    prompt = prompt_of(nano_engine, sample_of(nano_engine, context), protocol)
    answer, full = answer_of(nano_engine, OFF, prompt, 4, {-1})
    ask = reader(nano_engine, context.content, protocol, 80)
    said = ask(context.questions[0], max_new_tokens=4, do_sample=False, output_logits=True)
    count = len(said.token_ids)
    assert answer.token_ids[:count] == said.token_ids
    for config in SETTINGS:
        engine = Engine(nano_engine.model, nano_engine.processor, config)
        found = outcome_of(nano_engine, config, prompt, type(answer)(answer.token_ids[:count], answer.logits[:count]))
        told = fidelity.forced(reader(engine, context.content, protocol, 80), context.questions[0], said.token_ids)
        expected = fidelity.fidelity(said.logits, fidelity.logits_of(told))
        assert found.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-6) and found.kl > 1e-7
        assert found.cache_bytes == told.stats.cache_bytes
        if protocol is Protocol.IN_PROMPT:
            assert found.flops == told.stats.prompt_flops and found.layer_rows == told.stats.layer_rows
        else:
            assert found.cache_bytes < full.cache_bytes or config.cache is None
    assert outcome_of(nano_engine, OFF, prompt, answer).kl < 1e-6


def test_an_answer_ends_with_its_turn(nano_engine, context):
    prompt = prompt_of(nano_engine, sample_of(nano_engine, context), Protocol.IN_PROMPT)
    long, _ = answer_of(nano_engine, OFF, prompt, 6, {-1})
    short, _ = answer_of(nano_engine, OFF, prompt, 6, {long.token_ids[1]})
    assert len(long.token_ids) == 6 and short.token_ids == long.token_ids[: len(short.token_ids)]
    assert len(short.token_ids) == len(short.logits) <= 2


@pytest.mark.parametrize("name", ["nano_engine", "tiny_engine"])
def test_a_pass_that_goes_on_behind_a_layer_is_the_whole_one(name, context, request):
    """What leaving an operator out loses, by the rows kept at its layer, is what the settings lose from the front."""
    engine = request.getfixturevalue(name)
    sample = sample_of(engine, context)
    prompt = prompt_of(engine, sample, Protocol.IN_PROMPT)
    answer, _ = answer_of(engine, OFF, prompt, 3, {-1})
    stretch = with_answer(engine, sample, answer.token_ids[:-1])
    kept = KeptPass(engine.adapter, None, stretch.embeds, stretch.layout)
    with torch.no_grad():
        logits = engine.adapter.logits(kept.entering[-1].hidden[-3:])
    torch.testing.assert_close(logits, answer.logits, rtol=0, atol=1e-3)
    last, losses = engine.adapter.spec.num_layers - 1, []
    for skip, first in (
        (OperatorSkip(ffn=(1,)), 1),
        (OperatorSkip(attention=(0,)), 0),
        (OperatorSkip(ffn=(last,)), last),
    ):
        config = InferenceConfig(skip=skip)
        Engine(engine.model, engine.processor, config)  # looks for the FFN's branch
        with torch.no_grad():
            found = engine.adapter.logits(kept.behind(skip, first)[-3:])
        losses.append(fidelity.fidelity(answer.logits, found).kl)
        assert losses[-1] == pytest.approx(outcome_of(engine, config, prompt, answer).kl, rel=1e-2, abs=1e-7)
    assert losses[-1] < losses[0] / 20  # behind the last layer's attention nobody looks at visual rows
