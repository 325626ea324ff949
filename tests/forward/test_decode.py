"""Which way a decoding step takes, that all ways give the same tokens, and that none of them copies the cache."""

import contextlib
import copy

import pytest
import torch
from mminfer_kernels import record_backends
from mminfer_kernels.backends import cpu_takes
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mminfer import V2PE, AIMPrune, Engine, InferenceConfig, LookM, nano, patched
from mminfer.forward import compiled
from mminfer.forward.rotary import STEPS_AHEAD, RotaryAhead
from mminfer.metrics.flops import measured_flops
from mminfer.models.registry import adapter_for
from tests import tiny_models
from tests.kernels.agreement import as_double, assert_agrees
from tests.tiny import FAMILIES, IMAGE, MARKED_FAMILIES, fitting, tiny_inputs, tiny_model

native = pytest.mark.skipif(not cpu_takes(torch.empty(0)), reason="no C++ library here")
STANDARD = [family for family in FAMILIES if family != "gemma3"]  # which has norms, windows and GELU of its own
BATCH = [[3, IMAGE, 5, IMAGE, 4], [2, IMAGE, 9], [6]]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
OFF = InferenceConfig()
COMPRESSED = InferenceConfig(V2PE(1 / 4), prune=AIMPrune(1, 3), cache=LookM(0.3, 0.1))


def run(model, inputs, config=OFF, **kwargs):
    """The output of `generate`, and what ran the steps."""
    with patched(model, config), record_backends() as backends:
        out = model.generate(**inputs, **GREEDY | kwargs)
    return out, backends.get("decode_step")


@contextlib.contextmanager
def hooked(module):
    calls = []
    handle = module.register_forward_hook(lambda *args: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def assert_same(ours, host):
    assert torch.equal(ours.sequences, host.sequences)
    for a, b in zip(ours.logits, host.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@native
@pytest.mark.parametrize("config", [OFF, COMPRESSED], ids=["off", "compressed"])
@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_the_fused_step_equals_the_hosts_modules(family, config):
    """Rows of different lengths, and under compression layers of different lengths too."""
    model, inputs, config = tiny_model(family), tiny_inputs(family, BATCH), fitting(family, config)
    ours, ran = run(model, inputs, config)
    with hooked(adapter_for(model).layers[2].mlp) as calls:
        through_modules, ran_hooked = run(model, inputs, config)
    assert ran == ("native" if family in STANDARD else "host")
    assert ran_hooked == "host"
    assert len(calls) == len(ours.logits)
    assert_same(ours, through_modules)


@native
@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 3},
        {"num_return_sequences": 3, "do_sample": True},
        pytest.param({"num_beams": 2, "max_new_tokens": 90}, marks=pytest.mark.slow),
    ],
)
def test_beams_and_samples_by_the_fused_step(kwargs):
    """The longest grows the cache on the way."""
    model, inputs = tiny_model("qwen3_vl"), tiny_inputs("qwen3_vl", BATCH)
    outs = []
    for module in (None, adapter_for(model).layers[0].self_attn.o_proj):
        torch.manual_seed(3)
        with contextlib.nullcontext() if module is None else hooked(module):
            outs.append(run(model, inputs, **{"output_logits": False} | kwargs))
    assert [ran for _, ran in outs] == ["native", "host"]
    assert torch.equal(outs[0][0].sequences, outs[1][0].sequences)


def other_linear(layer):
    class Wrapped(nn.Linear):
        pass

    layer.mlp.up_proj.__class__ = Wrapped


def replaced_forward(layer):
    original = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, **kwargs: original(*args, **kwargs)


def extra_module(layer):
    layer.mlp.adapter = nn.Identity()


def other_activation(layer):
    layer.mlp.act_fn = nn.GELU()


def strided_weight(layer):
    layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data.T.contiguous().T


def other_epsilon(layer):
    layer.input_layernorm.variance_epsilon = 1e-3


def half(layer):
    layer.mlp.half()
    layer.mlp.register_forward_pre_hook(lambda _, args: tuple(x.half() for x in args))
    layer.mlp.register_forward_hook(lambda _, args, out: out.float())


def training(layer):
    layer.train()


def pre_hook(layer):
    layer.post_attention_layernorm.register_forward_pre_hook(lambda *args: None)


@pytest.mark.parametrize(
    "change",
    [
        other_linear, replaced_forward, extra_module, other_activation, strided_weight, other_epsilon, training,
        pre_hook,
    ],
)  # fmt: skip
def test_layers_that_somebody_changed_run_as_modules(change):
    model, inputs = copy.deepcopy(tiny_model("llava")), tiny_inputs("llava", BATCH)
    change(adapter_for(model).layers[1])
    host = model.generate(**inputs, **GREEDY)
    ours, ran = run(model, inputs)
    assert ran == "host"
    assert_same(ours, host)


def test_a_layer_in_half_precision_runs_as_modules():
    """Its input is rounded to float16: where a sum in another order falls to the other side of a float16 number, the
    logits move by some 3e-4, and where that is the case depends on the processor. Both are as near to the truth."""
    model, inputs = copy.deepcopy(tiny_model("llava")), tiny_inputs("llava", BATCH)
    exact = copy.deepcopy(model)
    adapter_for(exact).layers[1].mlp.half()  # the same rounded weights, with which float64 then computes
    truth = exact.double().generate(**as_double(inputs), **GREEDY)
    half(adapter_for(model).layers[1])
    host = model.generate(**inputs, **GREEDY)
    ours, ran = run(model, inputs)
    assert ran == "host"
    assert torch.equal(ours.sequences, host.sequences)  # no step is a near tie: the first is ahead by 0.01 and more
    assert_agrees(*(torch.stack(out.logits) for out in (ours, host, truth)))


@native
def test_a_change_between_two_prompts_is_seen():
    model, inputs = copy.deepcopy(tiny_model("llava")), tiny_inputs("llava", BATCH)
    layer = adapter_for(model).layers[1]
    with patched(model, OFF):
        for change in (
            lambda: None,
            lambda: layer.mlp.down_proj.weight.data.neg_(),
            lambda: setattr(layer.mlp.gate_proj, "weight", nn.Parameter(layer.mlp.gate_proj.weight.flip(0))),
        ):
            change()
            with record_backends() as backends:
                ours = model.generate(**inputs, **GREEDY)
            assert backends["decode_step"] == "native"
            with hooked(layer.mlp):
                assert_same(ours, model.generate(**inputs, **GREEDY))


def test_autocast_and_watchers_see_the_modules():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[7]])
    with patched(model, OFF), record_backends() as backends:
        cache = model(**inputs, use_cache=True).past_key_values
        with torch.autocast("cpu", torch.bfloat16):
            assert model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache).logits.dtype == torch.bfloat16
    assert backends["decode_step"] == "host"
    with measured_flops() as counter:
        assert run(model, inputs)[1] == "host"
    assert counter.get_total_flops() > 0


@native
def test_the_report_names_what_ran():
    stats = Engine.from_pretrained("nano").generate(nano.sample_messages()).stats
    assert stats.backends["decode_step"] == "native"
    assert stats.compile_ms == 0


@pytest.mark.parametrize("module", [None, "o_proj"])
@pytest.mark.parametrize("config", [OFF, COMPRESSED], ids=["off", "compressed"])
def test_steps_do_not_move_the_cache(config, module):
    model, inputs = tiny_model("internvl"), tiny_inputs("internvl", BATCH)
    watched = contextlib.nullcontext() if module is None else hooked(adapter_for(model).layers[0].self_attn.o_proj)
    with patched(model, config), watched:
        cache = model(**inputs, use_cache=True).past_key_values
        places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        for _ in range(60):
            model(input_ids=torch.full((3, 1), 20), past_key_values=cache)
            assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == places


@native
def test_a_step_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    model, inputs = tiny_model("internvl"), tiny_inputs("internvl", BATCH)
    ids = {"input_ids": torch.full((3, 1), 20)}
    with patched(model, OFF):
        cache = model(**inputs, use_cache=True).past_key_values
        want = model(**ids, past_key_values=cache.clone()).logits

        def fail(*args):
            raise MemoryError("none left")

        with monkeypatch.context() as m, pytest.raises(MemoryError, match="none left"):
            m.setattr("mminfer.forward.decode.fused_step", fail)
            model(**ids, past_key_values=cache)
        assert torch.equal(model(**ids, past_key_values=cache).logits, want)


def test_rotary_tables_ahead_are_the_hosts():
    """Past the end of a block of steps, and for positions that jump."""
    adapter = adapter_for(tiny_model("qwen2_5_vl"))

    ahead, x = RotaryAhead(adapter, False), torch.zeros(2, 1, 64)
    start = torch.tensor([3.0, 700.0], dtype=torch.float64)
    for position in [*(start + i for i in range(STEPS_AHEAD + 3)), start + 900, start]:
        want = adapter.rotary(x, position[None, :, None].expand(3, -1, -1), False)["full_attention"]
        got = ahead.tables(x, position)["full_attention"]
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-7)
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-7)


def test_rotary_frequencies_that_follow_the_length():
    """The prompt ends just before the length from which every step has frequencies of its own."""
    text = LlamaConfig(
        **tiny_models.TEXT, max_position_embeddings=24,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )  # fmt: skip
    vision = CLIPVisionConfig(**tiny_models.VISION, image_size=16, patch_size=4, projection_dim=32)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=tiny_models.IMAGE_ID)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    inputs = tiny_inputs("llava", [[22]])
    host = model.generate(**inputs, **GREEDY)
    assert adapter_for(model).rotary_follows_length
    assert_same(run(model, inputs)[0], host)


@pytest.mark.parametrize(
    "family", ["mistral3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("internvl", "gemma3", "qwen3_vl"))]
)
def test_one_graph_serves_all_steps_and_lengths(traced, family):
    model = tiny_model(family)
    for batch in (BATCH, [[40, IMAGE], [2], [5]]):
        inputs = tiny_inputs(family, batch)
        with patched(model, OFF):
            want = model.generate(**inputs, **GREEDY | {"max_new_tokens": 80, "min_new_tokens": 80})
        with patched(model, OFF, compile=True) as handle, record_backends() as backends:
            ours = model.generate(**inputs, **GREEDY | {"max_new_tokens": 80, "min_new_tokens": 80})
            assert len(handle.step_ms) == (78 if handle.compile_ms else 79)
        assert backends["decode_step"] == "compiled"
        assert_same(ours, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@native
def test_one_layer_truly_compiled():
    """By the real compiler, which takes long: so one layer, and no batch."""
    model, inputs = copy.deepcopy(tiny_model("llava")), tiny_inputs("llava", [[3, IMAGE, 4]])
    text = adapter_for(model).language_model
    text.layers, text.config.num_hidden_layers = text.layers[:1], 1
    host = model.generate(**inputs, **GREEDY)
    torch._dynamo.reset()
    with patched(model, OFF, compile=True) as handle, record_backends() as backends:
        assert_same(model.generate(**inputs, **GREEDY), host)
        assert handle.compile_ms > 0 and len(handle.step_ms) == GREEDY["max_new_tokens"] - 2
        first = handle.compile_ms
        assert_same(model.generate(**inputs, **GREEDY), host)
    assert handle.compile_ms == first
    assert backends["decode_step"] == "compiled"


def test_what_the_compiler_stores_is_kept_apart_by_instruction_set(monkeypatch):
    """torch would build C++ of one vector width for another; the user's own tag stays part of the key."""
    tags = []

    def backend(graph, inputs):
        tags.append(torch.compiler.config.cache_key_tag)
        return graph

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: backend)
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "mine ")
    for capability in ("AVX2", "AVX512"):
        torch._dynamo.reset()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        torch.compile(lambda x: x + 1, backend=compiled._inductor)(torch.ones(3))
    torch._dynamo.reset()
    assert tags == ["mine AVX2", "mine AVX512"] and torch.compiler.config.cache_key_tag == "mine "


def test_a_compiler_that_fails_is_done_without(monkeypatch, caplog):
    def broken():
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(compiled, "_compiled", broken)
    engine = Engine.from_pretrained("nano", compile=True)
    output = engine.generate(nano.sample_messages())
    assert output.text == "WB"
    assert output.stats.backends["decode_step"] != "compiled"
    assert [r.message for r in caplog.records if "uncompiled" in r.message] == [
        "mminfer: decoding goes on uncompiled: no compiler"
    ]
