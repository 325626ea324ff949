"""Savings are physical: hooks on the host's modules see only the rows that the settings leave."""

import contextlib
from collections import defaultdict

import pytest
import torch

from mminfer import V2PE, AIMMerge, AIMPrune, InferenceConfig, LookM, OperatorSkip, patched
from mminfer.forward.call_state import CallState
from mminfer.models.registry import adapter_for
from mminfer.technique import LayerRange
from mminfer.tokens import aim_schedule
from tests.tiny import (
    FAMILIES,
    IMAGE,
    LAYERS,
    MARKED_FAMILIES,
    VIDEO,
    fitting,
    skip_if_refused,
    tiny_inputs,
    tiny_model,
    tiny_rows,
)

PROMPTS = [[3, IMAGE, 5, IMAGE, 4], [2, IMAGE, 9]]
EVERYTHING = InferenceConfig(
    positions=V2PE(1 / 16),
    merge=AIMMerge(0.5),
    prune=AIMPrune(start=1, end=3),
    skip=OperatorSkip(ffn=[0], attention=[1], block=[2]),
    cache=LookM(0.2, 0.1),
)


@contextlib.contextmanager
def rows_seen(model):
    """Rows (and queries of a prompt pass) that enter each module, by its name in the language model."""
    seen, handles = defaultdict(list), []
    for name, module in adapter_for(model).language_model.named_modules():
        if name.startswith("layers."):

            def look(_, args, kwargs, name=name):
                seen[name].append((args[0] if args else kwargs["hidden_states"]).shape[1])

            handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
    yield seen
    for handle in handles:
        handle.remove()


def counts(layout_ids, family):
    visual = FAMILIES[family].image_tokens
    return [(len(ids), visual * n) for ids, n in layout_ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_rows_enter_no_later_layer(family):
    model, inputs = tiny_model(family), tiny_inputs(family, PROMPTS)
    mask, per_image = inputs["attention_mask"].bool(), FAMILIES[family].image_tokens
    tokens = mask.sum(1).tolist()
    visual = [2 * per_image, per_image]
    rates = [1.0, *aim_schedule(LAYERS, 1, 3)]
    config = InferenceConfig(prune=AIMPrune(start=1, end=3))
    skip_if_refused(family, config)
    with patched(model, config) as handle, rows_seen(model) as seen:
        out = model(**inputs, use_cache=True)
    for layer in range(LAYERS):
        want = [n - v + int(v * rates[layer]) for n, v in zip(tokens, visual, strict=True)]
        assert seen[f"layers.{layer}"] == [sum(want)]
        assert seen[f"layers.{layer}.mlp"] == seen[f"layers.{layer}.self_attn.k_proj"] == [sum(want)]
        assert list(handle.records[-1].layers[layer].rows) == want
        assert out.past_key_values.lengths[layer] == want


@pytest.mark.parametrize("family", FAMILIES)
def test_skipped_operators_see_only_text(family):
    model, inputs = tiny_model(family), tiny_inputs(family, PROMPTS)
    total = int(inputs["attention_mask"].sum())
    text = total - 3 * FAMILIES[family].image_tokens
    config = InferenceConfig(skip=OperatorSkip(ffn=[0], attention=[1], block=LayerRange(0.5, 0.75)))
    skip_if_refused(family, config)
    with patched(model, config), rows_seen(model) as seen:
        model(**inputs)
    for layer, (attention, ffn) in enumerate([(total, text), (text, total), (text, text), (total, total)]):
        assert seen[f"layers.{layer}.self_attn.q_proj"] == seen[f"layers.{layer}.self_attn.o_proj"] == [attention]
        assert seen[f"layers.{layer}.self_attn.k_proj"] == seen[f"layers.{layer}.self_attn.v_proj"] == [total]
        assert seen[f"layers.{layer}.mlp"] == seen[f"layers.{layer}.post_attention_layernorm"] == [ffn]


def reference_skip(model, hidden, cos_sin, is_visual, ffn, attention):
    """The same network with operators computed for all rows and their output discarded for visual ones."""
    mask = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    for i, layer in enumerate(model.base_model.language_model.layers):
        out = layer.self_attn(layer.input_layernorm(hidden), attention_mask=mask, position_embeddings=cos_sin)[0]
        hidden = hidden + (out * ~is_visual[:, None] if i in attention else out)
        out = layer.mlp(layer.post_attention_layernorm(hidden))
        hidden = hidden + (out * ~is_visual[:, None] if i in ffn else out)
    return hidden


def test_skipping_equals_discarding():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[3, IMAGE, 5, IMAGE, 4]])
    is_visual = inputs["input_ids"][0] == model.config.image_token_id
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    hidden = model.get_input_embeddings()(inputs["input_ids"]).detach()
    hidden[0, is_visual] = features.detach()
    cos_sin = model.base_model.language_model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    with torch.no_grad():
        want = model.lm_head(
            model.base_model.language_model.norm(
                reference_skip(model, hidden, cos_sin, is_visual, ffn=[0, 2], attention=[1, 2])
            )
        )
    with patched(model, InferenceConfig(skip=OperatorSkip(ffn=[0], attention=[1], block=[2]))):
        got = model(**inputs).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_rows_never_enter(family):
    model, inputs = tiny_model(family), tiny_inputs(family, PROMPTS)
    text = int(inputs["attention_mask"].sum()) - 3 * FAMILIES[family].image_tokens
    kept = FAMILIES[family].patches // 4 + FAMILIES[family].newlines
    with patched(model, InferenceConfig(merge=AIMMerge(ratio=0.25))), rows_seen(model) as seen:
        model(**inputs)
    assert [seen[f"layers.{i}"] for i in range(LAYERS)] == [[text + 3 * kept]] * LAYERS


@pytest.mark.parametrize(("important", "recent"), [(0.5, 0.1), (0.3, 0.3), (0.1, 0.1), (0.025, 0.025)])
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_bytes_are_the_budget_and_the_text(family, important, recent):
    model, inputs = tiny_model(family), tiny_inputs(family, [[2, IMAGE, 1, IMAGE, IMAGE, 2, IMAGE, 30]])
    tokens = inputs["input_ids"].shape[1]
    is_visual = inputs["input_ids"][0] == model.config.image_token_id
    window = int(tokens * recent)
    text = int((~is_visual[: tokens - window]).sum())
    config = InferenceConfig(cache=LookM(important, recent))
    skip_if_refused(family, config)
    with patched(model, config):
        cache = model(**inputs, use_cache=True).past_key_values
    entries = window + max(int(tokens * important), text)
    spec = adapter_for(model).spec
    assert cache.lengths == [[entries]] * LAYERS
    assert cache.nbytes == 2 * LAYERS * entries * spec.num_key_value_heads * spec.head_dim * 4
    assert cache.nbytes == sum(
        x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values)
    )


@pytest.mark.parametrize(
    "config",
    [
        EVERYTHING,
        *(InferenceConfig(**{n: getattr(EVERYTHING, n)}) for n in ("merge", "prune", "skip", "cache")),
    ],
)
@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_a_batch_gives_what_each_chat_gives_alone(family, config):
    model, config = tiny_model(family), fitting(family, config)
    prompts = [[3, IMAGE, 5, IMAGE, 4], [8], [2, IMAGE, 9]]
    if FAMILIES[family].video_tokens:
        prompts[2].insert(1, VIDEO)
    together = tiny_inputs(family, prompts)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    mask = together["attention_mask"].bool()
    with patched(model, config):
        out = model.generate(**together, **kwargs)
        for row, alone in enumerate(tiny_rows(family, prompts)):
            one = model.generate(**alone, **kwargs)
            assert torch.equal(alone["input_ids"][0], together["input_ids"][row][mask[row]])
            for step, logits in enumerate(one.logits):
                torch.testing.assert_close(out.logits[step][row], logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_have_ended_are_computed_no_further(family):
    model, inputs = tiny_model(family), tiny_inputs(family, [[3, IMAGE, 4], [7], [2, IMAGE, 9]])
    steps = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    seen = []
    with patched(model, fitting(family, EVERYTHING)) as handle:
        whole = model.generate(**inputs, **steps, min_new_tokens=6, eos_token_id=None)
        new = whole.sequences[:, inputs["input_ids"].shape[1] :]
        ends = int(new[1, 2])
        stops = [row.index(ends) if ends in row else 5 for row in new.tolist()]
        look = (
            adapter_for(model)
            .layers[0]
            .register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
                with_kwargs=True,
            )
        )
        with handle.begin(CallState(end_ids={ends})):
            ours = model.generate(**inputs, **steps, eos_token_id=ends)
        look.remove()
    count = len(ours.logits)
    going = [sum(stop >= step for stop in stops) for step in range(1, count)]
    assert [batch for batch, _ in seen[1:]] == going and min(going) < 3
    for row, stop in enumerate(stops):
        for step in range(min(stop + 1, count)):
            torch.testing.assert_close(ours.logits[step][row], whole.logits[step][row], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES[f].video_tokens])
def test_merging_across_frames_leaves_as_many_rows(family):
    """Two frames of a video: the same ratio of the pair, by other partners."""
    model, inputs = tiny_model(family), tiny_inputs(family, [[3, VIDEO, 4]])
    rows, logits = [], []
    for across in (False, True):
        with patched(model, InferenceConfig(merge=AIMMerge(0.5, across_frames=across))) as handle:
            logits.append(model(**inputs).logits)
        rows.append(handle.records[-1].merged)
    assert rows[0] == rows[1]
    apart = family == "qwen3_vl"  # time stamps stand between its frames
    assert torch.equal(*logits) == apart
