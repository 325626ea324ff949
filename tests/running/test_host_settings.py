"""With all techniques off an answer is the host's, whatever the settings of generation are and wherever they stand."""

from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import GenerationConfig

from mminfer import InputError
from tests.engines import tiny_engine

__all__ = ["tiny_engine"]

FOREVER = {"eos_token_id": None, "max_new_tokens": 6}
CHAT = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (16, 16), "red")}, "w5 w6 w7"]}]
CHATS = [CHAT, "w9 w8", "w3"]


@pytest.fixture(scope="module")
def words(tiny_engine):
    """Tokens that the model is fond of, so that what is forbidden or ends a turn would have come."""
    return sorted({token for out in tiny_engine.generate(CHATS, **FOREVER) for token in out.token_ids})


def host_answers(engine, **kwargs):
    """The rows of the host's own answers to the chats, and [rows, tokens, vocabulary] the logits behind them."""
    inputs = engine.prepare(CHATS)
    out = engine.model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **kwargs)
    rows = out.sequences[:, inputs["input_ids"].shape[1] :]
    sources = out.get("beam_indices")
    if sources is None:
        return rows.tolist(), torch.stack(out.logits, 1)
    return rows.tolist(), torch.stack([out.logits[i][sources[:, i].clamp_min(0)] for i in range(sources.shape[1])], 1)


def ends_with(token, input_ids, scores):
    """A stopping criterion."""
    return input_ids[:, -1] == token


MODES = (
    st.fixed_dictionaries({})
    | st.fixed_dictionaries({"do_sample": st.just(True)}, optional={"num_return_sequences": st.integers(1, 3)})
    | st.fixed_dictionaries(
        {"num_beams": st.integers(2, 3)},
        optional={
            "num_return_sequences": st.integers(1, 2),
            "do_sample": st.booleans(),
            "length_penalty": st.sampled_from([0.0, 2.0]),
            "early_stopping": st.sampled_from([True, False, "never"]),
        },
    )
)
NUMBERS = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 6)},
    optional={
        "min_new_tokens": st.integers(0, 6),
        "repetition_penalty": st.sampled_from([0.8, 1.5]),
        "no_repeat_ngram_size": st.integers(1, 2),
        "temperature": st.sampled_from([0.5, 2.0]),
        "top_k": st.integers(1, 5),
        "top_p": st.sampled_from([0.3, 1.0]),
        "guidance_scale": st.just(1.7),
        "renormalize_logits": st.booleans(),
    },
)


@st.composite
def settings_of_generation(draw, words):
    """And the names of those that stand in a generation config; the others stand in the call."""
    ends = st.none() | st.just(-1) | st.sampled_from(words) | st.lists(st.sampled_from(words), min_size=1, max_size=3)
    forbidden = st.lists(st.lists(st.sampled_from(words), min_size=1, max_size=2), min_size=1, max_size=2)
    of_words = st.fixed_dictionaries(
        {"eos_token_id": ends | ends.filter(lambda x: isinstance(x, list)).map(torch.tensor)},
        optional={
            "bad_words_ids": forbidden,
            "suppress_tokens": st.lists(st.sampled_from(words), min_size=1, max_size=2),
            "forced_eos_token_id": st.sampled_from(words),
        },
    )
    kwargs = draw(NUMBERS) | draw(of_words) | draw(MODES)
    if isinstance(kwargs["eos_token_id"], list) and draw(st.booleans()):
        kwargs["exponential_decay_length_penalty"] = (1, 2.0)
    if draw(st.booleans()):
        kwargs["stopping_criteria"] = [partial(ends_with, draw(st.sampled_from(words)))]
    kwargs["num_return_sequences"] = min(kwargs.get("num_return_sequences", 1), kwargs.get("num_beams", 3))
    in_config = draw(st.sets(st.sampled_from(sorted(set(kwargs) - {"eos_token_id", "stopping_criteria"}))))
    return kwargs, in_config


def split(kwargs, in_config):
    """The same settings, some of them in a generation config."""
    config, left = GenerationConfig(), dict(kwargs)
    for name in in_config:  # given to the class it would look at each without the others
        setattr(config, name, left.pop(name))
    return {**left, "generation_config": config} if in_config else left


@pytest.mark.parametrize("size", [None, 40])
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_answers_are_the_hosts(tiny_engine, words, size, data):
    """Tokens and the logits behind them, of chats at once and in chunks; what the host has behind an end is padding."""
    kwargs, in_config = data.draw(settings_of_generation(words))
    ours = split(kwargs, in_config)
    for seed in range(3):  # what is drawn may lie on the edge of two tokens, but not with every seed
        torch.manual_seed(seed)
        try:
            rows, logits = host_answers(tiny_engine, **kwargs)
        except ValueError:
            with pytest.raises(InputError, match="the host refuses it"):
                tiny_engine.generate(CHATS, prefill_chunk_size=size, **ours)
            return
        torch.manual_seed(seed)
        outs = tiny_engine.generate(CHATS, prefill_chunk_size=size, output_logits=True, **ours)
        if all(out.token_ids == row[: len(out.token_ids)] for out, row in zip(outs, rows, strict=False)):
            break
    assert len(outs) == len(rows)
    for out, row, steps in zip(outs, rows, logits, strict=True):
        count = len(out.token_ids)
        assert out.token_ids == row[:count] and len(out.logits) == count
        torch.testing.assert_close(out.logits, steps[:count], rtol=0, atol=2e-4)
        if kwargs["eos_token_id"] is not None:
            assert len(set(row[count:])) <= 1
