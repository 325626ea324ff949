"""Heads that hold different numbers of entries, from the prompt to the last token: held to the host under a mask."""

import copy
from dataclasses import dataclass

import pytest
import torch
from mminfer_kernels import record_backends
from mminfer_kernels.backends import cpu_takes

from mminfer import AIMPrune, Digest, InferenceConfig, InputError, LookM, OperatorSkip, patched
from mminfer.cache.h2o import H2O
from mminfer.cache.random_evict import RandomEvict
from mminfer.cache.snapkv import SnapKV
from mminfer.forward.attention import Visibility
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from mminfer.forward.packed_attention import packed_attention
from mminfer.metrics.flops import decode_flops, measured_flops, prompt_flops
from mminfer.models.registry import adapter_for
from mminfer.technique import CacheEntries
from mminfer.tokens.fastv import FastV
from mminfer.tokens.random_prune import RandomPrune
from tests.by_head import ByLot, Masked, Truth
from tests.tiny import IMAGE, MARKED_FAMILIES, tiny_inputs, tiny_model, tiny_rows
from tests.tiny_models import BREAK_ID, END_ID, EOS_ID, IMAGE_ID, LAYERS, START_ID, VIDEO_ID

NEW = 6
SPECIAL = [BREAK_ID, END_ID, EOS_ID, IMAGE_ID, START_ID, VIDEO_ID]  # an answer of text, which the host reads again
GREEDY = {
    "max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    "suppress_tokens": SPECIAL,
}  # fmt: skip
BATCH = [[9, IMAGE, 7], [12], [3, IMAGE, 1, IMAGE, 4]]
native = pytest.mark.skipif(not cpu_takes(torch.empty(0)), reason="no C++ library here")
ways = pytest.mark.parametrize("technique", [ByLot(), ByLot(weighed=True)], ids=["plain", "weighed"])


def extended(inputs, tokens):
    """Inputs with so many more tokens of text behind them."""
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], 1)}
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            out[name] = torch.nn.functional.pad(inputs[name], (0, tokens.shape[1]), value=int(name == "attention_mask"))
    return out


def logits_of(out):
    return torch.stack(out.logits, 1)


@ways
@pytest.mark.parametrize("family", [f for f in MARKED_FAMILIES if f != "gemma3"])
def test_a_prompt_its_tokens_and_a_second_turn(family, technique):
    model, inputs = tiny_model(family), tiny_inputs(family, [[9, IMAGE, 7]])
    truth, count = Truth(model, technique), inputs["input_ids"].shape[1]
    turn = torch.randint(10, 400, (1, 5))
    with patched(model, InferenceConfig(cache=technique)) as handle:
        out = model.generate(**inputs, **GREEDY)
        cache = out[CACHE_NAME]
        lengths = [layer.head_lengths[0] for layer in cache.layers]
        second = model(input_ids=turn, **{CACHE_NAME: cache})
    truth.tokens(count)
    truth.compress()
    assert [layer.head_entries[0] for layer in handle.records[0].layers] == truth.lengths
    truth.tokens(NEW - 1)
    assert lengths == truth.lengths and len(set(lengths[0])) > 1
    truth.tokens(5)
    want = truth.logits(extended(inputs, torch.cat([out.sequences[:, count:-1], turn], 1)))
    got = torch.cat([logits_of(out), second.logits], 1)[0]
    torch.testing.assert_close(got, want[count - 1 :], rtol=0, atol=1e-4)
    truth.compress()
    assert cache.head_lengths == [[lengths] for lengths in truth.lengths] and len(cache.layers) == LAYERS
    per_entry = 2 * cache.layers[0].keys.shape[1] * 4 + 4 * technique.weighed
    assert cache.nbytes == sum(map(sum, truth.lengths)) * per_entry


@ways
def test_chunks_are_held_to_the_host(technique):
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[9, IMAGE, 25]])
    truth, count = Truth(model, technique), inputs["input_ids"].shape[1]
    with patched(model, InferenceConfig(cache=technique), prefill_chunk_size=20) as handle:
        out = model.generate(**inputs, **GREEDY)
    layout = adapter_for(model).embed(inputs)[1]
    chunks = [len(index) for index in layout.chunks(20)]
    assert sum(chunks) == count and len(chunks) > 2
    for size in chunks:
        truth.tokens(size)
        truth.compress()
    assert [layer.head_entries[0] for layer in handle.records[0].layers] == truth.lengths
    truth.tokens(NEW - 1)
    want = truth.logits(extended(inputs, out.sequences[:, count:-1]))
    torch.testing.assert_close(logits_of(out)[0], want[count - 1 :], rtol=0, atol=1e-4)


@ways
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_padded_batch_gives_each_row_what_it_gets_alone(family, technique):
    model, config = tiny_model(family), InferenceConfig(cache=technique)
    with patched(model, config):
        together = model.generate(**tiny_inputs(family, BATCH), **GREEDY)
        turn = model(input_ids=torch.full((3, 4), 20), **{CACHE_NAME: together[CACHE_NAME].clone()}).logits
        for row, inputs in enumerate(tiny_rows(family, BATCH)):
            alone = model.generate(**inputs, **GREEDY)
            torch.testing.assert_close(logits_of(together)[row], logits_of(alone)[0], rtol=0, atol=1e-4)
            own = [layer.head_lengths[0] for layer in alone[CACHE_NAME].layers]
            assert [layer.head_lengths[row] for layer in together[CACHE_NAME].layers] == own
            next_turn = model(input_ids=torch.full((1, 4), 20), **{CACHE_NAME: alone[CACHE_NAME]}).logits
            torch.testing.assert_close(turn[row], next_turn[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}, {"max_new_tokens": 70}]
)
def test_beams_samples_and_long_answers(kwargs):
    """Held to a cache in which every entry stays and those that the lot drew count for nothing."""
    model, inputs, outs = tiny_model("qwen3_vl"), tiny_inputs("qwen3_vl", BATCH), []
    for technique in (ByLot(weighed=True), Masked(weighed=True)):
        torch.manual_seed(3)
        with patched(model, InferenceConfig(cache=technique)):
            outs.append(model.generate(**inputs, **GREEDY | {"output_logits": False} | kwargs))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    packed, masked = (out[CACHE_NAME] for out in outs)
    assert packed.is_packed and masked.is_packed and packed.nbytes < 0.8 * masked.nbytes


@native
@ways
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"max_new_tokens": 80}])
def test_the_fused_step_equals_the_hosts_modules(technique, kwargs):
    model, inputs, outs = tiny_model("qwen2_5_vl"), tiny_inputs("qwen2_5_vl", BATCH), []
    config, module = InferenceConfig(cache=technique), adapter_for(model).layers[2].mlp
    for hooks in (0, 1):
        handles = [module.register_forward_hook(lambda *args: None) for _ in range(hooks)]
        with patched(model, config), record_backends() as backends:
            outs.append(model.generate(**inputs, **GREEDY | kwargs))
        for handle in handles:
            handle.remove()
        assert backends["decode_step"] == ("host" if hooks else "native")
        assert ("packed_decode_attention" in backends) == bool(hooks)
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    torch.testing.assert_close(logits_of(outs[0]), logits_of(outs[1]), rtol=0, atol=1e-4)


def test_one_graph_serves_all_steps_and_lengths(traced):
    """Under torch.compile the op stands in the graph; a cache of another kind makes another graph, once."""
    model, config, long = (
        tiny_model("llava"),
        InferenceConfig(cache=ByLot(weighed=True)),
        GREEDY | {"max_new_tokens": 40},
    )
    for batch in (BATCH, [[40, IMAGE], [2], [5]]):
        inputs = tiny_inputs("llava", batch)
        with patched(model, config):
            want = model.generate(**inputs, **long)
        with patched(model, config, compile=True), record_backends() as backends:
            ours = model.generate(**inputs, **long)
        assert backends["decode_step"] == "compiled"
        assert torch.equal(ours.sequences, want.sequences)
        torch.testing.assert_close(logits_of(ours), logits_of(want), rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with patched(model, InferenceConfig(cache=ByLot()), compile=True), record_backends() as backends:
        model.generate(**inputs, **GREEDY)
    assert backends["decode_step"] == "compiled"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_heads_that_are_alike_are_padded_as_ever():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", BATCH)
    with patched(model, InferenceConfig(cache=KeepsAll())):
        assert not model(**inputs, use_cache=True)[CACHE_NAME].is_packed


def test_heads_may_hold_nothing():
    model, inputs, outs = tiny_model("llava"), tiny_inputs("llava", BATCH), []
    for technique in (ByLot(most=0.0), Masked(most=0.0)):
        with patched(model, InferenceConfig(cache=technique)):
            cache = model(**inputs, use_cache=True)[CACHE_NAME]
            assert technique == Masked(most=0.0) or cache.head_lengths[0] == [(1, 0)] * 3
        with patched(model, InferenceConfig()):
            turn = model(input_ids=torch.full((3, 4), 20), **{CACHE_NAME: cache.clone()}).logits
            outs.append([turn[:, :1], model(input_ids=torch.full((3, 1), 20), **{CACHE_NAME: cache}).logits])
    torch.testing.assert_close(*outs, rtol=0, atol=1e-4)
    torch.testing.assert_close(*outs[0], rtol=0, atol=1e-4)  # a turn's first token is a step


@dataclass(frozen=True)
class KeepsAll(ByLot, register=False):
    """Packed, though no head loses anything."""

    def apply(self, view):
        return view.entries.packed()


@pytest.mark.parametrize("technique", [LookM(), Digest(), H2O(), SnapKV(), RandomEvict()])
def test_techniques_that_look_at_heads_alike_refuse_such_a_past(technique):
    """Before any pass: the model, and the cache, are as they were."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[9, IMAGE, 7]])
    turn = torch.full((1, 3), 20)
    with patched(model, InferenceConfig(cache=ByLot())):
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
        want = model(input_ids=turn, **{CACHE_NAME: cache.clone()}).logits
    before = cache.head_lengths
    with patched(model, InferenceConfig(cache=technique)) as handle:
        with pytest.raises(InputError, match=rf"{type(technique).__name__} takes heads that are alike"):
            model(input_ids=turn, **{CACHE_NAME: cache})
        assert not handle.records
    assert cache.head_lengths == before
    with patched(model, InferenceConfig(cache=ByLot())):
        assert torch.equal(model(input_ids=turn, **{CACHE_NAME: cache}).logits, want)


@pytest.mark.parametrize("others", [{}, {"prune": AIMPrune(1, 3)}, {"prune": FastV(2)}, {"prune": RandomPrune(1, 3)}])
def test_settings_without_a_cache_go_on_from_it(others):
    """Nothing is compressed any more, and visual tokens leave by what all heads see."""
    model, (first, second) = tiny_model("llava"), tiny_rows("llava", [[9, IMAGE, 7], [4, IMAGE, 3]])
    with patched(model, InferenceConfig(cache=Masked())):
        masked = model(**first, use_cache=True)[CACHE_NAME]
    with patched(model, InferenceConfig(cache=ByLot())):
        packed = model(**first, use_cache=True)[CACHE_NAME]
    del second["attention_mask"]
    with patched(model, InferenceConfig(**others)):
        got, want = (model(**second, **{CACHE_NAME: cache}).logits for cache in (packed, masked))
        steps = [model(input_ids=torch.full((1, 1), 20), **{CACHE_NAME: cache}).logits for cache in (packed, masked)]
    if not others:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        torch.testing.assert_close(*steps, rtol=0, atol=1e-4)
    added = [[b - a for a, b in zip((0, 0), lengths[0], strict=True)] for lengths in packed.head_lengths]
    assert len({max(of_layer) for of_layer in added}) > 1 or not others


def test_skipped_queries_over_such_a_past():
    model, rows = tiny_model("llava"), tiny_rows("llava", [[9, IMAGE, 7], [4, IMAGE, 3]])
    outs = []
    for technique in (ByLot(), Masked()):
        with patched(model, InferenceConfig(cache=technique, skip=OperatorSkip(attention=[1], ffn=[2]))):
            cache = model(**rows[0], use_cache=True)[CACHE_NAME]
        with patched(model, InferenceConfig(skip=OperatorSkip(attention=[1], ffn=[2]))):
            second = {name: x for name, x in rows[1].items() if name != "attention_mask"}
            outs.append(model(**second, **{CACHE_NAME: cache}).logits)
    torch.testing.assert_close(*outs, rtol=0, atol=1e-4)


@ways
def test_flops_of_steps_are_counted_by_head(technique):
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[9, IMAGE, 7]])
    with patched(model, InferenceConfig(cache=technique)) as handle:
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
        entries = [layer.head_entries[0] for layer in handle.records[0].layers]
        with measured_flops() as counter:
            model(input_ids=torch.full((1, 1), 20), **{CACHE_NAME: cache})
    assert decode_flops(handle.adapter.spec, entries) == pytest.approx(counter.get_total_flops(), rel=1e-6)


@ways
def test_flops_of_turns_are_those_of_the_mean_head(technique):
    """Pairs are told a head, rounded: half a pair for each query at most."""
    model, (first, second) = tiny_model("llava"), tiny_rows("llava", [[9, IMAGE, 7], [4, IMAGE, 31]])
    del second["attention_mask"]
    with patched(model, InferenceConfig(cache=technique)) as handle:
        cache = model(**first, use_cache=True)[CACHE_NAME]
        with measured_flops() as counter:
            model(**second, logits_to_keep=1, **{CACHE_NAME: cache})
    record, spec = handle.records[-1], handle.adapter.spec
    ours = prompt_flops(spec, record) + sum(record.vision_flops)
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, inputs = copy.deepcopy(tiny_model("llava")).to(dtype), tiny_inputs("llava", BATCH)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    outs = []
    for technique in (ByLot(weighed=True), Masked(weighed=True)):
        with patched(model, InferenceConfig(cache=technique)):
            cache = model(**inputs, use_cache=True)[CACHE_NAME]
            step = model(input_ids=torch.full((3, 1), 20), **{CACHE_NAME: cache}).logits
            outs.append(torch.cat([step, model(input_ids=torch.full((3, 1), 21), **{CACHE_NAME: cache}).logits], 1))
    assert outs[0].dtype == dtype
    torch.testing.assert_close(*outs, rtol=0, atol=0.05)


def test_autocast_goes_by_the_hosts_modules():
    model, inputs, outs = tiny_model("llava"), tiny_inputs("llava", BATCH), []
    for technique in (ByLot(weighed=True), Masked(weighed=True)):
        with patched(model, InferenceConfig(cache=technique)), record_backends() as backends:
            cache = model(**inputs, use_cache=True)[CACHE_NAME]
            with torch.autocast("cpu", torch.bfloat16):
                outs.append(model(input_ids=torch.full((3, 1), 20), **{CACHE_NAME: cache}).logits)
        assert backends["decode_step"] == "host" and outs[-1].dtype == torch.bfloat16
    torch.testing.assert_close(*outs, rtol=0, atol=0.1)


def test_a_failed_step_or_turn_leaves_it_as_it_was():
    model, inputs = tiny_model("internvl"), tiny_inputs("internvl", [[3, IMAGE, 4]])
    with patched(model, InferenceConfig(cache=ByLot(weighed=True))):
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
        before, restore = cache.head_lengths, cache.snapshot()
        for new in (1, 5):
            ids = torch.full((1, new), 20)
            want = model(input_ids=ids, **{CACHE_NAME: cache.clone()}).logits

            def fail(*args):
                raise RuntimeError("no memory")

            hook = model.base_model.language_model.layers[2].mlp.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="no memory"):
                model(input_ids=ids, **{CACHE_NAME: cache})
            hook.remove()
            assert cache.head_lengths == before
            for _ in range(2):
                got = model(input_ids=ids, **{CACHE_NAME: cache}).logits
                torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
                restore()
                assert cache.head_lengths == before


def test_stacked_chats_may_be_packed_and_padded():
    model, rows = tiny_model("llava"), tiny_rows("llava", [[9, IMAGE, 7], [5, IMAGE, 12]])
    caches, ids = [], torch.full((1, 1), 20)
    for technique, inputs in zip((ByLot(weighed=True), None), rows, strict=True):
        with patched(model, InferenceConfig(cache=technique)):
            caches.append(model(**inputs, use_cache=True)[CACHE_NAME])
    stacked = CompressedCache.stack(caches)
    assert [c.is_packed for c in caches] == [True, False] and stacked.is_packed
    with patched(model, InferenceConfig()):
        together = [model(input_ids=ids.repeat(2, 1), **{CACHE_NAME: stacked}).logits for _ in range(3)]
        alone = [torch.cat([model(input_ids=ids, **{CACHE_NAME: c}).logits for c in caches]) for _ in range(3)]
    torch.testing.assert_close(torch.stack(together), torch.stack(alone), rtol=0, atol=1e-4)
    assert stacked.head_lengths == [a + b for a, b in zip(*(c.head_lengths for c in caches), strict=True)]
    assert stacked.nbytes > sum(c.nbytes for c in caches)  # the second row has log-masses now, all 0


@pytest.mark.parametrize("visible", ["own", "ahead", "window", "some queries"])
@ways
def test_prompts_see_what_they_may_in_every_head(technique, visible):
    """Held to a dense softmax of each query head by itself."""
    lengths, size = (9, 4, 17), 16
    keys, values = torch.randn(2, 1, 1, sum(lengths), size, dtype=torch.float64)
    mass = torch.randn(1, 1, sum(lengths)) if technique.weighed else None
    entries = CacheEntries(keys, values, log_mass=mass, head_lengths=lengths)
    places = torch.tensor([13, 14, 16]) if visible == "some queries" else torch.arange(13, 17)
    q, longest = torch.randn(1, 6, len(places), size, dtype=torch.float64), max(lengths)
    last = torch.tensor([15, 15, 15, 16]) if visible == "ahead" else places
    what = Visibility(
        places if visible == "some queries" else None, 3 if visible == "window" else None,
        last if visible == "ahead" else None,
    )  # fmt: skip
    out = packed_attention(q, entries, 0.3, what)
    for head, of_group in enumerate(entries.heads()):
        column = torch.arange(len(of_group)) + longest - len(of_group)
        seen = (column <= last[:, None]) & (column > places[:, None] - (what.window or longest))
        for h in (2 * head, 2 * head + 1):
            logits = 0.3 * q[0, h] @ of_group.keys[0, 0].mT
            logits = logits if mass is None else logits + of_group.log_mass[0, 0]
            want = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ of_group.values[0, 0]
            torch.testing.assert_close(out[0, h], want, rtol=0, atol=1e-6)
