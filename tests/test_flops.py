"""The analytic count agrees with what torch counts while the pass runs."""

import pytest
from mminfer_kernels.prompt_attention import reference as sdpa

from mminfer import AIMMerge, AIMPrune, InferenceConfig, LookM, OperatorSkip, patched
from mminfer.metrics.flops import full_prompt_flops, measured_flops, prompt_flops
from tests.tiny import FAMILIES, IMAGE, skip_if_refused, tiny_inputs, tiny_model

CONFIGS = {
    "off": InferenceConfig(),
    "merge": InferenceConfig(merge=AIMMerge(0.25)),
    "prune": InferenceConfig(prune=AIMPrune(1, 4)),
    "skip": InferenceConfig(skip=OperatorSkip(ffn=[0, 1], attention=[2], block=[3])),
    "cache": InferenceConfig(cache=LookM(0.2, 0.1, merge="none")),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_counts_agree(family, name, monkeypatch):
    monkeypatch.setattr(sdpa, "BLOCK_ROWS", 1)  # then no masked pair is computed
    skip_if_refused(family, CONFIGS[name])
    model, inputs = tiny_model(family), tiny_inputs(family, [[30, *[IMAGE] * 12, 20]])
    features = model.base_model.get_image_features(
        **{k: v for k, v in inputs.items() if k.startswith(("pixel", "image_"))}
    )
    encoded = {k: v for k, v in inputs.items() if not k.startswith("pixel")}
    encoded["mm_encoder_outputs"] = {"image": features}
    with patched(model, CONFIGS[name]) as handle, measured_flops() as counter:
        model(**encoded, logits_to_keep=1)
    record, spec = handle.records[-1], handle.adapter.spec
    # Block edges of the scores and masked pairs of skipped attention are computed, though nobody needs them.
    tolerance = {"off": 0.001, "merge": 0.001, "prune": 0.03, "skip": 0.1, "cache": 0.1}[name]
    assert prompt_flops(spec, record) == pytest.approx(counter.get_total_flops(), rel=tolerance)
    if name == "off":
        assert prompt_flops(spec, record) == full_prompt_flops(spec, record.prompt, record.past, record.ahead)
