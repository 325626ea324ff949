"""Scaled frequencies: the host's own rope settings where it has them, and one scale for all that a cache holds."""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mminfer import ConfigError, Engine, InferenceConfig, nano, patched
from mminfer.forward.rotary import STEPS_AHEAD, RotaryAhead, frequency_factors
from mminfer.models.registry import adapter_for
from mminfer.positions import DynamicNTK, LinearScaling
from tests.tiny import IMAGE, MARKED_FAMILIES, tiny_inputs, tiny_model, tiny_rows

BATCH = [[3, IMAGE, 5, IMAGE, 4], [2, IMAGE, 9], [6]]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
factors = st.floats(1, 64)
windows = st.integers(1, 1 << 17)
lengths = st.integers(1, 1 << 20)
head_dims = st.sampled_from([2, 16, 64, 128])
beyond = pytest.mark.filterwarnings("ignore:the prompt reaches rotary position")


def host_with(family, window=None, **rope):
    """The family's tiny model whose own config sets the rope of its full attention, and the window."""
    model = copy.deepcopy(tiny_model(family))
    rotary = adapter_for(model).language_model.rotary_emb
    config = rotary.config
    if window is not None:
        config.max_position_embeddings = window
    parameters = config.rope_parameters
    parameters.get("full_attention", parameters).update(rope)
    adapter_for(model).language_model.rotary_emb = type(rotary)(config)
    return model


def in_window(family, window):
    """The family's tiny model, made for so many positions."""
    return host_with(family, window)


def assert_same(ours, host):
    assert torch.equal(ours.sequences, host.sequences)
    for a, b in zip(ours.logits, host.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def inverse(head_dim, theta=10_000.0):
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


@settings(deadline=None, max_examples=60)
@given(factor=factors, window=windows, length=lengths, head_dim=head_dims)
def test_linear_divides_every_frequency(factor, window, length, head_dim):
    given_factor = LinearScaling(factor).frequency_factors(length, window, head_dim)
    wanted = torch.full((head_dim // 2,), 1 / factor, dtype=torch.float64)
    assert given_factor is None if factor == 1 else torch.equal(given_factor, wanted)
    auto = LinearScaling().frequency_factors(length, window, head_dim)
    assert auto is None if length <= window else torch.equal(auto, torch.full_like(wanted, 1 / (length / window)))
    assert LinearScaling().covered_positions(length, window) == max(length, window)


@settings(deadline=None, max_examples=60)
@given(factor=factors, window=windows, length=lengths, head_dim=st.sampled_from([16, 64, 128]))
def test_ntk_is_the_hosts_theta(factor, window, length, head_dim):
    """theta * s ** (D / (D - 2)), in float64."""
    found = DynamicNTK(factor).frequency_factors(length, window, head_dim)
    if length <= window:
        assert found is None
        return
    s = factor * length / window - (factor - 1)
    theta = 10_000.0 * s ** (head_dim / (head_dim - 2))
    torch.testing.assert_close(inverse(head_dim) * found, inverse(head_dim, theta), rtol=1e-9, atol=0)
    assert found[0] == 1 and (found.diff() < 0).all()
    explicit = DynamicNTK(factor, length=length, window=window).frequency_factors(3, 1 << 30, head_dim)
    assert torch.equal(found, explicit)


@settings(deadline=None, max_examples=60)
@given(factor=factors, window=windows, length=lengths, head_dim=head_dims)
def test_nothing_is_scaled_inside_the_window(factor, window, length, head_dim):
    length = min(length, window)
    for technique in (LinearScaling(), LinearScaling(1), DynamicNTK(factor), DynamicNTK(factor, length=length)):
        assert technique.frequency_factors(length, window, head_dim) is None
        assert technique.covered_positions(length, window) == window


@settings(deadline=None, max_examples=40)
@given(shorter=lengths, more=st.integers(0, 1 << 20), factor=factors)
def test_longer_prompts_turn_no_faster(shorter, more, factor):
    one = torch.ones(32, dtype=torch.float64)
    for technique in (LinearScaling(window=4096), DynamicNTK(factor, window=4096)):
        short, long = (technique.frequency_factors(n, 1, 64) for n in (shorter, shorter + more))
        assert ((one if long is None else long) <= (one if short is None else short)).all()


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_frequencies_are_the_host_librarys(theta, head_dim):
    rope = {"rope_theta": theta, "factor": 4.0, "rope_type": "linear"}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=2048, rope_parameters=rope)
    own = 1 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    linear, _ = ROPE_INIT_FUNCTIONS["linear"](config)
    found = own * LinearScaling(4.0).frequency_factors(0, 2048, head_dim)
    torch.testing.assert_close(found.float(), linear, rtol=1e-6, atol=0)
    dynamic, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=9000)
    found = own * DynamicNTK(4.0).frequency_factors(9000, 2048, head_dim)
    torch.testing.assert_close(found.float(), dynamic, rtol=2e-6, atol=0)  # its powers are taken in float32


@pytest.mark.parametrize(
    ("technique", "rope"),
    [
        (LinearScaling(2.0), {"rope_type": "linear", "factor": 2.0}),
        (LinearScaling(), {"rope_type": "linear", "factor": 24 / 8}),
        (DynamicNTK(), {"rope_type": "dynamic", "factor": 1.0}),
        (DynamicNTK(4.0), {"rope_type": "dynamic", "factor": 4.0}),
    ],
    ids=["linear", "linear auto", "ntk", "ntk 4"],
)
@pytest.mark.parametrize("family", ["internvl", "llava", "qwen2_vl", "qwen3_vl"])
def test_tables_are_the_host_librarys(family, technique, rope):
    """The last of 24 positions in a window of 8. Positions fewer than 16: the host rounds angles to float32."""
    model, host = in_window(family, 8), host_with(family, 8, **rope)
    adapter, other = adapter_for(model), adapter_for(host)
    position = torch.tensor([*range(12), 23.0], dtype=torch.float64).expand(adapter.position_axes, 1, -1)
    hidden = torch.zeros(1, 13, 64)
    scale = frequency_factors(InferenceConfig(technique), adapter.spec, 24.0)
    ours = adapter.rotary(hidden, position, False, scale)["full_attention"]
    theirs = other.rotary(hidden, position, False)["full_attention"]
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[..., :12, :], wanted[..., :12, :], rtol=0, atol=1e-6)
        torch.testing.assert_close(mine, wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_linear_is_the_host_with_a_linear_rope(family):
    """The whole prompt, then decoding, a padded batch."""
    host, inputs = host_with(family, rope_type="linear", factor=2.0), tiny_inputs(family, BATCH)
    model = tiny_model(family)
    with patched(model, InferenceConfig(LinearScaling(2.0))):
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(model(**inputs).logits[real], host(**inputs).logits[real], rtol=0, atol=1e-4)
        ours = model.generate(**inputs, **GREEDY)
    assert_same(ours, host.generate(**inputs, **GREEDY))
    assert not torch.allclose(ours.logits[0], model.generate(**inputs, **GREEDY).logits[0], atol=1e-3)


@pytest.mark.parametrize("family", ["internvl", "llava", "gemma3", "qwen2_vl", "qwen3_vl"])
def test_ntk_is_the_host_with_a_dynamic_rope_while_the_prompt_goes_in(family):
    window = 16
    host, model = host_with(family, window, rope_type="dynamic", factor=2.0), in_window(family, window)
    inputs = tiny_inputs(family, [[13, IMAGE, 25]])
    with patched(model, InferenceConfig(DynamicNTK(2.0))):
        torch.testing.assert_close(model(**inputs).logits, host(**inputs).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["internvl", "llava", "gemma3", "qwen2_vl"])
def test_ntk_keeps_the_prompts_frequencies_while_decoding(family):
    """The host whose theta is that of the prompt's length, and does not move on."""
    window, dim = 16, 16
    model, inputs = in_window(family, window), tiny_inputs(family, [[13, IMAGE, 25]])
    with patched(model, InferenceConfig(DynamicNTK())):
        ours = model.generate(**inputs, **GREEDY)
        cache = model(**inputs, use_cache=True).past_key_values
    parameters = adapter_for(model).text_config.rope_parameters
    theta = parameters.get("full_attention", parameters)["rope_theta"]
    theta *= (cache.rotary_length / window) ** (dim / (dim - 2))
    assert_same(ours, host_with(family, window, rope_theta=theta).generate(**inputs, **GREEDY))


@pytest.mark.parametrize("technique", [LinearScaling(1), LinearScaling(), DynamicNTK(2.3)], ids=repr)
@pytest.mark.parametrize("family", ["internvl", "gemma3", "qwen2_vl"])
def test_a_factor_of_one_changes_no_bit(family, technique):
    model, inputs = tiny_model(family), tiny_inputs(family, BATCH)
    outs = []
    for config in (InferenceConfig(), InferenceConfig(technique)):
        with patched(model, config):
            outs.append(model.generate(**inputs, **GREEDY))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert torch.equal(torch.stack(outs[0].logits), torch.stack(outs[1].logits))


def test_it_works_on_top_of_llama_3s_frequencies():
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    adapter = adapter_for(host_with("llava", **llama3))
    own, position = adapter.language_model.rotary_emb.inv_freq, torch.arange(9).double()[None, None]
    scale = frequency_factors(InferenceConfig(LinearScaling(2.0)), adapter.spec, 9.0)
    cos, _ = adapter.rotary(torch.zeros(1, 9, 64), position, False, scale)["full_attention"]
    assert not torch.allclose(own.double(), inverse(16))
    torch.testing.assert_close(cos[0, :, :8], (position[0, 0, :, None] * own / 2).cos().float(), rtol=0, atol=1e-6)


def test_gemmas_windows_stay_as_trained():
    adapter, hidden = adapter_for(tiny_model("gemma3")), torch.zeros(1, 30, 64)
    position = torch.arange(30).double()[None, None]
    scale = LinearScaling(2.0).frequency_factors(0, 1, 16)
    scaled, own = adapter.rotary(hidden, position, False, scale), adapter.rotary(hidden, position, False)
    assert all(map(torch.equal, scaled["sliding_attention"], own["sliding_attention"]))
    assert not torch.allclose(scaled["full_attention"][0], own["full_attention"][0], atol=1e-2)


@beyond
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl"])
def test_a_second_turn_keeps_the_firsts_factor(family):
    """The host with the first turn's factor, over both turns at once."""
    first, second = (tiny_inputs(family, [prompt], seed) for seed, prompt in enumerate([[5, IMAGE, 3], [9, IMAGE, 6]]))
    along_tokens = {name for name in first if first[name].shape == first["input_ids"].shape}
    whole = {name: torch.cat([first[name], second[name]], int(name in along_tokens)) for name in first}
    second["attention_mask"] = whole["attention_mask"]
    model = tiny_model(family)
    with patched(model, InferenceConfig(LinearScaling(window=10))):
        cache = model(**first, use_cache=True).past_key_values
        length = cache.rotary_length
        ours = model(**second, past_key_values=cache, use_cache=True).logits[:, -1]
    assert cache.rotary_length == length > 10 and float(cache.next_position) > length
    host = host_with(family, rope_type="linear", factor=length / 10)
    torch.testing.assert_close(ours, host(**whole).logits[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("technique", [LinearScaling(window=10), DynamicNTK(window=10)], ids=repr)
def test_a_batch_takes_its_longest_sequences_scale(technique):
    model, inputs = tiny_model("internvl"), tiny_inputs("internvl", BATCH)
    length = int(inputs["attention_mask"].sum(1).max())
    linear = isinstance(technique, LinearScaling)
    alone = LinearScaling(length / 10) if linear else DynamicNTK(length=length, window=10)
    with patched(model, InferenceConfig(technique)):
        together = model.generate(**inputs, **GREEDY)
    with patched(model, InferenceConfig(alone)):
        singles = [model.generate(**row, **GREEDY) for row in tiny_rows("internvl", BATCH)]
    for row, single in enumerate(singles):
        ours = torch.stack([x[row] for x in together.logits[: len(single.logits)]])
        torch.testing.assert_close(ours, torch.stack([x[0] for x in single.logits]), rtol=0, atol=1e-4)


def test_tables_ahead_notice_another_caches_length():
    adapter = adapter_for(tiny_model("qwen2_vl"))
    config, hidden = InferenceConfig(LinearScaling(window=10)), torch.zeros(2, 1, 64)

    def scale(length):
        return frequency_factors(config, adapter.spec, length)

    ahead = RotaryAhead(adapter, False, scale)
    start = torch.tensor([30.0, 44.0], dtype=torch.float64)
    for step in range(STEPS_AHEAD + 3):
        position, length = start + step, 50.0 if step % 5 else 90.0
        got = ahead.tables(hidden, position, length)["full_attention"]
        wanted = adapter.rotary(hidden, position[None, :, None].expand(3, -1, -1), False, scale(length))
        for mine, theirs in zip(got, wanted["full_attention"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


@beyond
def test_two_caches_of_different_lengths_decode_side_by_side():
    """Steps of the one between those of the other, at the same positions."""
    model, ids = tiny_model("llava"), torch.randint(10, 400, (1, 30))
    with patched(model, InferenceConfig(LinearScaling(window=10))):

        def filled(cut):
            cache = model(input_ids=ids[:, :cut], use_cache=True).past_key_values
            return model(input_ids=ids[:, cut:], past_key_values=cache, use_cache=True).past_key_values

        def steps(*caches):
            tokens = [ids[:, i : i + 1] for i in range(6)]
            return [[model(input_ids=t, past_key_values=c).logits for c in caches] for t in tokens]

        short, long = filled(12), filled(29)
        assert (short.rotary_length, long.rotary_length) == (12, 29)
        alone = [steps(short.clone()), steps(long.clone())]
        for (a,), (b,), (c, d) in zip(*alone, steps(short, long), strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)
            assert not torch.allclose(a, b, atol=1e-3)


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


@pytest.fixture(scope="module")
def content():
    return nano.sample_messages()[0]["content"][:-1]


def with_positions(engine, technique):
    return Engine(engine.model, engine.processor, InferenceConfig(technique))


SCALED = [LinearScaling(window=400), DynamicNTK(2.0, window=400)]


@beyond
@pytest.mark.parametrize("technique", SCALED, ids=repr)
def test_saved_chats_and_forks_go_on_with_their_factor(engine, content, technique, tmp_path):
    engine = with_positions(engine, technique)
    chat = engine.chat(output_logits=True)
    chat.read(content)
    length = chat.cache.rotary_length
    assert length > 400
    chat.save(tmp_path / "chat.safetensors")
    others = [chat.fork(), engine.load_chat(tmp_path / "chat.safetensors", output_logits=True)]
    answer = chat.send("Which image shows a blue 1?")
    for other in others:
        assert other.cache.rotary_length == length
        again = other.send("Which image shows a blue 1?")
        assert again.token_ids == answer.token_ids and torch.equal(again.logits, answer.logits)
    assert chat.cache.rotary_length == length < float(chat.cache.next_position)


@pytest.mark.parametrize("technique", [LinearScaling(2.0), DynamicNTK(length=2000, window=400)], ids=repr)
def test_given_numbers_make_pieces_equal_one_prompt(engine, content, technique):
    engine = with_positions(engine, technique)
    chat = engine.chat(output_logits=True)
    chat.read(content[:5])
    chat.read(content[5:])
    pieces = chat.send("Which image shows a blue 1?")
    question = {"type": "text", "text": "Which image shows a blue 1?"}
    whole = engine.generate([*content, question], output_logits=True)
    assert pieces.token_ids == whole.token_ids
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=0, atol=1e-4)


def test_only_what_the_first_prompt_decides_needs_it_whole():
    assert "LinearScaling.factor" in LinearScaling().needs_whole_prompt
    assert "DynamicNTK.length" in DynamicNTK().needs_whole_prompt
    for fixed in (LinearScaling(2.0), DynamicNTK(length=2000)):
        assert fixed.needs_whole_prompt is None and not fixed.fractional


def test_a_failed_first_turn_leaves_no_length(engine, content):
    """Broken off at the first token, when the prompt is in the cache already."""
    chat, lengths = with_positions(engine, LinearScaling(window=400)).chat(), []

    class BreaksOff:
        def put(self, value):
            lengths.append(chat.cache.rotary_length)
            if len(lengths) == 2:
                raise RuntimeError("no more")

        def end(self):
            pass

    with pytest.raises(RuntimeError, match="no more"):
        chat.send(content, streamer=BreaksOff())
    assert lengths[1] > 400 and chat.cache.rotary_length == 0
    chat.send(content[:3], max_new_tokens=1)
    assert 0 < chat.cache.rotary_length < 400


def warned(model, config, *prompts):
    """What is warned of while these prompts go into one cache."""
    with warnings.catch_warnings(record=True) as caught, patched(model, config):
        warnings.simplefilter("always", UserWarning)
        cache = None
        for length in prompts:
            given = {} if cache is None else {"past_key_values": cache}
            cache = model(input_ids=torch.full((1, length), 20), use_cache=True, **given).past_key_values
    return [str(w.message) for w in caught if "rotary position" in str(w.message)]


def test_warnings_come_where_the_scale_does_not_reach():
    model = in_window("llava", 24)
    for technique in (LinearScaling(), DynamicNTK(), LinearScaling(2.0), DynamicNTK(length=48), None):
        assert warned(model, InferenceConfig(technique), 24) == []
        said = warned(model, InferenceConfig(technique), 48)
        assert [("V2PE" in text, "made for 24" in text) for text in said] == ([] if technique else [(True, True)])
    (said,) = warned(model, InferenceConfig(LinearScaling()), 40, 9)
    assert "position 49" in said and "scaled for 40" in said and "LinearScaling(factor=8.0)" in said
    (said,) = warned(model, InferenceConfig(DynamicNTK()), 40, 9)
    assert "scaled for 40" in said and "DynamicNTK(length=270_000)" in said
    (said,) = warned(model, InferenceConfig(LinearScaling(1.5)), 40)
    assert "scaled for 36" in said and "V2PE" not in said
    (said,) = warned(model, InferenceConfig(LinearScaling(2.0, window=10)), 22)
    assert "position 22" in said and "scaled for 20" in said


@pytest.mark.parametrize("factor", [0, 0.5, -2, True, None, "8", "AUTO", float("nan"), float("inf")], ids=repr)
def test_factors_below_one_are_refused(factor):
    with pytest.raises(
        ConfigError, match=rf'LinearScaling\.factor={factor!r}, wanted .* 1 or more or "auto"; 1 leaves'
    ):
        LinearScaling(factor)
    with pytest.raises(ConfigError, match=rf"DynamicNTK\.factor={factor!r}, wanted a number of 1 or more; 1 leaves"):
        DynamicNTK(factor)


@pytest.mark.parametrize("value", [0, -1, 1.5, 4096.0, True, "8k"], ids=repr)
def test_lengths_and_windows_are_numbers_of_positions(value):
    for name, make in [
        ("LinearScaling.window", lambda: LinearScaling(window=value)),
        ("DynamicNTK.window", lambda: DynamicNTK(window=value)),
        ("DynamicNTK.length", lambda: DynamicNTK(length=value)),
    ]:
        with pytest.raises(ConfigError, match=rf"{name}={value!r}, wanted 1 or more positions, or None for"):
            make()


def test_ntk_has_no_auto_factor():
    with pytest.raises(ConfigError, match="'auto'"):
        DynamicNTK("auto")


@settings(deadline=None, max_examples=40)
@given(
    technique=st.one_of(
        st.builds(LinearScaling, st.just("auto") | factors | st.integers(1, 9), st.none() | windows),
        st.builds(DynamicNTK, factors | st.integers(1, 9), st.none() | lengths, st.none() | windows),
    )
)
def test_settings_go_through_json(technique):
    config = InferenceConfig(technique)
    text = config.to_json()
    assert InferenceConfig.from_json(text) == config
    fields = json.loads(text)["positions"]
    assert fields.pop("technique") == type(technique).__name__ and fields.keys() == vars(technique).keys()
