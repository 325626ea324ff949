"""Who a patch belongs to: copies are unpatched, and what others put over or under a patch is theirs."""

import copy
import functools
import io
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from mminfer import AIMMerge, ConfigError, Engine, InferenceConfig, InputError, patch, patched
from tests.tiny import FAMILIES, IMAGE, tiny_inputs, tiny_model

MERGED = InferenceConfig(merge=AIMMerge(0.25))
GREEDY = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture
def host(inputs):
    return tiny_model("llava").generate(**inputs, **GREEDY)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def zeroed(model):
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled, saved])
def test_copies_are_unpatched_and_run_on_their_own_weights(inputs, copied):
    model = FAMILIES["llava"].make().eval()
    with patched(model, MERGED) as handle:
        clone = copied(model)
        assert not {"forward", "__getstate__"} & vars(clone).keys()
        logits = clone(**inputs).logits
        assert logits.shape[1] == inputs["input_ids"].shape[1] and not handle.records
        model(**inputs)
        assert len(handle.records) == 1
    assert torch.equal(logits, model(**inputs).logits)
    if copied is not copy.copy:
        assert zeroed(clone)(**inputs).logits.abs().max() == 0
        assert model(**inputs).logits.abs().max() > 0


def test_a_copy_of_a_forward_of_the_instance_is_the_copys_own(model, inputs):
    model.forward = functools.partial(type(model).forward, model)
    with patched(model, MERGED):
        clone = zeroed(copy.deepcopy(model))
    assert isinstance(clone.forward, functools.partial)
    assert clone(**inputs).logits.abs().max() == 0


class Counts(ModelHook):
    """A hook of accelerate that counts the calls of its module."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_a_hook_that_was_put_over_a_patch_stays_when_the_patch_goes(model, inputs, host):
    handle, hook = patch(model, MERGED), Counts()
    add_hook_to_module(model, hook)
    model.generate(**inputs, **GREEDY)
    assert hook.calls == 3 and len(handle.records) == 1
    assert zeroed(copy.deepcopy(model))(**inputs).logits.abs().max() == 0
    with pytest.raises(ConfigError, match="patched already"):
        patch(model, MERGED)
    with pytest.raises(ConfigError, match="patched already"):
        answers(Engine(model, fake_processor()), inputs)
    handle.undo()
    assert torch.equal(model.generate(**inputs, **GREEDY), host)
    assert hook.calls == 6 and len(handle.records) == 1
    remove_hook_from_module(model)
    assert torch.equal(model.generate(**inputs, **GREEDY), host) and len(handle.records) == 1


def test_a_wrapper_that_was_put_over_a_patch_stays_when_the_patch_goes(model, inputs, host):
    handle, calls = patch(model, MERGED), []
    over = model.forward

    @functools.wraps(over)
    def wrapper(*args, **kwargs):
        calls.append(1)
        return over(*args, **kwargs)

    model.forward = wrapper
    model.generate(**inputs, **GREEDY)
    assert len(calls) == 3 and len(handle.records) == 1
    handle.undo()
    assert model.forward is wrapper
    assert torch.equal(model.generate(**inputs, **GREEDY), host) and len(handle.records) == 1
    with patched(model, MERGED) as again:
        model.generate(**inputs, **GREEDY)
    assert len(again.records) == 1 and model.forward is wrapper


def test_a_forward_that_took_the_place_of_a_patch_is_not_thrown_away(model, inputs):
    handle = patch(model, MERGED)
    model.forward = own = functools.partial(type(model).forward, model)
    handle.undo()
    assert model.forward is own


def test_an_engine_does_not_touch_its_model(model, inputs):
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    seen, engine = [], Engine(model, fake_processor(), MERGED)
    hook = model.lm_head.register_forward_hook(lambda *_: seen.append("forward" in vars(model)))
    answers(engine, inputs, **GREEDY)
    hook.remove()
    assert seen == [False] * 3
    for name, module in model.named_modules():
        for attribute in ("forward", "training", "rope_deltas"):
            assert vars(module).get(attribute) is before[name].get(attribute), (name, attribute)


def answers(engine, inputs, **kwargs):
    return engine.runner.run(inputs, 0.0, engine.runner.settings(kwargs))


def fake_processor():
    class Tokenizer:
        def decode(self, ids, **kwargs):
            return str(ids)

    class Processor:
        tokenizer = Tokenizer()

    return Processor()


def test_the_hosts_notes_of_an_engines_call_stay_off_the_model():
    model, inputs = copy.deepcopy(tiny_model("qwen2_5_vl")), tiny_inputs("qwen2_5_vl", [[4, IMAGE, 5]])
    mark = model.model.rope_deltas = torch.tensor([[7]])
    answers(Engine(model, fake_processor()), inputs, **GREEDY)
    assert model.model.rope_deltas is mark


def test_a_replaced_generate_is_no_silent_no_op(model, inputs):
    from mminfer import UnsupportedModelError

    model.generate = functools.partial(type(model).generate, model)
    with pytest.raises(UnsupportedModelError, match="generate did not call"):
        answers(Engine(model, fake_processor(), MERGED), inputs, **GREEDY)


def test_calls_run_in_eval_mode_and_modes_are_put_back(model, inputs):
    """Each module's own: a vision tower may be frozen."""
    model.model.language_model.layers[1].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    model.eval()
    want = answers(Engine(model, fake_processor()), inputs, **GREEDY)[0].token_ids
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    for _ in range(2):
        assert answers(Engine(model, fake_processor()), inputs, **GREEDY)[0].token_ids == want
        assert [module.training for module in model.modules()] == modes
    with pytest.raises(Exception, match="no_such"):
        answers(Engine(model, fake_processor()), inputs, no_such=1)
    assert [module.training for module in model.modules()] == modes


def test_a_patched_model_in_training_is_refused(model, inputs):
    model.train()
    with patched(model, InferenceConfig()) as handle:
        with pytest.raises(InputError, match="training mode"):
            model(**inputs)
        model.eval()
        embeds = torch.zeros(1, 3, 64, requires_grad=True)
        with pytest.raises(InputError, match="gradients"):
            model(inputs_embeds=embeds)
        with torch.no_grad():
            model(inputs_embeds=embeds)
        model(**inputs)
    assert len(handle.records) == 2
