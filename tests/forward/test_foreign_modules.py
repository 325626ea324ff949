"""The prompt pass only calls the host's modules: quantised, offloaded, hooked or bfloat16 ones are not assumed away."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn

from mminfer import V2PE, AIMMerge, AIMPrune, InferenceConfig, LookM, OperatorSkip, patched
from mminfer.models.registry import adapter_for
from tests.kernels.agreement import as_double, assert_agrees, error
from tests.tiny import IMAGE, MARKED_FAMILIES, fitting, tiny_inputs, tiny_model

PROMPTS = [[3, IMAGE, 5, IMAGE, 4], [2, IMAGE, 9]]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
ALL = InferenceConfig(V2PE(1 / 4), AIMMerge(0.5), AIMPrune(1, 3), OperatorSkip(ffn=[0], attention=[1]), LookM(0.3, 0.1))


class Int8Linear(nn.Module):
    """A linear layer as quantisers make it: packed integers, no float `weight` to be reached."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = nn.Buffer(weight.abs().amax(1, keepdim=True) / 127)
        self.packed = nn.Buffer((weight / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.packed * self.scale, self.bias)


def quantised(model):
    model = copy.deepcopy(model)
    for module in adapter_for(model).language_model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model


def same(model, inputs, config, atol):
    host = model.generate(**inputs, **GREEDY)
    with patched(model, config):
        ours = model.generate(**inputs, **GREEDY)
    assert torch.equal(ours.sequences, host.sequences)
    for a, b in zip(ours.logits, host.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_quantised_linear_modules(family):
    model, inputs = quantised(tiny_model(family)), tiny_inputs(family, PROMPTS)
    same(model, inputs, InferenceConfig(), 1e-4)
    with patched(model, fitting(family, ALL)):
        assert model.generate(**inputs, **GREEDY).logits[0].isfinite().all()


@pytest.mark.parametrize(
    "place", [lambda m: dispatch_model(m, {"": "cpu"}, force_hooks=True), lambda m: cpu_offload(m, torch.device("cpu"))]
)
def test_accelerates_hooks(place):
    plain, inputs = tiny_model("llava"), tiny_inputs("llava", PROMPTS)
    model = place(copy.deepcopy(plain)) or plain
    forward = model.__dict__.get("forward")
    same(model, inputs, InferenceConfig(), 1e-4)
    assert model.__dict__.get("forward") is forward
    with patched(model, ALL), patched(plain, ALL):
        ours, want = (m.generate(**inputs, **GREEDY).logits[0] for m in (model, plain))
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_half_precision(family, dtype):
    """Rounding differs with the order of sums, which every instruction set has its own of: truth is in float64.

    Off, ours is no farther from it than the host, but for one rounding of the largest logit.
    """
    model, inputs = copy.deepcopy(tiny_model(family)).to(dtype), tiny_inputs(family, PROMPTS)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    host = model(**inputs).logits[:, -1]
    truth = copy.deepcopy(model).double()(**as_double(inputs)).logits[:, -1].detach()  # of the same rounded weights
    with patched(model, InferenceConfig()):
        ours = model(**inputs).logits[:, -1]
    assert ours.dtype == dtype
    assert error(ours, truth) <= error(host, truth) + torch.finfo(dtype).eps * float(truth.abs().max())
    with patched(model, fitting(family, ALL)):
        out = model(**inputs, use_cache=True)
    assert out.logits.isfinite().all()
    assert out.past_key_values.layers[0].keys.dtype == dtype


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_float64_is_the_hosts_to_ten_digits(family):
    model, inputs = copy.deepcopy(tiny_model(family)).double(), as_double(tiny_inputs(family, PROMPTS))
    same(model, inputs, InferenceConfig(), 1e-10)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_autocast(family):
    """Projections come in bfloat16, rotated queries and keys in float32."""
    model, inputs = tiny_model(family), tiny_inputs(family, PROMPTS)
    truth = model(**inputs).logits[:, -1].detach().double()
    with torch.autocast("cpu", torch.bfloat16):
        host = model(**inputs).logits[:, -1]
        with patched(model, InferenceConfig()):
            assert_agrees(model(**inputs).logits[:, -1], host, truth, floor_steps=1)
        with patched(model, fitting(family, ALL)):
            assert model.generate(**inputs, **GREEDY).logits[-1].isfinite().all()
