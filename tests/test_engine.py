"""The engine's own door: batches, streams, figures, and errors before any forward pass."""

import warnings

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GPT2Config, GPT2LMHeadModel

from mminfer import (
    V2PE,
    AIMMerge,
    AIMPrune,
    ConfigError,
    Engine,
    InferenceConfig,
    InputError,
    LookM,
    OperatorSkip,
    UnsupportedModelError,
    nano,
    patch,
    patched,
)
from mminfer.config import PRESETS
from mminfer.metrics.vision import vision_flops
from mminfer.models.registry import supported_families


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


@pytest.fixture(scope="module")
def chats():
    return [
        nano.sample_messages(),
        nano.sample_messages("What is the code of nest?"),
        [{"role": "user", "content": nano.sample_messages("What digit is in image MK?")[0]["content"][11:]}],
        "What is the code of owl?",
    ]


def test_the_engine_equals_the_host(engine, chats):
    model = AutoModelForImageTextToText.from_pretrained(nano.checkpoint_path(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(nano.checkpoint_path())
    for chat, ours in zip(chats, engine.generate(chats, output_logits=True), strict=True):
        inputs = dict(engine.prepare([chat]))
        host = model.generate(**inputs, max_new_tokens=64, output_logits=True, return_dict_in_generate=True)
        new = host.sequences[0, inputs["input_ids"].shape[1] :]
        assert ours.token_ids == new.tolist()
        assert ours.text == processor.decode(new, skip_special_tokens=True).strip()
        torch.testing.assert_close(ours.logits, torch.cat(host.logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "preset",
    [
        preset if preset in ("off", "v2pe-auto", "fastv", "lookm-20") else pytest.param(preset, marks=pytest.mark.slow)
        for preset in PRESETS
    ],
)
def test_a_batch_gives_each_chat_what_it_gets_alone(engine, chats, preset):
    engine = Engine(engine.model, engine.processor, InferenceConfig.from_preset(preset))
    together = engine.generate(chats, output_logits=True, max_new_tokens=4)
    for chat, output in zip(chats, together, strict=True):
        alone = engine.generate(chat, output_logits=True, max_new_tokens=4)
        assert output.token_ids == alone.token_ids
        torch.testing.assert_close(output.logits, alone.logits, rtol=0, atol=1e-4)
        for name in (
            "prompt_tokens",
            "merged_tokens",
            "layer_rows",
            "layer_entries",
            "cache_bytes",
            "prompt_flops",
        ):
            assert getattr(output.stats, name) == getattr(alone.stats, name)


def test_the_figures_are_those_of_the_run(engine):
    config = InferenceConfig(merge=AIMMerge(0.25), prune=AIMPrune(3, 5), cache=LookM(budget=150))
    output = Engine(engine.model, engine.processor, config).generate(nano.sample_messages())
    stats = output.stats
    assert (stats.prompt_tokens, stats.visual_tokens, stats.merged_tokens) == (576, 512, 192)
    assert stats.layer_rows == (192, 192, 192, 192, 128, 64)
    assert stats.layer_entries == (150, 150, 150, 150, 128, 64)
    assert stats.cache_bytes == sum(stats.layer_entries) * 2 * 2 * 32 * 4
    assert stats.full_cache_bytes == 6 * 576 * 2 * 2 * 32 * 4
    per_entry = 2 * 32 * 4 + 4 + 1  # keys and values, score, whether it is visual
    assert stats.allocated_bytes == sum(2 * (n + 64) * per_entry for n in stats.layer_entries)
    assert 0 < stats.prompt_flops < 0.3 * stats.full_prompt_flops
    assert 0 < stats.prompt_ms < stats.ttft_ms
    assert stats.new_tokens == len(output.token_ids) == 2
    assert stats.peak_bytes > 10_000_000
    assert {"best_match", "merge_rows", "power_iterate", "prompt_attention_mass"} <= stats.backends.keys()
    assert set(stats.backends.values()) <= {"native", "reference"}


def test_off_counts_the_full_models_flops(engine):
    stats = engine.generate(nano.sample_messages()).stats
    assert stats.prompt_flops == stats.full_prompt_flops
    assert stats.cache_bytes == stats.full_cache_bytes


@pytest.mark.slow
def test_the_vision_tower_is_counted_apart(engine, chats):
    """The same by every door: a chat alone, in a batch, in chunks, with beams; none where there is nothing to see."""

    def counted(chat, **kwargs):
        outputs = engine.generate(chat, max_new_tokens=1, **kwargs)
        return [x.stats.vision_flops for x in (outputs if isinstance(outputs, list) else [outputs])]

    inputs = dict(engine.prepare(chats[:1]))
    (alone,) = counted(chats[0])
    assert alone == vision_flops(engine.adapter, inputs).total > 0
    assert counted(chats) == [alone, alone, *counted(chats[2]), 0]
    assert counted(chats[0], prefill_chunk_size=128) == counted(chats[0], num_beams=2) == [alone]
    assert counted(chats[:1], num_return_sequences=2, do_sample=True) == [alone, alone]
    (features,) = engine.adapter.visual_units(inputs).values()
    ready = [{"type": "embedding", "embedding": features[0].features}, {"type": "text", "text": "What is it?"}]
    assert counted([{"role": "user", "content": ready}]) == [0]


def test_a_stream_gives_the_same_text(engine):
    stream = engine.stream(nano.sample_messages())
    assert "".join(stream).strip() == "WB"
    assert stream.output.text == "WB"
    assert list(stream) == []


def test_a_stream_checks_the_request_at_once_and_hands_errors_on(engine):
    with pytest.raises(InputError):
        engine.stream([{"role": "user", "content": [{"type": "image", "image": "/nowhere.png"}]}])
    with pytest.raises(InputError, match="one chat"):
        engine.stream([["a"], ["b"]])
    with pytest.raises(ValueError, match="temperature"):
        list(engine.stream(nano.sample_messages(), do_sample=True, temperature=-1.0))
    assert engine.generate(nano.sample_messages()).text == "WB"


def test_a_stream_can_be_left(engine):
    stream = engine.stream(nano.sample_messages(), max_new_tokens=5000, min_new_tokens=5000)
    next(stream)
    stream.close()
    assert len(stream.output.token_ids) < 5000


def test_several_samples_and_stop_strings(engine):
    torch.manual_seed(0)
    outputs = engine.generate(nano.sample_messages(), num_return_sequences=3, do_sample=True, max_new_tokens=2)
    assert len(outputs) == 3
    stopped = engine.generate(nano.sample_messages(), stop_strings=["WB"], max_new_tokens=10, min_new_tokens=5)
    assert stopped.text == "WB"


def test_other_families_are_refused_by_name():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10))
    with pytest.raises(UnsupportedModelError, match=r"gpt2.*" + ", ".join(supported_families())):
        Engine(model, None)


def test_loading_refuses_before_it_loads(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedModelError, match="internvl"):
        Engine.from_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="no model"):
        Engine.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="6 layers"):
        Engine.from_pretrained("nano", InferenceConfig(prune=AIMPrune(start=4, end=9)))


BAD_REQUESTS = {
    "a placeholder in the text": "what is <IMG_CONTEXT> this",
    "an image part without an image": [{"type": "image"}],
    "a missing file": [{"type": "image", "image": "/nowhere.png"}],
    "an empty prompt": "  ",
    "an unknown part": [{"type": "sound", "sound": "x"}],
    "a remote image": [{"type": "image", "url": "http://127.0.0.1:9/x.png"}],
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_before_any_forward_pass_and_the_next_one_is_answered(engine, name):
    calls = []
    hook = engine.model.register_forward_pre_hook(lambda *a: calls.append(1))
    tower = engine.model.base_model.vision_tower.register_forward_pre_hook(lambda *a: calls.append(1))
    with pytest.raises(InputError):
        engine.generate(BAD_REQUESTS[name])
    hook.remove()
    tower.remove()
    assert not calls
    assert engine.generate(nano.sample_messages()).text == "WB"


def test_a_context_beyond_the_models_positions_warns_of_v2pe(engine):
    text = engine.model.config.get_text_config()
    positions, text.max_position_embeddings = text.max_position_embeddings, 300
    try:
        with pytest.warns(UserWarning, match=r"576.*300.*V2PE"):
            Engine(engine.model, engine.processor).generate(nano.sample_messages(), max_new_tokens=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            near = Engine(engine.model, engine.processor, InferenceConfig(V2PE(1 / 16)))
            near.generate(nano.sample_messages(), max_new_tokens=1)
    finally:
        text.max_position_embeddings = positions


def test_all_techniques_together_still_find_the_needle(engine):
    config = InferenceConfig(
        V2PE(1 / 4),
        AIMMerge(0.5),
        AIMPrune(),
        OperatorSkip(ffn=[4, 5], attention=[5]),
        LookM(0.5, 0.2, merge="average"),
    )
    assert Engine(engine.model, engine.processor, config).generate(nano.sample_messages()).text == "WB"


@pytest.mark.parametrize("size", [None, 100])
def test_unknown_arguments_are_refused_before_anything_is_loaded(engine, monkeypatch, size):
    """And a stream's before its thread starts."""
    monkeypatch.setattr("mminfer.inputs.content.load_image", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr("threading.Thread.start", lambda *_: pytest.fail("started"))
    for ask in (engine.generate, engine.stream):
        for kwargs, found in (({"max_new_tokns": 3}, "no argument max_new_tokns"), ({"num_beams": []}, "num_beams")):
            with pytest.raises(InputError, match=found):
                ask(nano.sample_messages(), prefill_chunk_size=size, **kwargs)


def test_a_stream_is_of_one_answer_and_has_its_own_streamer(engine):
    for name in ("num_beams", "num_return_sequences"):
        with pytest.raises(InputError, match=f"{name}.* is 2: a stream is of one answer"):
            engine.stream(nano.sample_messages(), **{name: 2})
    with pytest.raises(InputError, match="streamer: stream"):
        engine.stream(nano.sample_messages(), streamer=object())
    assert "".join(engine.stream(nano.sample_messages(), streamer=None)).strip() == "WB"


def test_a_stream_takes_stopping_criteria(engine):
    seen = []

    def third(ids, scores, **kwargs):
        seen.append(ids.shape[1])
        return torch.full((len(ids),), len(seen) == 3)

    stream = engine.stream(nano.sample_messages(), min_new_tokens=9, max_new_tokens=9, stopping_criteria=[third])
    list(stream)
    assert len(seen) == len(stream.output.token_ids) == 3


@pytest.mark.slow
def test_a_prepared_request_is_answered_with_any_settings(engine, chats):
    """At once or in chunks, the same request again and again: nothing of it is used up."""
    merging = Engine(engine.model, engine.processor, InferenceConfig(merge=AIMMerge(0.5)))
    for size in (None, 200):
        request = engine.prepare_request(chats, prefill_chunk_size=size)
        for asked in (engine, merging, engine):
            whole = asked.generate(chats, output_logits=True, prefill_chunk_size=size)
            for ours, theirs in zip(asked.answer(request, output_logits=True), whole, strict=True):
                torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)
    pruning = Engine(engine.model, engine.processor, InferenceConfig(V2PE("auto")))
    with pytest.raises(ConfigError, match="the whole is needed"):
        pruning.answer(request)


WRONG_LENGTHS = [0, -1, "3", 2.5, float("nan"), [3], True, None, torch.tensor(3)]


@pytest.mark.parametrize("size", [None, 100])
@pytest.mark.parametrize("length", WRONG_LENGTHS)
def test_a_length_of_the_answer_is_a_whole_number_from_1(engine, monkeypatch, length, size):
    """Which is seen before anything is loaded."""
    request = engine.prepare_request("Hi", prefill_chunk_size=size)
    monkeypatch.setattr("mminfer.inputs.content.load_image", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr("threading.Thread.start", lambda *_: pytest.fail("started"))
    for ask in (
        lambda: engine.generate(nano.sample_messages(), length, prefill_chunk_size=size),
        lambda: engine.stream(nano.sample_messages(), length, prefill_chunk_size=size),
        lambda: engine.chat(max_new_tokens=length, prefill_chunk_size=size),
        lambda: engine.answer(request, length),
    ):
        with pytest.raises(InputError, match=r"max_new_tokens=.*: wanted a whole number from 1"):
            ask()


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ({"num_frames": 0}, "num_frames is 0: wanted a whole number from 1"),
        ({"num_frames": 2.5}, "num_frames is 2.5"),
        ({"num_frames": True}, "num_frames is True"),
        ({"fps": "2"}, "fps is '2': wanted a positive number"),
        ({"fps": 0}, "fps is 0: wanted a positive number"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"max_video_tokens": 0}, "max_video_tokens is 0: wanted a whole number from 1"),
        ({"max_video_tokens": "9"}, "max_video_tokens is '9'"),
        ({"allow_remote": 1}, "allow_remote is 1: wanted True or False"),
    ],
)
def test_media_options_are_checked_where_they_are_given(engine, option, found):
    """Also where there is nothing that they would be of use for."""
    for ask in (
        lambda: engine.generate("Hi", **option),
        lambda: engine.stream("Hi", **option),
        lambda: engine.chat(**option),
        lambda: engine.check("Hi", **option),
        lambda: engine.prepare(["Hi"], **option),
    ):
        with pytest.raises(InputError, match=found):
            ask()


def test_unknown_media_options_are_named(engine):
    for ask in (lambda: engine.check("x", foo=1), lambda: engine.prepare(["x"], foo=1)):
        with pytest.raises(InputError, match=r"no option foo of media.*num_frames"):
            ask()


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LookM(), r"LookM.*no InferenceConfig: pass InferenceConfig.of\(...\) with it"),
        ("aim", r"'aim', no InferenceConfig: pass InferenceConfig.from_preset\('aim'\)"),
        ("nonsense", r"'nonsense', no InferenceConfig: pass InferenceConfig\("),
        ({}, r"\{\}, no InferenceConfig: pass"),
        (LookM, "no InferenceConfig: pass"),
    ],
)
def test_what_is_no_config_is_refused_at_once(engine, monkeypatch, config, found):
    monkeypatch.setattr("mminfer.models.loading.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for act in (
        lambda: Engine(engine.model, engine.processor, config),
        lambda: Engine.from_pretrained("nano", config),
        lambda: patch(engine.model, config),
        lambda: patched(engine.model, config).__enter__(),
    ):
        with pytest.raises(ConfigError, match=found):
            act()
    with pytest.raises(ConfigError, match="None, no InferenceConfig"):
        patch(engine.model, None)
    assert "forward" not in vars(engine.model)


def steps_after_leaving(engine, leave):
    """How many steps the model goes on once a stream of 600 tokens was left, and how many there were before."""
    steps = []
    hook = engine.model.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
    try:
        leave(engine.stream("Which code?", max_new_tokens=600, min_new_tokens=600))
        before = len(steps)
        engine.generate("Hi", max_new_tokens=1)  # waits for the model
        return len(steps) - before, before
    finally:
        hook.remove()


def take_one(stream):
    for _ in stream:
        break


def take_one_within(stream):
    with stream:
        next(stream)


@pytest.mark.parametrize("leave", [take_one, take_one_within])
def test_leaving_the_loop_of_a_stream_stops_it(engine, leave):
    """Within a few steps, of those of the next call too."""
    after, before = steps_after_leaving(engine, leave)
    assert before < 300 and after < 20
