"""Models in wrappers: patched where they stand, or refused with the way out; never a patch that does nothing."""

import pytest
import torch

from mminfer import AIMMerge, Engine, InferenceConfig, UnsupportedModelError, patch, patched
from tests.tiny import tiny_model

MERGED = InferenceConfig(merge=AIMMerge(0.25))
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def by_torch_compile(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_language_model(model):
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    return model


@pytest.mark.parametrize("wrap", [by_torch_compile, compiled_in_place, compiled_forward, compiled_language_model])
def test_a_compiled_model_is_patched(model, inputs, wrap):
    """By `generate` and by a call of the wrapper itself; the compiler does not look into our pass."""
    host = tiny_model("llava").generate(**inputs, **GREEDY)
    wrapped = wrap(model)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with patched(wrapped, MERGED) as handle:
        wrapped.generate(**inputs, **GREEDY)
        assert wrapped(**inputs).logits.shape[1] == 1
    assert len(handle.records) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    with patched(wrapped, InferenceConfig()):
        assert torch.equal(wrapped.generate(**inputs, **GREEDY), host)
    assert model.__dict__.get("_compiled_call_impl") is None or wrap is compiled_in_place


def test_an_engine_takes_the_model_out_of_a_compilers_wrapper(model):
    assert Engine(by_torch_compile(model), None).model is model


def compiled_layer(model):
    layers = model.model.language_model.layers
    layers[1] = torch.compile(layers[1], backend="eager")
    return model


def compiled_mlp(model):
    model.model.language_model.layers[2].mlp.compile(backend="eager")
    return model


class Own(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (compiled_layer, "decoder layer 1 runs under torch.compile.*compile=True"),
        (compiled_mlp, r"decoder layer 2 \(mlp\) runs under torch.compile"),
        (torch.nn.DataParallel, "DataParallel wraps a LlavaForConditionalGeneration: .* its .module"),
        (Own, "Own wraps a LlavaForConditionalGeneration: .* its .inner"),
        (lambda model: model.to("meta"), "is on the meta device"),
    ],
)
def test_what_cannot_be_patched_is_refused_by_name(model, wrap, named):
    wrapped = wrap(model)
    with pytest.raises(UnsupportedModelError, match=named):
        patch(wrapped, InferenceConfig())
    assert "forward" not in vars(model) and "forward" not in vars(wrapped)


@pytest.mark.parametrize("kind", ["LORA", "PROMPT_TUNING"])
def test_adapters_of_peft(model, inputs, kind):
    peft = pytest.importorskip("peft")
    if kind == "PROMPT_TUNING":
        sizes = {"token_dim": 64, "num_layers": 4, "num_attention_heads": 4}
        config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", **sizes)
        with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING"):
            patch(peft.get_peft_model(model, config), InferenceConfig())
        return
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    host = wrapped.eval().generate(**inputs, **GREEDY)
    with patched(wrapped, InferenceConfig()) as handle:
        assert torch.equal(wrapped.generate(**inputs, **GREEDY), host)
    assert len(handle.records) == 1


def test_a_functional_call_runs_on_the_weights_it_is_given(model, inputs):
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    with patched(model, InferenceConfig()):
        assert torch.func.functional_call(model, zeros, kwargs=inputs).logits.abs().max() == 0
        assert model(**inputs).logits.abs().max() > 0
