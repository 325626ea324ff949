"""What one call of a patched model does ends with it, also when it fails in the middle."""

import pytest
import torch
from transformers import LogitsProcessor

from mminfer import AIMPrune, ConfigError, InferenceConfig, LookM, patch, patched
from mminfer.forward.call_state import CallState
from mminfer.forward.kv_cache import CACHE_NAME
from mminfer.layout import GivenRows, Modality
from mminfer.models.registry import adapter_for
from tests.tiny import IMAGE, tiny_inputs, tiny_model

BATCH = [[3, IMAGE, 4], [7], [2, IMAGE, 9]]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
COMPRESSED = InferenceConfig(prune=AIMPrune(1, 3), cache=LookM(0.3, 0.1))


class FailsAt(LogitsProcessor):
    """Raises behind so many forward passes."""

    def __init__(self, passes):
        self.left = passes

    def __call__(self, input_ids, scores):
        self.left -= 1
        if not self.left:
            raise RuntimeError("in the middle")
        return scores


@pytest.fixture
def model():
    return tiny_model("internvl")


@pytest.fixture
def inputs():
    return tiny_inputs("internvl", BATCH)


def assert_same(ours, want):
    assert torch.equal(ours.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, want.logits, strict=True))


def rows_of_steps(model, seen):
    """A hook that notes the rows of every forward pass in the first layer."""
    layer = adapter_for(model).layers[0]
    return layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[0]), with_kwargs=True
    )


@pytest.mark.parametrize("passes", [1, 2, 4])
@pytest.mark.parametrize("config", [InferenceConfig(), COMPRESSED], ids=["off", "compressed"])
def test_the_call_after_one_that_failed_is_right(model, inputs, config, passes):
    with patched(model, config):
        want = model.generate(**inputs, **GREEDY)
    with patched(model, config) as handle:
        with pytest.raises(RuntimeError, match="in the middle"):
            model.generate(**inputs, **GREEDY, logits_processor=[FailsAt(passes)])
        assert_same(model.generate(**inputs, **GREEDY), want)
        assert len(handle.records) == len(handle.prompt_ms) == 2
        assert len(handle.step_ms) == GREEDY["max_new_tokens"] - 1


def test_rows_that_finished_in_a_call_that_failed_are_there_in_the_next(model, inputs):
    """Also in a step over another cache, which is no prompt."""
    step, seen = {"input_ids": torch.full((3, 1), 20)}, []
    with patched(model, InferenceConfig()) as handle:
        want = model.generate(**inputs, **GREEDY)
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
        want_step = model(**step, **{CACHE_NAME: cache.clone()}).logits
        new = want.sequences[:, inputs["input_ids"].shape[1] :]
        first = int(new[1, 0])
        assert (new[:, 0] == first).sum() < 3, "all rows would end"
        look = rows_of_steps(model, seen)
        with handle.begin(CallState(end_ids={first})), pytest.raises(RuntimeError, match="in the middle"):
            model.generate(**inputs, **GREEDY, eos_token_id=first, logits_processor=[FailsAt(3)])
        assert seen[-1] < 3
        torch.testing.assert_close(model(**step, **{CACHE_NAME: cache}).logits, want_step, rtol=0, atol=1e-5)
        assert seen[-1] == 3
        look.remove()
        assert_same(model.generate(**inputs, **GREEDY), want)


def test_tokens_that_ended_rows_in_one_call_end_none_in_the_next(model, inputs):
    seen = []
    with patched(model, InferenceConfig()) as handle:
        new = model.generate(**inputs, **GREEDY).sequences[:, inputs["input_ids"].shape[1] :]
        with handle.begin(CallState(end_ids=set(new.flatten().tolist()))):
            model.generate(**inputs, **GREEDY)
        look = rows_of_steps(model, seen)
        model.generate(**inputs, **GREEDY)
        look.remove()
    assert seen[1:] == [3] * 5


def test_logits_that_nobody_asked_for_reach_no_later_call(model):
    """The host refuses the call before it asks; the cache is as long as it was, and the next token is a step."""
    inputs, step = tiny_inputs("internvl", [[3, IMAGE, 4]]), {"input_ids": torch.tensor([[20]])}
    with patched(model, InferenceConfig()) as handle:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        cache, length = output[CACHE_NAME], output[CACHE_NAME].logical_length
        want = model(**step, **{CACHE_NAME: cache.clone()}).logits
        state = CallState()
        with handle.begin(state), pytest.raises(ValueError), state.resuming(cache, output.logits + 1):
            assert cache.logical_length == length - 1
            model.generate(**inputs, **{CACHE_NAME: cache}, max_new_tokens=2, do_sample=True, temperature=-1.0)
        assert cache.logical_length == length
        assert torch.equal(model(**step, **{CACHE_NAME: cache}).logits, want)


def test_a_prompt_in_the_cache_is_gone_on_from(model):
    inputs = tiny_inputs("internvl", [[3, IMAGE, 4]])
    ids = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with patched(model, InferenceConfig()) as handle:
        want = model.generate(**inputs, **GREEDY)
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        state, cache = CallState(), output[CACHE_NAME]
        with handle.begin(state), state.resuming(cache, output.logits):
            ours = model.generate(**ids, **{CACHE_NAME: cache}, **GREEDY)
        assert len(handle.records) == 2
    assert torch.equal(ours.sequences, want.sequences)


def test_embeddings_that_no_prompt_took_reach_no_later_call(model):
    inputs = tiny_inputs("internvl", [[3, 5, 4]])
    places = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    places[0, 1] = True
    kind = torch.tensor([int(Modality.IMAGE)], dtype=torch.int8)
    given = GivenRows(places, torch.randn(1, 64), kind, torch.tensor([0]))
    with patched(model, InferenceConfig()) as handle:
        want = model(**inputs).logits
        with handle.begin(CallState(given_embeddings=given)), pytest.raises(ValueError):
            model.generate(**inputs, max_new_tokens=2, do_sample=True, temperature=-1.0)
        assert torch.equal(model(**inputs).logits, want)
        with handle.begin(CallState(given_embeddings=given)):
            assert not torch.equal(model(**inputs).logits, want)
            assert torch.equal(model(**inputs).logits, want), "the first prompt took them"


def test_one_token_is_a_stretch_of_a_prompt_while_one_is_read(model):
    """Also in the call's next `reading`, if the last one failed."""
    inputs, one = tiny_inputs("internvl", [[3, IMAGE, 4]]), {"input_ids": torch.tensor([[20]])}
    told = []

    def cancel(tokens):
        told.append(tokens)
        raise KeyboardInterrupt

    with patched(model, InferenceConfig()) as handle, handle.begin(CallState()) as state:
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
        with pytest.raises(KeyboardInterrupt), state.reading(cancel):
            model(**one, **{CACHE_NAME: cache})
        assert told == [1] and len(handle.records) == 1
        with state.reading(None):
            model(**one, **{CACHE_NAME: cache})
        assert len(handle.records) == 2 and handle.step_ms == []
        model(**one, **{CACHE_NAME: cache})
        assert len(handle.records) == 2 and len(handle.step_ms) == 1


def test_chunks_room_and_progress_are_those_of_the_call(model):
    inputs, told = tiny_inputs("internvl", [[3, IMAGE, IMAGE, 4]]), []
    tokens = inputs["input_ids"].shape[1]
    with patched(model, InferenceConfig()) as handle:
        with handle.begin(CallState(chunk_size=20, headroom=7, progress=told.append)):
            layer = model(**inputs, use_cache=True)[CACHE_NAME].layers[0]
        assert told == [20, 20, 3]
        assert layer.reserve(0)[0].shape[2] == tokens + 7
        model(**inputs)
    assert len(told) == 3


def test_the_times_of_a_call_stay_readable(model, inputs):
    with patched(model, InferenceConfig()) as handle:
        assert (handle.first_token_at, handle.step_ms) == (0.0, [])
        with handle.begin(CallState()) as state:
            for _ in range(2):  # the steps are those behind the last prompt
                model.generate(**inputs, **GREEDY)
        times = handle.first_token_at, list(handle.step_ms)
        assert times == (state.first_token_at, state.step_ms) and len(times[1]) == 5
        with pytest.raises(ValueError, match="labels"):
            model(**inputs, labels=inputs["input_ids"])
        assert times == (handle.first_token_at, handle.step_ms)
        model.generate(**inputs, **GREEDY)
        assert handle.first_token_at > times[0] and handle.step_ms != times[1]


def test_a_call_in_a_call_and_chunks_of_nothing_are_refused(model):
    with patched(model, InferenceConfig()) as handle, handle.begin(CallState()):
        with pytest.raises(ConfigError, match="in force"), handle.begin(CallState()):
            pass
        with pytest.raises(ConfigError, match="prefill_chunk_size=0"):
            CallState(chunk_size=0)
    with pytest.raises(ConfigError, match="prefill_chunk_size='a'"):
        patch(model, InferenceConfig(), prefill_chunk_size="a")
    assert "forward" not in model.__dict__
