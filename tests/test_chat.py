"""Turns over one cache: with everything off they equal one prompt with the whole history, token for token."""

import pytest
import torch
from transformers import GenerationConfig

from mminfer import V2PE, AIMMerge, Engine, InferenceConfig, InputError, LookM, nano
from mminfer.inputs.model_inputs import InputBuilder
from mminfer.inputs.parts import Message, TextPart

QUESTION = "Which image shows a blue 1?"


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


@pytest.fixture(scope="module")
def content():
    return nano.sample_messages()[0]["content"][:-1]


def with_config(engine, config):
    return Engine(engine.model, engine.processor, config)


def test_turns_equal_one_prompt(engine, content):
    """Two turns, the second with a picture of its own."""
    more = [
        {"type": "text", "text": "Image BD:"},
        content[2],
        {"type": "text", "text": "What digit is in image BD?"},
    ]
    chat = engine.chat(output_logits=True)
    first = chat.send([*content, {"type": "text", "text": QUESTION}])
    second = chat.send(more)
    history = [
        {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": more},
    ]
    whole = engine.generate(history, output_logits=True)
    assert whole.token_ids == second.token_ids
    torch.testing.assert_close(whole.logits, second.logits, rtol=0, atol=1e-4)
    assert chat.cache.lengths == [[whole.stats.prompt_tokens + len(whole.token_ids) - 1]] * 6


@pytest.mark.parametrize("cut", [1, 2, 5, 12])
def test_reading_in_pieces_equals_one_prompt(engine, content, cut):
    chat = engine.chat(output_logits=True)
    chat.read(content[:cut])
    chat.read(content[cut:])
    pieces = chat.send(QUESTION)
    whole = engine.generate([*content, {"type": "text", "text": QUESTION}], output_logits=True)
    assert pieces.token_ids == whole.token_ids
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=0, atol=1e-4)


def test_reading_in_pieces_with_v2pe_and_merging_equals_one_prompt(engine, content):
    engine = with_config(engine, InferenceConfig(V2PE(1 / 16), AIMMerge(0.5)))
    chat = engine.chat(output_logits=True)
    chat.read(content[:7])
    chat.read(content[7:])
    pieces = chat.send(QUESTION)
    whole = engine.generate([*content, {"type": "text", "text": QUESTION}], output_logits=True)
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=0, atol=1e-4)


def test_an_answer_that_was_cut_short_is_gone_on_from(engine, content):
    """The last token of an answer has not been through the model when the next turn comes."""
    chat = engine.chat()
    cut = chat.send([*content, {"type": "text", "text": QUESTION}], max_new_tokens=1)
    assert len(cut.token_ids) == 1
    second = chat.send("What is the code of nest?", output_logits=True)
    history = [
        {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": cut.text},
        {"role": "user", "content": "What is the code of nest?"},
    ]
    whole = engine.generate(history, output_logits=True)
    assert second.text == whole.text == "66"
    torch.testing.assert_close(second.logits, whole.logits, rtol=0, atol=1e-4)


def test_forks_do_not_disturb_each_other(engine, content):
    chat = with_config(engine, InferenceConfig(cache=LookM(0.4, 0.1, merge="average"))).chat()
    chat.read(content)
    held = chat.cache.nbytes
    alone = chat.fork().send(QUESTION, output_logits=True)
    other, one = chat.fork(), chat.fork()
    other.send("What is the code of coin?")
    again = one.send(QUESTION, output_logits=True)
    assert torch.equal(alone.logits, again.logits)
    assert chat.cache.nbytes == held


@pytest.mark.filterwarnings("ignore:LookM")
def test_the_cache_stays_at_its_budget_over_turns(engine, content):
    """Also when text alone has outgrown it, unless text may."""
    for overflow, most in (("evict", 200), ("keep", 100 + 4 * 64)):
        chat = with_config(engine, InferenceConfig(cache=LookM(budget=200, text_overflow=overflow))).chat()
        for _ in range(4):
            chat.read(content)
        assert (max(chat.cache.lengths)[0] == 200) == (overflow == "evict")
        assert max(chat.cache.lengths)[0] <= most + 8


def test_a_refused_turn_leaves_the_chat_as_it_was(engine, content):
    chat = engine.chat()
    chat.read(content)
    with pytest.raises(InputError):
        chat.read([{"type": "image", "image": "/nowhere.png"}])
    with pytest.raises(InputError):
        chat.send([{"type": "picture"}])
    with pytest.raises(ValueError):
        chat.send(QUESTION, temperature=-1.0, do_sample=True)
    assert chat.send(QUESTION).text == "WB"


@pytest.mark.parametrize(
    "config", [InferenceConfig(), InferenceConfig(V2PE(1 / 16), AIMMerge(0.5), cache=LookM(budget=150))]
)
def test_a_chat_goes_on_from_its_file(engine, content, config, tmp_path):
    engine = with_config(engine, config)
    chat = engine.chat()
    chat.read(content)
    chat.send(QUESTION)
    chat.save(tmp_path / "chat.safetensors")
    resumed = engine.load_chat(tmp_path / "chat.safetensors")
    assert resumed.cache.nbytes == chat.cache.nbytes
    for question in ("What is the code of nest?", "What digit is in image MK?"):
        ours, theirs = (c.send(question, output_logits=True) for c in (resumed, chat))
        assert ours.token_ids == theirs.token_ids
        assert torch.equal(ours.logits, theirs.logits)


def test_several_answers_are_refused_and_a_read_turn_can_be_answered(engine, content):
    chat = engine.chat()
    with pytest.raises(InputError, match="num_beams"):
        chat.send(QUESTION, num_beams=2)
    chat.read([*content, {"type": "text", "text": QUESTION}])
    assert chat.send("").text == "WB"


def test_files_that_do_not_fit_are_refused(engine, content, tmp_path):
    chat = engine.chat()
    chat.read(content[:4])
    chat.save(tmp_path / "chat.safetensors")
    with pytest.raises(InputError, match="config"):
        with_config(engine, InferenceConfig(V2PE(1 / 4))).load_chat(tmp_path / "chat.safetensors")
    (tmp_path / "text").write_text("hello")
    for name in ("text", "missing"):
        with pytest.raises(InputError, match="no saved chat"):
            engine.load_chat(tmp_path / name)
    with pytest.raises(InputError, match="no saved chat"):
        engine.load_chat(nano.checkpoint_path() / "model.safetensors")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LookM")
@pytest.mark.parametrize("text_prior", [True, False])
def test_fifty_turns_stay_within_the_budget(engine, content, text_prior):
    """Every turn brings a picture."""
    policy = LookM(budget=600, merge="average", text_prior=text_prior)
    chat = with_config(engine, InferenceConfig(V2PE(1 / 16), cache=policy)).chat()
    picture = [{"type": "text", "text": "Image BD:"}, content[2], {"type": "text", "text": "What?"}]
    for turn in range(50):
        chat.send(picture, max_new_tokens=1)
        tokens = chat.cache.tokens[0]
        assert tokens >= 74 * (turn + 1)
        bound = min(tokens, 600)
        assert max(max(n) for n in chat.cache.lengths) <= bound
        assert chat.cache.nbytes <= 6 * bound * 2 * 2 * 32 * 4
    assert tokens > 3600


@pytest.mark.parametrize("name", ["mm_token_type_ids", "token_type_ids"])
def test_token_types_cover_what_is_read_of_the_answer(engine, monkeypatch, name):
    """Answers cut short leave a token unread; it goes in with the next turn, and is text."""
    chat, seen, made = engine.chat(), {}, InputBuilder.piece
    chat.send(QUESTION, max_new_tokens=1)

    def with_types(*args, **kwargs):
        piece = made(*args, **kwargs)
        return piece | {name: torch.ones_like(piece["input_ids"])}

    monkeypatch.setattr(InputBuilder, "piece", with_types)
    monkeypatch.setattr(engine.runner, "read", lambda readings, *_: seen.update(next(iter(readings[0]))))
    chat.read(QUESTION)
    assert seen[name].shape == seen["input_ids"].shape
    assert seen[name][0].tolist() == [0] + [1] * (seen["input_ids"].shape[1] - 1)


def test_a_system_prompt_stands_in_front_and_is_saved_with_the_chat(engine, content, tmp_path):
    system = "You answer in one word."
    chat, silent = engine.chat(system=system, output_logits=True), engine.chat(output_logits=True)
    chat.read(content)
    first = chat.send(QUESTION)
    history = [
        {"role": "system", "content": system},
        {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]},
    ]
    whole = engine.generate(history, output_logits=True)
    assert first.token_ids == whole.token_ids
    torch.testing.assert_close(first.logits, whole.logits, rtol=0, atol=1e-4)
    silent.read(content)
    assert chat.cache.tokens[0] > silent.cache.tokens[0]
    chat.save(tmp_path / "chat.safetensors")
    resumed = engine.load_chat(tmp_path / "chat.safetensors", output_logits=True)
    ours, theirs = (c.send("What is the code of nest?") for c in (resumed, chat))
    assert torch.equal(ours.logits, theirs.logits)
    with pytest.raises(InputError, match="kept its own system prompt"):
        engine.load_chat(tmp_path / "chat.safetensors", system=system)


@pytest.mark.parametrize("size", [None, 70])
def test_a_system_prompt_goes_in_with_the_first_turn(engine, size):
    chat = engine.chat(system="You answer in one word.", prefill_chunk_size=size)
    assert chat.cache.tokens == ()
    text = engine.generate(
        [{"role": "system", "content": "You answer in one word."}, {"role": "user", "content": QUESTION}]
    )
    assert chat.send(QUESTION).token_ids == text.token_ids


@pytest.mark.parametrize(
    ("system", "found"), [(3, "system prompt is int"), ("a <IMG_CONTEXT>", "holds '<IMG_CONTEXT>'")]
)
def test_wrong_system_prompts_are_refused_at_once(engine, system, found):
    with pytest.raises(InputError, match=found):
        engine.chat(system=system)


def test_arguments_of_the_chat_hold_for_every_turn(engine, content):
    """And those of a turn for that turn."""
    chat = engine.chat(max_new_tokens=3, min_new_tokens=3)
    chat.read(content)
    assert [len(chat.send(QUESTION).token_ids) for _ in range(2)] == [3, 3]
    assert len(chat.send(QUESTION, 5).token_ids) in (3, 4, 5)
    assert len(chat.send(QUESTION, max_new_tokens=5, min_new_tokens=5).token_ids) == 5
    assert len(chat.fork().send(QUESTION).token_ids) == 3
    assert len(engine.chat().send(QUESTION, min_new_tokens=4, max_new_tokens=4).token_ids) == 4


@pytest.mark.parametrize(
    ("kwargs", "found"),
    [
        ({"foo": 1}, "no argument foo"),
        ({"stopped": 1}, "no argument stopped"),
        ({"num_beams": 2}, "num_beams or num_return_sequences is 2: a chat goes on from one answer"),
        ({"num_return_sequences": 3}, "num_beams or num_return_sequences is 3"),
        ({"num_beams": "2"}, "num_beams='2': wanted a whole number"),
        ({"num_return_sequences": 0}, "num_return_sequences=0: wanted"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "goes on from one answer"),
    ],
)
def test_wrong_arguments_are_refused_where_they_are_given(engine, content, tmp_path, kwargs, found):
    chat = engine.chat()
    chat.read(content)
    chat.save(tmp_path / "chat.safetensors")
    for act in (
        lambda: engine.chat(**kwargs),
        lambda: engine.load_chat(tmp_path / "chat.safetensors", **kwargs),
        lambda: chat.send([{"type": "image", "image": "/nowhere.png"}], **kwargs),
    ):
        with pytest.raises(InputError, match=found):
            act()
    assert chat.send(QUESTION).text == "WB"


def test_a_turns_length_is_a_whole_number_from_1(engine):
    chat = engine.chat()
    for length in (0, -1, "3", 2.5, float("nan"), [3], True):
        with pytest.raises(InputError, match=r"max_new_tokens=.*: wanted a whole number from 1"):
            chat.send([{"type": "image", "image": "/nowhere.png"}], length)
    assert chat.cache.tokens == ()


@pytest.mark.parametrize(
    "option",
    [
        {"prefill_chunk_size": 70},
        {"num_frames": 2},
        {"fps": 1.0},
        {"max_video_tokens": 9},
        {"allow_remote": True},
        {"progress": True},
        {"system": "Hi"},
    ],
)
def test_options_of_all_turns_are_refused_in_one(engine, option):
    chat = engine.chat()
    for act in (chat.send, chat.read):
        with pytest.raises(InputError, match=rf"{next(iter(option))}: .*engine.chat\(...\)"):
            act("x", **option)
    with pytest.raises(InputError, match=r"read\(\) knows no argument foo"):
        chat.read("x", foo=1)
    assert chat.cache.tokens == ()


def test_a_chat_that_cannot_be_written_says_so(engine, tmp_path):
    chat = engine.chat()
    chat.read("Hi")
    for path in (tmp_path / "nope" / "x.st", tmp_path):
        with pytest.raises(InputError, match=r"could not be written.*: wanted a folder"):
            chat.save(path)


def test_a_typed_part_or_message_alone_is_a_turn(engine):
    whole = engine.chat().send("Which code?", 3)
    for content in (TextPart("Which code?"), Message("user", (TextPart("Which code?"),))):
        assert engine.chat().send(content, 3).token_ids == whole.token_ids
    with pytest.raises(InputError, match="content is Message"):
        engine.chat().send(Message("system", (TextPart("a"),)))


def test_a_chat_says_how_far_it_is(engine):
    chat = engine.chat(system="You answer in one word.")
    chat.send("Which code?", 2)
    assert repr(chat) == f"Chat(3 messages, {chat.cache.tokens[0]} tokens read)"
