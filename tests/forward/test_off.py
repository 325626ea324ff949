"""With every technique off, and with every technique at its identity, the host's tokens and logits come out."""

import copy
import dataclasses

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mminfer import (
    V2PE,
    AIMMerge,
    AIMPrune,
    ConfigError,
    InferenceConfig,
    InputError,
    LookM,
    OperatorSkip,
    RegionMerge,
    patch,
    patched,
)
from mminfer.models.registry import adapter_for
from tests.tiny import FAMILIES, IMAGE, MARKED_FAMILIES, VIDEO, fitting, skip_if_refused, tiny_inputs, tiny_model

GREEDY = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
BATCH = [[3, IMAGE, 5, IMAGE, 4], [2, IMAGE, 9], [6]]

IDENTITIES = {
    "off": InferenceConfig(),
    "delta 1": InferenceConfig(positions=V2PE(delta=1)),
    "merge 1": InferenceConfig(merge=AIMMerge(ratio=1)),
    "regions 1": InferenceConfig(merge=RegionMerge(ratio=1)),
    "budget 1": InferenceConfig(cache=LookM(important_ratio=1, recent_ratio=0.5)),
    "budget of all": InferenceConfig(cache=LookM(budget=10_000)),
    "no skip": InferenceConfig(skip=OperatorSkip()),
    "all at once": InferenceConfig(
        V2PE(delta=1), AIMMerge(ratio=1), None, OperatorSkip(), LookM(important_ratio=0.5, recent_ratio=0.5)
    ),
}


def batch(family: str) -> list[list[int | str]]:
    prompts = copy.deepcopy(BATCH)
    if FAMILIES[family].video_tokens:
        prompts[1].insert(1, VIDEO)
    return prompts


def assert_same(ours, host) -> None:
    assert torch.equal(ours.sequences, host.sequences)
    for a, b in zip(ours.logits, host.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_identity_equals_host(family, name):
    model, inputs = tiny_model(family), tiny_inputs(family, batch(family))
    config = fitting(family, IDENTITIES[name])
    host = model.generate(**inputs, **GREEDY)
    with patched(model, config):
        ours = model.generate(**inputs, **GREEDY)
    assert_same(ours, host)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_nothing_is_the_host(family):
    """A schedule that keeps every visual token: importance is computed, nobody leaves."""

    @dataclasses.dataclass(frozen=True)
    class KeepAll(AIMPrune):
        def schedule(self, num_layers: int) -> list[float]:
            return [1.0] * num_layers

        def prunes(self, layer_idx: int, num_layers: int) -> bool:
            return True

    model, inputs = tiny_model(family), tiny_inputs(family, batch(family))
    config = InferenceConfig(prune=KeepAll())
    skip_if_refused(family, config)
    host = model.generate(**inputs, **GREEDY)
    with patched(model, config):
        assert_same(model.generate(**inputs, **GREEDY), host)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_gives_the_hosts_logits_at_every_token(family):
    model, inputs = tiny_model(family), tiny_inputs(family, batch(family))
    host = model(**inputs).logits
    with patched(model, InferenceConfig()):
        ours = model(**inputs).logits
        last_two = model(**inputs, logits_to_keep=2).logits
        chosen = model(**inputs, logits_to_keep=torch.tensor([3, 1])).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], host[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(last_two, host[:, -2:], rtol=0, atol=1e-4)
    torch.testing.assert_close(chosen[0], host[0, [3, 1]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_samples_equal_host(kwargs):
    model, inputs = tiny_model("internvl"), tiny_inputs("internvl", BATCH)
    torch.manual_seed(3)
    host = model.generate(**inputs, max_new_tokens=6, **kwargs)
    with patched(model, InferenceConfig()):
        torch.manual_seed(3)
        ours = model.generate(**inputs, max_new_tokens=6, **kwargs)
    assert torch.equal(ours, host)


def test_use_cache_false_equals_host():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", BATCH)
    host = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with patched(model, InferenceConfig()):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False), host)


@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_undo_leaves_no_trace(family):
    model, inputs = tiny_model(family), tiny_inputs(family, batch(family))
    base = model.base_model
    model(**inputs)  # the host leaves marks of its own on a first call
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    implementations = set(ALL_ATTENTION_FUNCTIONS)
    host = model.generate(**inputs, **GREEDY)
    deltas = getattr(base, "rope_deltas", None)
    everything = InferenceConfig(V2PE(0.25), AIMMerge(), AIMPrune(), OperatorSkip(ffn=[1], attention=[2]), LookM())
    handle = patch(model, fitting(family, everything))
    model.generate(**inputs, **GREEDY)
    handle.undo()
    handle.undo()
    assert "forward" not in model.__dict__
    assert set(ALL_ATTENTION_FUNCTIONS) == implementations
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert getattr(base, "rope_deltas", None) is deltas
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == hooks[name]
    assert_same(model.generate(**inputs, **GREEDY), host)


def test_a_patch_is_refused_while_another_is_on():
    model = tiny_model("llava")
    with patched(model, InferenceConfig()), pytest.raises(ConfigError, match="undo"):
        patch(model, InferenceConfig())


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
)
def test_what_cannot_be_given_is_refused(kwargs, names):
    model, inputs = tiny_model("llava"), tiny_inputs("llava", BATCH)
    host = model.generate(**inputs, **GREEDY)
    with patched(model, InferenceConfig()):
        with pytest.raises(InputError, match=names):
            model.generate(**inputs, max_new_tokens=2, **kwargs)
        assert_same(model.generate(**inputs, **GREEDY), host)


def test_a_foreign_cache_is_refused():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[7]])
    cache = model(**inputs, use_cache=True).past_key_values
    with patched(model, InferenceConfig()), pytest.raises(InputError, match="DynamicCache"):
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_without_pixels_are_refused(family):
    model, inputs = tiny_model(family), tiny_inputs(family, [[3, IMAGE, 4]])
    del inputs["pixel_values"]
    calls = []
    hook = adapter_for(model).layers[0].register_forward_pre_hook(lambda *a: calls.append(1))
    with patched(model, InferenceConfig()), pytest.raises(InputError, match="placeholder"):
        model.generate(**inputs, max_new_tokens=2)
    hook.remove()
    assert not calls
