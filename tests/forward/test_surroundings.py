"""What users put around the layers, before a patch or an engine and after: honoured, or refused before any pass."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mminfer import Engine, InferenceConfig, UnsupportedModelError, patch, patched
from mminfer.forward.probe import is_close, is_same
from tests.forward.test_host_check import replace_forward
from tests.models.test_language_models import config_under_llava
from tests.tiny import IMAGE, tiny_inputs, tiny_model

OFF = InferenceConfig()
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def model():
    return copy.deepcopy(tiny_model("llava"))


@pytest.fixture
def inputs():
    return tiny_inputs("llava", [[4, IMAGE, 5], [6, IMAGE]])


def twice(module, args, output):
    output.last_hidden_state = 2 * output.last_hidden_state
    return output


def moved(module, args, kwargs):
    if kwargs.get("input_ids") is not None:
        return args, {**kwargs, "input_ids": (kwargs["input_ids"] + 1).clamp_max(400)}
    return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + 0.3}


def hook_behind(module):
    module.register_forward_hook(twice)


def hook_before(module):
    module.register_forward_pre_hook(moved, with_kwargs=True)


def own_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: twice(module, args, forward(*args, **kwargs))


@pytest.mark.parametrize("part", ["model", "model.language_model"])
@pytest.mark.parametrize("change", [hook_behind, hook_before, own_forward])
def test_what_comes_after_the_comparison_is_seen_as_well(model, inputs, part, change):
    engine, handle = Engine(model, None), None
    try:
        handle = patch(model, OFF)
        model.generate(**inputs, **GREEDY)
        change(model.get_submodule(part))
        with pytest.raises(UnsupportedModelError, match="is not computed by our pass"):
            model.generate(**inputs, **GREEDY)
    finally:
        handle.undo()
    with pytest.raises(UnsupportedModelError, match="is not computed by our pass"):
        engine.runner.settings({})


def test_hooks_that_only_look_do_not_disturb(model, inputs):
    seen: list[int] = []
    host = model.generate(**inputs, **GREEDY)
    with patched(model, OFF):
        for part in (model, model.model, model.model.language_model):
            part.register_forward_hook(lambda *_: seen.append(0))
        assert torch.equal(model.generate(**inputs, **GREEDY), host)
    assert seen


def test_hooks_on_the_model_itself_run_around_a_pass(model, inputs):
    def reversed_logits(module, args, output):
        output.logits = -output.logits
        return output

    model.register_forward_hook(reversed_logits)
    host = model.generate(**inputs, **GREEDY)
    with patched(model, OFF):
        assert torch.equal(model.generate(**inputs, **GREEDY), host)


def test_a_forward_put_on_the_model_after_the_engine_is_not_lost(model):
    engine, forward = Engine(model, None), model.forward

    def negative(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = -output.logits
        return output

    model.forward = negative
    with pytest.raises(UnsupportedModelError, match="norm and the head"):
        engine.runner.settings({})


def test_layers_that_a_config_leaves_out_later_are_seen(model):
    engine = Engine(model, None)
    model.config.text_config.num_hidden_layers = 2
    with pytest.raises(UnsupportedModelError, match="runs 2 layers, but has 4"):
        engine.runner.settings({})


def test_a_language_model_that_is_exchanged_is_refused(model, inputs):
    engine = Engine(model, None)
    with patched(model, OFF):
        model.model.language_model = copy.deepcopy(model.model.language_model)
        with pytest.raises(UnsupportedModelError, match="was replaced"):
            model.generate(**inputs, **GREEDY)
    with pytest.raises(UnsupportedModelError, match="was replaced"):
        engine.runner.settings({})


def test_the_comparison_stays_off_where_it_was_turned_off(model, inputs):
    with patched(model, OFF, verify=False):
        hook_behind(model.model)
        assert model.generate(**inputs, **GREEDY).shape[0] == 2


def features_times(factor: float) -> Any:
    """A forward that puts image features in by itself, as research code does."""

    def merged(forward, args, kwargs):
        kwargs = dict(kwargs)
        pixels, encoded = kwargs.pop("pixel_values", None), kwargs.pop("mm_encoder_outputs", None) or {}
        if pixels is None and not encoded:
            return forward(*args, **kwargs)
        base = forward.__self__
        output = encoded.get("image") or base.get_image_features(pixels)
        ids = kwargs.pop("input_ids")
        embeds = base.get_input_embeddings()(ids).clone()
        embeds[ids == base.config.image_token_id] = factor * torch.cat(list(output.pooler_output))
        return forward(*args, **{**kwargs, "inputs_embeds": embeds})

    return merged


def test_image_features_that_a_models_own_forward_changes(model, inputs):
    replace_forward(model.model, features_times(1.0))
    host = model.generate(**inputs, **GREEDY)
    with patched(model, OFF):
        assert torch.equal(model.generate(**inputs, **GREEDY), host)
    model = copy.deepcopy(tiny_model("llava"))
    replace_forward(model.model, features_times(2.0))
    with patched(model, OFF), pytest.raises(UnsupportedModelError, match="32 visual tokens"):
        model.generate(**inputs, **GREEDY)


def barred(forward, args, kwargs):
    output = forward(*args, **kwargs)
    output.logits[..., 100:300] = float("-inf")
    return output


def nudged(forward, args, kwargs):
    output = forward(*args, **kwargs)
    output.logits[..., 7] += 0.2
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [barred, nudged])
def test_single_logits_that_a_forward_changes_are_seen(model, change, dtype):
    model = model.to(dtype)
    replace_forward(model, change)
    with pytest.raises(UnsupportedModelError, match="norm and the head"):
        patched(model, OFF).__enter__()


def test_numbers_of_infinite_size_are_the_same_or_not():
    host = torch.tensor([1.0, -torch.inf, 2.0])
    for same in (is_same, lambda a, b: is_close(a, b, 0.1, 0.1)):
        assert same(host.clone(), host) and not same(torch.tensor([1.0, 3.0, 2.0]), host)
        assert not same(torch.tensor([1.0, torch.inf, 2.0]), host)
        assert not same(torch.tensor([1.0, -torch.inf, torch.nan]), host)


@pytest.mark.parametrize("far", [False, True])
def test_frequencies_that_follow_the_length_are_no_difference(far):
    """A rotary embedding that remembers the longest prompt answers as it is found, in the comparison too."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    config = config_under_llava("llama", max_position_embeddings=64)
    config.text_config.rope_parameters = rope
    torch.manual_seed(0)
    model = copy.deepcopy(tiny_model("llava"))
    rotary: nn.Module = type(model.model.language_model.rotary_emb)(config.text_config)
    model.model.language_model.rotary_emb = rotary
    model.config.text_config.max_position_embeddings = 64
    if far:
        model(input_ids=torch.arange(3, 103)[None])
    with patched(model, OFF):
        pass
