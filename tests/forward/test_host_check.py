"""The comparison with the host's own pass: it finds what a language model does otherwise, and leaves no trace."""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from mminfer import V2PE, ConfigError, Engine, InferenceConfig, OperatorSkip, UnsupportedModelError, patched
from mminfer.forward.branches import ffn_branch
from mminfer.forward.probe import is_close, is_same
from tests.models.test_language_models import model_under_llava
from tests.tiny import IMAGE, tiny_inputs, tiny_model

OFF = InferenceConfig()


def fresh(family: str = "llava") -> Any:
    return copy.deepcopy(tiny_model(family))


def replace_forward(module: nn.Module, change: Any) -> None:
    """The class's forward goes through `change`, as in a model that nobody thought of."""
    kind = type(module)

    class Other(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args, **kwargs):
            return change(super().forward, args, kwargs)

    module.__class__ = Other


def scaled_input(forward, args, kwargs):
    return forward(*args, **{**kwargs, "inputs_embeds": 3.0 * kwargs["inputs_embeds"]})


def shifted_input(forward, args, kwargs):
    return forward(*args, **{**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + 0.1})


def scaled_output(forward, args, kwargs):
    output = forward(*args, **kwargs)
    output.last_hidden_state = 1.5 * output.last_hidden_state
    return output


def scaled_layer(forward, args, kwargs):  # only where the host's own loop calls it
    hidden = forward(*args, **kwargs)
    return hidden if "attend" in kwargs else 1.1 * hidden


def test_a_factor_before_the_first_layer_is_taken_over():
    model, inputs = fresh(), tiny_inputs("llava", [[4, IMAGE, 5], [6, IMAGE]])
    replace_forward(model.model.language_model, scaled_input)
    ask = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    host = model.generate(**inputs, **ask)
    with patched(model, OFF):
        ours = model.generate(**inputs, **ask)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(host.logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("place", "change", "named"),
    [
        ("language_model", shifted_input, "before its first layer"),
        ("language_model", scaled_output, "logits"),
        ("language_model.layers.2", scaled_layer, "layer 2"),
    ],
)
def test_what_the_host_does_otherwise_is_refused(place, change, named, dtype):
    model = fresh().to(dtype)
    replace_forward(model.model.get_submodule(place), change)
    before = model(input_ids=torch.tensor([[3, 4, 5]])).logits
    with pytest.raises(UnsupportedModelError, match=named):
        patched(model, OFF).__enter__()
    with pytest.raises(UnsupportedModelError, match=named):
        Engine(model, None)
    assert torch.equal(model(input_ids=torch.tensor([[3, 4, 5]])).logits, before)


def test_the_comparison_can_be_turned_off():
    model = fresh()
    replace_forward(model.model.language_model.layers[1], scaled_layer)
    with patched(model, OFF, verify=False):
        assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_model_is_compared_once_and_left_as_it_was():
    model, calls = fresh("qwen2_vl").train(), []
    model.model.language_model.layers[0].eval()
    state = {name: module.training for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.lm_head.register_forward_hook(lambda *_: calls.append(0))
    random = torch.get_rng_state()
    for _ in range(3):
        with patched(model, OFF):
            pass
    assert 0 < len(calls) < 6
    assert {name: module.training for name, module in model.named_modules()} == state
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_rotary_embedding_forgets_the_far_positions_of_the_comparison():
    model = fresh()
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    text = model.config.text_config
    text.rope_parameters, text.max_position_embeddings = rope, 256
    rotary = type(model.model.language_model.rotary_emb)(text)
    model.model.language_model.rotary_emb = rotary
    ids = torch.arange(3, 103)[None]
    before, remembered = model(input_ids=ids).logits, rotary.max_seq_len_cached
    with patched(model, OFF):
        pass
    assert rotary.max_seq_len_cached == remembered
    assert torch.equal(model(input_ids=ids).logits, before)


def test_weights_that_are_nowhere_are_refused_and_offloaded_ones_are_not():
    with pytest.raises(UnsupportedModelError, match="meta"):
        Engine(fresh().to("meta"), None)
    model = fresh()
    cpu_offload(model, torch.device("cpu"))
    with patched(model, OFF):
        assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [
        ("llama", "post_attention_layernorm", "mlp"),
        ("olmo2", "mlp", "post_feedforward_layernorm"),
        ("gemma3_text", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ("granitemoe", "post_attention_layernorm", "block_sparse_moe"),
    ],
)
def test_the_ffn_is_found_whatever_it_is_called(kind, first, last):
    model = model_under_llava(kind)
    with patched(model, InferenceConfig(skip=OperatorSkip(ffn=[1], attention=[2]))):
        assert ffn_branch(model.model.language_model.layers[1]) == (first, last)


def test_what_layers_do_not_carry_is_refused_by_name():
    cohere, phi = model_under_llava("cohere"), model_under_llava("phi3")
    for model, config, named in [
        (cohere, InferenceConfig(skip=OperatorSkip(ffn=[0])), "CohereDecoderLayer.* no FFN"),
        (cohere, InferenceConfig(positions=V2PE(delta=1 / 16)), "rotary angles"),
        (phi, InferenceConfig(skip=OperatorSkip(attention=[0])), "Phi3DecoderLayer.* cannot leave rows out"),
    ]:
        with pytest.raises(ConfigError, match=named):
            patched(model, config).__enter__()
    with patched(cohere, OFF), patched(phi, OFF):
        pass


def test_attention_that_asks_for_more_is_refused():
    model = fresh()
    attention = model.model.language_model.layers[1].self_attn
    replace_forward(attention, lambda forward, args, kwargs: forward(*args, **kwargs, softcap=30.0))
    with pytest.raises(UnsupportedModelError, match="softcap"):
        patched(model, OFF).__enter__()
    model = fresh()
    attention = model.model.language_model.layers[1].self_attn
    replace_forward(
        attention, lambda forward, args, kwargs: forward(*args, **{k: v for k, v in kwargs.items() if k != "attend"})
    )
    with pytest.raises(UnsupportedModelError, match="hand on"):
        patched(model, OFF).__enter__()


def test_a_window_that_the_config_does_not_name_is_refused():
    model = fresh()
    attention = model.model.language_model.layers[1].self_attn
    replace_forward(attention, lambda forward, args, kwargs: forward(*args, **kwargs, sliding_window=64))
    with pytest.raises(UnsupportedModelError, match="layer 1 asks for a window of 64"):
        patched(model, OFF).__enter__()


def test_what_is_nothing_on_both_sides_is_close():
    nothing = torch.zeros(2, 3, 4)
    assert is_close(nothing, nothing.clone(), 1e-5, 0.02) and not is_close(nothing + 1e-9, nothing, 1e-5, 0.02)
    host = torch.ones(2, 3, 4)
    for dtype, bar in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):  # each has its own bar
        ours = [(host * (1 + part * bar)) for part in (0.9, 1.1)]
        assert [is_close(x, host.to(dtype), 1e-5, 0.02) for x in ours] == [True, False]


def test_the_same_module_twice_may_round():
    """By four steps of each number's own and two of all numbers' size, whatever the others are."""
    host = torch.tensor([0.0, 0.0, 0.0, 2.0])  # a mean square of 1
    for place, bar in ((0, 2e-4), (3, 1e-3)):
        step = torch.eye(4)[place] * bar
        assert is_same(host + 0.95 * step, host) and is_same(host - 0.95 * step, host)
        assert not is_same(host + 1.05 * step, host) and not is_same(host - 1.05 * step, host)
    assert is_same(host.bfloat16() + 2 * torch.eye(4)[0] * 2**-7, host.bfloat16())
