"""Caches and masks that a caller hands to a patched model: as the host takes them, or refused by name."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import EncoderDecoderCache

from mminfer import V2PE, InferenceConfig, InputError, LookM, patched
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from tests.tiny import IMAGE, tiny_inputs, tiny_model

GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
OFF = InferenceConfig()
STEP = {"input_ids": torch.tensor([[20]])}


@pytest.fixture
def model():
    return tiny_model("llava")


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **GREEDY, **kwargs)


def assert_same(ours, host):
    assert torch.equal(ours.sequences, host.sequences)
    for a, b in zip(ours.logits, host.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def offloading():
    cache = DynamicCache()
    cache.offloading = True  # as with DynamicCache(offloading=True), which takes a GPU
    return cache


def empty_with_config(model):
    return DynamicCache(config=model.config.get_text_config())


@pytest.mark.parametrize("make", [lambda model: DynamicCache(), empty_with_config])
def test_a_callers_empty_cache_is_filled_in_place(model, inputs, make):
    """Also for the next turn, which goes on from it."""
    theirs, ours = make(model), make(model)
    host = generate(model, inputs, **{CACHE_NAME: theirs})
    with patched(model, OFF):
        assert_same(generate(model, inputs, **{CACHE_NAME: ours}), host)
        assert ours.get_seq_length() == theirs.get_seq_length() and isinstance(ours, CompressedCache)
        more = {name: torch.cat([host.sequences, torch.tensor([[30, 31]])], 1) for name in ("input_ids",)}
        more["attention_mask"] = torch.ones_like(more["input_ids"])
        again = generate(model, more, **{CACHE_NAME: ours})
    assert_same(again, generate(model, more, **{CACHE_NAME: theirs}))
    with pytest.raises(InputError, match="compressed by mminfer"):
        model(**STEP, **{CACHE_NAME: ours})


def test_a_callers_cache_of_a_pass_that_fails_stays_empty(model, inputs):
    cache = DynamicCache()
    with patched(model, OFF), pytest.raises(InputError, match="placeholder"):
        model(input_ids=inputs["input_ids"], **{CACHE_NAME: cache})
    assert type(cache) is DynamicCache and cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda model: StaticCache(config=model.config.get_text_config(), max_cache_len=64), "static cache"),
        (lambda model: EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache"),
        (lambda model: type("Mine", (DynamicCache,), {})(), "Mine"),
        (lambda model: offloading(), "neither quantised, offloaded"),
        (lambda model: ((torch.zeros(1), torch.zeros(1)),), "tuple"),
    ],
    ids=["static", "encoder-decoder", "own", "offloading", "tuple"],
)
def test_other_caches_are_refused_by_name(model, inputs, make, named):
    with patched(model, OFF) as handle, pytest.raises(InputError, match=named):
        model(**inputs, **{CACHE_NAME: make(model)})
    assert not handle.records


def test_a_cache_goes_on_with_the_model_the_positions_and_the_rows_that_made_it(model, inputs):
    other = copy.deepcopy(model)
    with patched(model, OFF):
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
        length = cache.logical_length
        for rows in (STEP, {"input_ids": torch.tensor([[20, 21]])}):
            with pytest.raises(InputError, match="holds 1 sequences, the inputs have 2"):
                model(input_ids=rows["input_ids"].repeat(2, 1), **{CACHE_NAME: cache})
    with patched(other, OFF), pytest.raises(InputError, match="another model"):
        other(**STEP, **{CACHE_NAME: cache.clone()})
    with patched(model, InferenceConfig(positions=V2PE(0.25))), pytest.raises(InputError, match=r"V2PE\(delta=0.25"):
        model(**STEP, **{CACHE_NAME: cache})
    assert cache.logical_length == length
    with patched(model, InferenceConfig(cache=LookM(0.5, 0.2))):  # which is as good as anybody's
        model(**STEP, **{CACHE_NAME: cache})
    assert cache.logical_length == length + 1


def test_without_a_cache_every_token_is_a_prompt(model, inputs):
    host = generate(model, inputs)
    with patched(model, OFF) as handle:
        assert_same(generate(model, inputs, use_cache=False), host)
    assert len(handle.records) == GREEDY["max_new_tokens"]


def with_zeros(inputs, *places):
    mask = torch.ones_like(inputs["attention_mask"])
    for row, place in places:
        mask[row, place] = 0
    return {**inputs, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl"])
def test_a_mask_with_a_hole(family):
    model, inputs = tiny_model(family), tiny_inputs(family, [[6, IMAGE, 5], [7, IMAGE, 4]])
    inputs = with_zeros(inputs, (0, 2), (0, 3), (1, -2), (1, 0))
    host, answer = model(**inputs).logits, generate(model, inputs)
    seen = inputs["attention_mask"].bool()
    with patched(model, OFF):
        torch.testing.assert_close(model(**inputs).logits[seen], host[seen], rtol=0, atol=1e-4)
        assert_same(generate(model, inputs), answer)


def test_a_mask_with_a_hole_in_a_window_is_refused():
    """The host's windows are of columns. Padding on the left moves all of a row alike."""
    model, inputs = tiny_model("gemma3"), tiny_inputs("gemma3", [[6, IMAGE, 5], [7, IMAGE, 4]])
    with patched(model, OFF) as handle:
        with pytest.raises(InputError, match="zeros between tokens"):
            generate(model, with_zeros(inputs, (0, 2)))
        assert not handle.records
        generate(model, with_zeros(inputs, (0, 0), (0, 1)))


def test_padding_on_the_right(model):
    """Logits of a prompt are the host's; what would go on from padding is refused."""
    inputs = with_zeros(tiny_inputs("llava", [[4, IMAGE, 5], [4, IMAGE, 5]]), (0, -1), (0, -2))
    host, seen = model(**inputs).logits, inputs["attention_mask"].bool()
    with patched(model, OFF) as handle:
        output = model(**inputs, use_cache=True)
        torch.testing.assert_close(output.logits[seen], host[seen], rtol=0, atol=1e-4)
        with pytest.raises(InputError, match="ends in padding"):
            model(input_ids=torch.tensor([[20], [20]]), **{CACHE_NAME: output[CACHE_NAME]})
        with pytest.raises(InputError, match="pad prompts on the left"):
            generate(model, inputs)
    assert len(handle.records) == 1


def test_masks_that_fit_no_cache_are_refused(model, inputs):
    with patched(model, OFF):
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
        held = cache.logical_length
        more = torch.tensor([[20, 21, 22]])
        for mask, found in (
            (torch.ones(1, 3), f"3 columns: wanted {held + 3}"),
            (torch.ones(1, 1, 3, held + 3), "only a 2D padding mask"),
            (with_zeros({"attention_mask": torch.ones(1, held + 3)}, (0, 1))["attention_mask"], "hides tokens"),
        ):
            with pytest.raises(InputError, match=found):
                model(input_ids=more, attention_mask=mask, **{CACHE_NAME: cache})
        assert cache.logical_length == held
        model(input_ids=more, attention_mask=torch.ones(1, held + 3), **{CACHE_NAME: cache})
    assert cache.logical_length == held + 3


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_the_hosts_own_chunks_may_part_an_image(family):
    """`generate(prefill_chunk_size=...)` of the host says where every row stands, also within an image."""
    model, asked = tiny_model(family), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    inputs = tiny_inputs(family, [[4, IMAGE, 5]] * 2)
    asked["prefill_chunk_size"] = 8
    try:
        host = model.generate(**inputs, **asked)
    except (TypeError, ValueError):
        pytest.skip("this version of the host takes no images in chunks")
    with patched(model, InferenceConfig()):
        assert torch.equal(model.generate(**inputs, **asked), host)


def test_positions_that_are_moved_do_not_begin_within_an_image():
    model, inputs = tiny_model("qwen2_vl"), tiny_inputs("qwen2_vl", [[4, IMAGE, 5]])
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1).clone()
    positions[1:, :, 8:20] = 5
    with patched(model, InferenceConfig(positions=V2PE(delta=1 / 4))):
        embeds = model.get_input_embeddings()(ids).detach()
        first = {"inputs_embeds": embeds[:, :9], "position_ids": positions[..., :9], "attention_mask": mask[:, :9]}
        cache = model(**first, use_cache=True)[CACHE_NAME]
        rest = {"inputs_embeds": embeds[:, 9:], "position_ids": positions[..., 9:], "attention_mask": mask}
        with pytest.raises(InputError, match="begins within an image"):
            model(**rest, **{CACHE_NAME: cache})
