"""Gemma 3: windows, images that attend in both directions, and tables of two kinds of layers."""

import pytest
import torch
from mminfer_kernels.prompt_attention import reference as sdpa

from mminfer import V2PE, AIMMerge, InferenceConfig, OperatorSkip, patched
from mminfer.forward.attention import Visibility, causal_attention
from mminfer.metrics.memory import full_cache_bytes
from mminfer.models.registry import adapter_for
from mminfer.operators.skip import LayerRange
from tests.tiny import IMAGE, LAYERS, tiny_inputs, tiny_model

PROMPTS = [[3, IMAGE, 15, IMAGE, 4], [2, IMAGE, 9], [30]]


def dense(q, k, v, visible):
    scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("window", [None, 1, 9, 30])
@pytest.mark.parametrize("past", [0, 5])
def test_attention_in_blocks_is_attention_under_the_whole_mask(rows, window, past, monkeypatch):
    monkeypatch.setattr(sdpa, "BLOCK_ROWS", rows)
    block = torch.tensor([-1] * 4 + [0] * 6 + [-1] + [1] * 12 + [2] * 3 + [-1] * 4)
    queries, keys = len(block), len(block) + past
    place, column = torch.arange(past, keys)[:, None], torch.arange(keys)
    full = torch.cat([torch.full((past,), -1), block])
    visible = (column <= place) | ((full[place] == full) & (full >= 0))
    if window is not None:
        visible &= column > place - window
    reach = torch.stack([row.nonzero().max() for row in visible])
    q = torch.randn(1, 4, queries, 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, keys, 8, dtype=torch.float64)
    torch.testing.assert_close(causal_attention(q, k, v, 1.0, Visibility(None, window, reach)), dense(q, k, v, visible))


def test_images_see_ahead_and_the_host_agrees():
    """The comparison with the host means nothing if neither looks ahead."""
    model, inputs = tiny_model("gemma3"), tiny_inputs("gemma3", PROMPTS)
    real = inputs["attention_mask"].bool()
    blind = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    with patched(model, InferenceConfig()) as handle:
        both, back_only = model(**inputs).logits[real], model(**blind).logits[real]
        assert handle.records[0].pairs_ahead == (2 * 16 * 15 // 2, 16 * 15 // 2, 0)
        assert handle.records[1].pairs_ahead == ()
    assert not torch.allclose(both, back_only, atol=1e-3)
    torch.testing.assert_close(back_only, model(**blind).logits[real], rtol=0, atol=1e-4)


def test_what_is_left_of_a_merged_image_still_sees_ahead():
    """The host on the merged embeddings, under the host's own masks."""
    model, inputs = tiny_model("gemma3"), tiny_inputs("gemma3", [PROMPTS[0]])
    adapter, merge = adapter_for(model), AIMMerge(0.5)
    with torch.no_grad():
        merged, left = merge.apply(*adapter.embed(inputs))
        host = model(
            inputs_embeds=merged[None],
            attention_mask=torch.ones(1, len(left), dtype=torch.int64),
            position_ids=left.position.long(),
            token_type_ids=left.is_visual[None].long(),
        ).logits[:, -1]
    with patched(model, InferenceConfig(merge=merge)):
        ours = model(**inputs).logits[:, -1]
    torch.testing.assert_close(ours, host, rtol=0, atol=1e-4)


@pytest.mark.parametrize("skip", [OperatorSkip(ffn=[1, 2]), OperatorSkip(ffn=LayerRange())])
def test_a_skipped_ffn_is_a_discarded_one(skip):
    model, inputs = tiny_model("gemma3"), tiny_inputs("gemma3", [PROMPTS[0]])
    is_visual = inputs["input_ids"][0] == model.config.image_token_id
    layers = skip.ffn.layers(LAYERS) if isinstance(skip.ffn, LayerRange) else skip.ffn
    hooks = [
        adapter_for(model)
        .layers[i]
        .post_feedforward_layernorm.register_forward_hook(lambda module, args, out: out * ~is_visual[:, None])
        for i in layers
    ]
    host = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    with patched(model, InferenceConfig(skip=skip)):
        torch.testing.assert_close(model(**inputs).logits, host, rtol=0, atol=1e-4)


def test_windows_hold_what_a_next_token_sees():
    """As the host's own cache does, whose sliding layers keep a window less one."""
    model, inputs = tiny_model("gemma3"), tiny_inputs("gemma3", [PROMPTS[0]])
    host = model(**inputs, use_cache=True).past_key_values
    tokens, window = inputs["input_ids"].shape[1], model.config.text_config.sliding_window
    with patched(model, InferenceConfig()) as handle:
        cache = model(**inputs, use_cache=True).past_key_values
    assert cache.lengths == [[window - 1], [tokens]] * 2
    assert [layer.keys.shape for layer in cache.layers] == [layer.keys.shape for layer in host.layers]
    assert cache.nbytes == full_cache_bytes(handle.adapter.spec, [tokens], 4)


def test_fractional_positions_reach_both_kinds_of_layers():
    """The host with the same fractional positions, which its tables take in float32."""
    model, inputs = tiny_model("gemma3"), tiny_inputs("gemma3", [PROMPTS[0]])
    adapter, positions = adapter_for(model), V2PE(1 / 4)
    at = positions.apply(adapter.embed(inputs)[1], 1 << 20).position
    host = model(**inputs, position_ids=at.float()).logits
    with patched(model, InferenceConfig(positions=positions)):
        torch.testing.assert_close(model(**inputs).logits, host, rtol=0, atol=1e-4)
