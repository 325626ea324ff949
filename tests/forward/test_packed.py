"""Heads that hold different numbers of entries, from the prompt to the last token: held to the host under a mask."""

import pytest
import torch

from mminfer import InferenceConfig, patched
from mminfer.forward.kv_cache import CACHE_NAME
from tests.by_head import ByLot, Truth
from tests.tiny import IMAGE, MARKED_FAMILIES, tiny_inputs, tiny_model
from tests.tiny_models import LAYERS

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
TECHNIQUES = [ByLot(), ByLot(weighed=True)]
ids = pytest.mark.parametrize("technique", TECHNIQUES, ids=["plain", "weighed"])


def extended(inputs, tokens):
    """Inputs with so many more tokens of text behind them."""
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], 1)}
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            out[name] = torch.nn.functional.pad(inputs[name], (0, tokens.shape[1]), value=int(name == "attention_mask"))
    return out


@ids
@pytest.mark.parametrize("family", [f for f in MARKED_FAMILIES if f != "gemma3"])
def test_a_prompt_its_tokens_and_a_second_turn(family, technique):
    model, inputs = tiny_model(family), tiny_inputs(family, [[9, IMAGE, 7]])
    truth, count = Truth(model, technique), inputs["input_ids"].shape[1]
    turn = torch.randint(10, 400, (1, 5))
    with patched(model, InferenceConfig(cache=technique)):
        out = model.generate(**inputs, **GREEDY)
        cache = out[CACHE_NAME]
        lengths = [layer.head_lengths[0] for layer in cache.layers]
        second = model(input_ids=turn, **{CACHE_NAME: cache})
    truth.tokens(count)
    truth.compress()
    truth.tokens(NEW - 1)
    assert lengths == truth.lengths and len(set(lengths[0])) > 1
    truth.tokens(5)
    want = truth.logits(extended(inputs, torch.cat([out.sequences[:, count:-1], turn], 1)))
    got = torch.cat([torch.stack(out.logits, 1), second.logits], 1)[0]
    torch.testing.assert_close(got, want[count - 1 :], rtol=0, atol=1e-4)
    truth.compress()
    assert [layer.head_lengths[0] for layer in cache.layers] == truth.lengths
    assert len(cache.layers) == LAYERS
    held = sum(map(sum, truth.lengths))
    per_entry = 2 * cache.layers[0].keys.shape[1] * 4 + 4 * technique.weighed
    assert cache.nbytes == held * per_entry
