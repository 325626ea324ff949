"""Settings of generation: who has the last word, and what an answer's tokens and logits are under them."""

import pytest
import torch
from transformers import EosTokenCriteria, GenerationConfig, StopStringCriteria

from mminfer import InputError
from mminfer.running import overridden
from tests.engines import nano_engine, tiny_engine

__all__ = ["nano_engine", "tiny_engine"]

SIZES = (None, 64)
CHATS = [[{"role": "user", "content": "w5 w6 w7"}], "w9 w8 w7 w6 w5", "w3"]


@pytest.fixture
def own(tiny_engine, monkeypatch):
    """The model's generation config, which may be changed; no answer ends early."""
    monkeypatch.setattr(tiny_engine.model.generation_config, "eos_token_id", None)
    config = tiny_engine.model.generation_config
    for name in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences", "stop_strings", "use_cache"):
        monkeypatch.setattr(config, name, None)
    return config


def length(engine, **kwargs):
    (count,) = {
        len(out.token_ids) for size in SIZES for out in [engine.generate("w5", prefill_chunk_size=size, **kwargs)]
    }
    return count


def test_the_length_is_the_calls_then_its_configs_then_the_models_then_ours(tiny_engine, own):
    prompt = tiny_engine.prepare(["w5"])["input_ids"].shape[1]
    assert length(tiny_engine) == 64
    own.max_length = prompt + 4
    assert length(tiny_engine) == 4
    own.max_new_tokens = 5
    assert length(tiny_engine) == length(tiny_engine, max_length=prompt + 9) == 5  # as the host has it
    config = GenerationConfig(max_new_tokens=3)
    assert length(tiny_engine, generation_config=config) == 3
    assert length(tiny_engine, generation_config=config, max_new_tokens=2) == 2
    assert length(tiny_engine, max_new_tokens=2) == 2
    assert (config.max_new_tokens, own.max_new_tokens) == (3, 5)
    own.max_new_tokens = own.max_length = None
    assert length(tiny_engine, max_length=prompt + 3) == 3
    assert length(tiny_engine, generation_config=GenerationConfig(max_length=prompt + 2)) == 2


@pytest.mark.parametrize("size", SIZES)
def test_a_prompt_as_long_as_its_greatest_length_is_refused(tiny_engine, own, size):
    hook = tiny_engine.adapter.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("a pass"))
    with pytest.raises(InputError, match=r"max_length=4 counts the prompt too, .*pass max_new_tokens"):
        tiny_engine.generate("w5 w6 w7 w8", max_length=4, prefill_chunk_size=size)
    hook.remove()


def test_a_chats_arguments_hold_until_a_turn_says_otherwise(nano_engine, monkeypatch):
    monkeypatch.setattr(nano_engine.model.generation_config, "eos_token_id", None)
    chat = nano_engine.chat(generation_config=GenerationConfig(max_new_tokens=3, repetition_penalty=1.5))
    config = GenerationConfig(max_new_tokens=4)
    for count, kwargs in (
        (3, {}),
        (2, {"max_new_tokens": 2}),
        (4, {"generation_config": config}),
        (5, {"generation_config": config, "max_new_tokens": 5}),
    ):
        assert len(chat.send("Which code?", **kwargs).token_ids) == count
    assert len(chat.send("Which?", max_length=chat.cache.logical_length + 40).token_ids) > 5
    assert len(nano_engine.chat(max_new_tokens=2).send("Which code?").token_ids) == 2
    assert len(nano_engine.chat(max_new_tokens=2).send("Which code?", generation_config=config).token_ids) == 4
    assert len(nano_engine.chat().send("Which code?").token_ids) == nano_engine.model.generation_config.max_new_tokens
    monkeypatch.setattr(nano_engine.model.generation_config, "max_new_tokens", None)  # else it stands before the length
    before = chat.cache.logical_length
    with pytest.raises(InputError, match="max_length=9 counts the prompt too"):
        chat.send("Which code?", max_length=9)
    assert chat.cache.logical_length == before


def test_a_turns_settings_stand_before_those_of_its_chat():
    """Also what only one of two generation configs says, and a length of either kind."""
    of_all = {"top_k": 5, "max_new_tokens": 2, "generation_config": GenerationConfig(top_p=0.5, min_new_tokens=1)}
    turn = {"generation_config": GenerationConfig(top_k=3, max_length=9, top_p=0.6)}
    merged = overridden(of_all, turn)
    assert set(merged) == {"generation_config"}
    config = merged["generation_config"]
    assert (config.top_k, config.top_p, config.min_new_tokens, config.max_length) == (3, 0.6, 1, 9)
    assert overridden(of_all, {"top_p": None})["generation_config"].top_p is None
    assert of_all["generation_config"].top_p == 0.5
    assert overridden({"max_length": 3}, {"max_new_tokens": 5}) == {"max_new_tokens": 5}


def test_beams_may_come_from_any_config(tiny_engine, own):
    want = [out.token_ids for out in tiny_engine.generate(CHATS, 4, num_beams=3)]
    config = GenerationConfig(num_beams=3)
    assert [out.token_ids for out in tiny_engine.generate(CHATS, 4, generation_config=config)] == want
    own.num_beams = 3
    for size in SIZES:
        assert [out.token_ids for out in tiny_engine.generate(CHATS, 4, prefill_chunk_size=size)] == want
    for ask in (tiny_engine.chat, lambda: tiny_engine.stream("w5")):
        with pytest.raises(InputError, match="num_beams or num_return_sequences is 3"):
            ask()
    assert len(tiny_engine.chat(num_beams=1, max_new_tokens=2).send("w5").token_ids) == 2


@pytest.mark.parametrize("size", SIZES)
def test_logits_of_beams_are_those_of_the_answers_tokens(tiny_engine, own, size):
    """The same tokens forced upon greedy decoding give the same logits; several answers to a chat have each its own."""
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "prefill_chunk_size": size, "output_logits": True}
    outs = tiny_engine.generate(CHATS, 5, **kwargs)
    assert len(outs) == 6 and outs[0].token_ids != outs[1].token_ids
    for n, out in enumerate(outs):
        tokens = iter(out.token_ids)
        forced = {"prefix_allowed_tokens_fn": lambda batch, ids, tokens=tokens: [next(tokens)], "output_logits": True}
        alone = tiny_engine.generate(CHATS[n // 2], len(out.token_ids), **forced)
        torch.testing.assert_close(out.logits, alone.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_a_row_ends_where_it_ends_alone(tiny_engine, own, size):
    """By an end token or a criterion, whether the host pads behind it or not, with as many logits."""
    free = [out.token_ids for out in tiny_engine.generate(CHATS, 6)]
    token = free[0][2]

    def stops(input_ids, scores):
        return input_ids[:, -1] == token

    for kwargs in (
        {"eos_token_id": token},
        {"stopping_criteria": [EosTokenCriteria(token)]},
        {"stopping_criteria": [stops]},
        {"stopping_criteria": [stops], "eos_token_id": -1},
    ):
        outs = tiny_engine.generate(CHATS, 6, prefill_chunk_size=size, output_logits=True, pad_token_id=0, **kwargs)
        assert [out.token_ids for out in outs] == [row[: (*row, token).index(token) + 1] for row in free]
        assert [len(out.logits) for out in outs] == [len(out.token_ids) for out in outs]


@pytest.mark.parametrize("size", SIZES)
def test_guidance_keeps_the_rows_that_have_ended(tiny_engine, own, size):
    """The host runs as many rows without the prompt beside them: they must go on being the same ones."""
    kwargs = {"guidance_scale": 1.5, "pad_token_id": 0}
    token = tiny_engine.generate(CHATS, 6, **kwargs)[0].token_ids[1]
    host = tiny_engine.model.generate(**tiny_engine.prepare(CHATS), max_new_tokens=6, eos_token_id=token, **kwargs)
    outs = tiny_engine.generate(CHATS, 6, eos_token_id=token, prefill_chunk_size=size, **kwargs)
    assert len({len(out.token_ids) for out in outs}) > 1
    for out, row in zip(outs, host[:, -max(len(out.token_ids) for out in outs) :].tolist(), strict=True):
        assert out.token_ids == row[: len(out.token_ids)]
    prompts = tiny_engine.prepare(CHATS)["attention_mask"].sum(1).tolist()
    assert [out.stats.prompt_tokens for out in outs] == prompts


def test_prompts_in_chunks_are_padded_as_those_at_once(tiny_engine, own):
    """What processors see of a shorter prompt's padding is the tokenizer's, not token 0."""
    tokenizer, seen = tiny_engine.processor.tokenizer, []

    def look(input_ids, scores):
        seen.append(input_ids.tolist())
        return scores

    before, tokenizer.pad_token = tokenizer.pad_token, "<unk>"
    try:
        for size in SIZES:
            tiny_engine.generate(CHATS, 1, prefill_chunk_size=size, logits_processor=[look])
        assert seen[0] == seen[1] and tokenizer.unk_token_id in seen[0][2]
    finally:
        tokenizer.pad_token = before


@pytest.mark.parametrize("size", SIZES)
def test_stop_strings_end_the_rows_that_have_them(nano_engine, size):
    """Of the call, of a config, or as the host's criterion: what the other rows do meanwhile is not their affair."""
    tokenizer, said = nano_engine.processor.tokenizer, ["The code of owl is 47", "an image shows a colour"]
    script = [tokenizer(text, add_special_tokens=False).input_ids for text in said]
    for kwargs in (
        {"stop_strings": "code"},
        {"generation_config": GenerationConfig(stop_strings=["code", "never"])},
        {"stopping_criteria": [StopStringCriteria(tokenizer, "code")], "stop_strings": "image"},
    ):
        starts = []

        def speak(row, ids, starts=starts):
            starts.append(len(ids))
            return [script[row][len(ids) - starts[0]]]

        kwargs |= {"prefix_allowed_tokens_fn": speak, "prefill_chunk_size": size, "max_new_tokens": 5}
        outs = nano_engine.generate(["Which?", "What?"], output_logits=True, **kwargs)
        assert outs[0].text.endswith("code") and outs[1].token_ids == script[1][:5]
        assert [len(out.logits) for out in outs] == [len(out.token_ids) for out in outs]


def test_a_list_of_strings_is_a_list_of_chats(tiny_engine, own):
    """Wherever chats are taken; what takes one chat says so, and a turn's strings are parts of it."""
    alone = [tiny_engine.generate(text, 2).token_ids for text in ("w5", "w6 w7")]
    assert [out.token_ids for out in tiny_engine.generate(["w5", "w6 w7"], 2)] == alone
    assert [out.token_ids for out in tiny_engine.answer(tiny_engine.prepare_request(("w5", "w6 w7")), 2)] == alone
    assert len(tiny_engine.prepare(["w5", "w6 w7"])["input_ids"]) == 2
    assert isinstance(tiny_engine.generate(["w5"], 2), list)
    one = {"role": "user", "content": ["w5", "w6"]}
    want = tiny_engine.generate([one], 2).token_ids
    assert (
        tiny_engine.generate([["w5", "w6"]], 2)[0].token_ids
        == tiny_engine.chat().send(["w5", "w6"], 2).token_ids
        == want
    )
    for ask in (tiny_engine.stream, tiny_engine.check):
        with pytest.raises(InputError, match="takes one chat, found a list of 2"):
            ask(["w5", "w6"])
    for chats in ("w5", [one], tiny_engine.check([one])):
        with pytest.raises(InputError, match=r"prepare\(\) takes a list of chats"):
            tiny_engine.prepare(chats)
