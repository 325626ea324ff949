"""The analytic count agrees with what torch counts while a model runs: by operator, technique, tower and step."""

import dataclasses

import pytest
import torch
from mminfer_kernels import prompt_attention
from torch.nn.functional import scaled_dot_product_attention

from mminfer import AIMMerge, AIMPrune, InferenceConfig, LookM, OperatorSkip, patched
from mminfer.cache.h2o import H2O
from mminfer.cache.random_evict import RandomEvict
from mminfer.cache.snapkv import SnapKV
from mminfer.forward.kv_cache import CACHE_NAME
from mminfer.metrics.flops import (
    causal_pairs,
    decode_flops,
    full_prompt_counts,
    full_prompt_flops,
    layer_flops,
    measured_flops,
    prompt_counts,
    prompt_flops,
)
from mminfer.metrics.records import joined, stacked
from mminfer.metrics.vision import vision_flops
from mminfer.models.registry import adapter_for
from mminfer.tokens.downsample import Downsample
from mminfer.tokens.fastv import FastV
from mminfer.tokens.random_prune import RandomPrune
from tests.tiny import FAMILIES, IMAGE, MARKED_FAMILIES, VIDEO, skip_if_refused, tiny_inputs, tiny_model

EXACT = 1e-3  # the host's rotary modules multiply frequencies by a matrix product, which nobody else counts
CONFIGS = {
    "off": InferenceConfig(),
    "merge": InferenceConfig(merge=AIMMerge(0.25)),
    "downsample": InferenceConfig(merge=Downsample(0.25)),
    "prune": InferenceConfig(prune=AIMPrune(1, 4)),
    "fastv": InferenceConfig(prune=FastV(2, 0.5)),
    "random prune": InferenceConfig(prune=RandomPrune(1, 4)),
    "skip ffn": InferenceConfig(skip=OperatorSkip(ffn=[0, 1])),
    "skip attention": InferenceConfig(skip=OperatorSkip(attention=[1, 2])),
    "skip block": InferenceConfig(skip=OperatorSkip(block=[3])),
    "evict": InferenceConfig(cache=LookM(0.2, 0.1, merge="none")),
    "pivot": InferenceConfig(cache=LookM(0.2, 0.1)),
    "everything kept": InferenceConfig(cache=LookM(0.9, 0.1)),
    "strided": InferenceConfig(cache=LookM(0.2, 0.1, merge="average", queries="strided")),
    "last": InferenceConfig(cache=LookM(budget=20, merge="weighted", queries="last", window=5)),
    "h2o": InferenceConfig(cache=H2O(0.2, 0.1)),
    "snapkv": InferenceConfig(cache=SnapKV(0.2, 0.1, window=6)),
    "random evict": InferenceConfig(cache=RandomEvict(0.2, 0.1, merge="pivot")),
    "all of it": InferenceConfig(
        merge=AIMMerge(0.5), prune=AIMPrune(1, 4), skip=OperatorSkip(ffn=[2], attention=[3]), cache=LookM(0.2, 0.1)
    ),
}


def run(family, config, prompts, **kwargs):
    """A whole call of a patched model: its handle, its output, and what torch counted."""
    model, inputs = tiny_model(family), tiny_inputs(family, prompts)
    with patched(model, config, **kwargs) as handle, measured_flops() as counter:
        output = model(**inputs, logits_to_keep=1, use_cache=True)
    return handle, output, counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_both_counts_of_a_call_agree(family, name):
    skip_if_refused(family, CONFIGS[name])
    handle, _, counted = run(family, CONFIGS[name], [[30, IMAGE, 3, IMAGE, 20]])
    record, spec = handle.records[-1], handle.adapter.spec
    ours = prompt_flops(spec, record)
    assert ours + sum(record.vision_flops) == pytest.approx(counted, rel=EXACT)
    if name == "off":
        assert ours == full_prompt_flops(spec, record.prompt, record.past, record.pairs_ahead)


@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_the_unpatched_host_is_counted_alike(family):
    """Its masks (windows, images that look both ways, padding) let through what the analytic count says."""
    model, prompts = tiny_model(family), [[30, IMAGE, 3], [9, IMAGE, 2]]
    inputs = tiny_inputs(family, prompts)
    with torch.no_grad(), measured_flops() as counter:
        model(**inputs, logits_to_keep=1, use_cache=False)
    handle, *_ = run(family, CONFIGS["off"], prompts)
    (record,), spec = handle.records, handle.adapter.spec
    padding = 2 * max(record.prompt) - sum(record.prompt)  # the host computes its rows, as keys that nobody sees
    ours = full_prompt_flops(spec, record.prompt, record.past, record.pairs_ahead) + sum(record.vision_flops)
    extra = spec.num_layers * layer_flops(spec, padding, padding, padding, 0)
    assert ours + extra == pytest.approx(counter.get_total_flops(), rel=EXACT)


@pytest.mark.parametrize("name", ["off", "all of it"])
def test_batches_of_uneven_prompts(name):
    handle, output, counted = run("llava_next", CONFIGS[name], [[3, IMAGE, 5, IMAGE, 4], [9], [2, IMAGE, 7]])
    record, spec = handle.records[-1], handle.adapter.spec
    assert prompt_flops(spec, record) + sum(record.vision_flops) == pytest.approx(counted, rel=EXACT)
    assert record.vision_flops[1] == 0 and record.vision_flops[0] == 2 * record.vision_flops[2]
    entries = list(zip(*(layer.entries for layer in record.layers), strict=True))
    with patched(handle.model, CONFIGS[name]), measured_flops() as counter:
        handle.model(input_ids=torch.full((3, 1), 20), **{CACHE_NAME: output[CACHE_NAME]})
    assert sum(decode_flops(spec, own) for own in entries) == pytest.approx(counter.get_total_flops(), rel=EXACT)


@pytest.mark.parametrize("name", ["off", "pivot", "strided"])
def test_chunks_and_turns(name):
    model, config, parts = tiny_model("llava"), CONFIGS[name], [[5, IMAGE, 4, IMAGE, 6], [8, IMAGE, 3]]
    cache = None
    with patched(model, config, prefill_chunk_size=20) as handle, measured_flops() as counter:
        for part in parts:
            inputs = {k: v for k, v in tiny_inputs("llava", [part]).items() if k != "attention_mask"}
            cache = model(**inputs, **{CACHE_NAME: cache}, logits_to_keep=1, use_cache=True)[CACHE_NAME]
    spec = handle.adapter.spec
    ours = sum(prompt_flops(spec, record) + sum(record.vision_flops) for record in handle.records)
    assert ours == pytest.approx(counter.get_total_flops(), rel=EXACT)
    both = joined(handle.records)
    assert sum(both.vision_flops) == sum(sum(record.vision_flops) for record in handle.records)
    assert stacked(handle.records).vision_flops == tuple(record.vision_flops[0] for record in handle.records)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_counts_of_the_vision_tower_agree(family):
    video = [[2, VIDEO, 3]] if FAMILIES[family].video_tokens else []
    inputs = tiny_inputs(family, [[3, IMAGE, 5, IMAGE, 4], [2, IMAGE, 9], *video])
    adapter = adapter_for(tiny_model(family))
    with torch.no_grad(), measured_flops() as counter:
        adapter.visual_units(inputs)
    by_operator = dataclasses.asdict(vision_flops(adapter, inputs))
    assert sum(by_operator.values()) == counter.get_total_flops()
    assert all(flops > 0 for name, flops in by_operator.items() if name != "pooling")
    assert (by_operator["pooling"] > 0) == (family in ("llava_next", "llava_onevision"))


@pytest.mark.parametrize("name", ["off", "pivot"])
@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_both_counts_of_a_step_agree(family, name):
    skip_if_refused(family, CONFIGS[name])
    handle, output, _ = run(family, CONFIGS[name], [[12, IMAGE, 10]])
    entries = [layer.entries[0] for layer in handle.records[-1].layers]
    with patched(handle.model, CONFIGS[name]), measured_flops() as counter:
        handle.model(input_ids=torch.tensor([[20]]), **{CACHE_NAME: output[CACHE_NAME]})
    assert decode_flops(handle.adapter.spec, entries) == pytest.approx(counter.get_total_flops(), rel=EXACT)


def test_operators_add_up():
    handle, *_ = run("llava", CONFIGS["all of it"], [[30, IMAGE, 20]])
    record, spec = handle.records[-1], handle.adapter.spec
    counts = prompt_counts(spec, record)
    assert counts.total == prompt_flops(spec, record) == sum(counts.by_operator.values())
    assert all(flops > 0 for flops in counts.by_operator.values())
    assert counts.techniques == sum(counts.by_operator[name] for name in ("merge", "prune", "cache"))
    plain = full_prompt_counts(spec, [60], [0])
    assert plain.layers[0].total == layer_flops(spec, 60, 60, 60, causal_pairs(60, 0))
    assert plain.layers[0].logits == 2 * 4 * 16 * (60 * 61 // 2)
    assert (plain.layers[0].q, plain.layers[0].k) == (2 * 60 * 64 * 64, 2 * 60 * 64 * 32)


def test_dense_attention_looks_at_every_key():
    spec = adapter_for(tiny_model("gemma3")).spec  # whose windows are of 20 tokens
    exact, dense = (full_prompt_counts(spec, [50, 7], [10, 0], dense=x) for x in (False, True))
    assert {layer.logits for layer in dense.layers} == {2 * 4 * 16 * (50 * 60 + 7 * 7)}
    assert exact.layers[0].logits < exact.layers[1].logits < dense.layers[1].logits
    assert [layer.ffn for layer in exact.layers] == [layer.ffn for layer in dense.layers]
    handle, *_ = run("llava", CONFIGS["off"], [[30, IMAGE, 20]])
    (record,) = handle.records
    assert prompt_flops(handle.adapter.spec, record, dense=True) == full_prompt_flops(
        handle.adapter.spec, record.prompt, record.past, dense=True
    )


Q, K = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8)


@pytest.mark.parametrize(
    ("call", "pairs"),
    [
        (lambda: scaled_dot_product_attention(Q, Q, Q), 36),
        (lambda: scaled_dot_product_attention(Q, Q, Q, is_causal=True), 21),
        (lambda: scaled_dot_product_attention(Q, K, K, is_causal=True, enable_gqa=True), 21),
        (lambda: scaled_dot_product_attention(Q, Q, Q, attn_mask=torch.ones(6, 6).tril().bool()), 21),
        (lambda: scaled_dot_product_attention(Q, Q, Q, attn_mask=torch.zeros(2, 1, 1, 6)), 36),
        (lambda: scaled_dot_product_attention(Q, Q, Q, attn_mask=(1 - torch.eye(6)) * torch.finfo().min), 6),
        (lambda: prompt_attention(Q, K, K, query_index=torch.tensor([0, 2, 3, 5, 6, 8]), window=3), 1 + 5 * 3),
        (lambda: prompt_attention(Q, K, K, backend="reference"), sum(range(4, 10))),
        (lambda: torch.softmax(Q @ Q.mT, -1) @ Q, 36),
    ],
)
def test_attention_counts_the_pairs_it_needs(call, pairs):
    with measured_flops() as counter:
        call()
    assert counter.get_total_flops() == 2 * 4 * pairs * 4 * 8
