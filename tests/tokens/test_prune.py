import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mminfer.errors import ConfigError
from mminfer.tokens import aim_importance, aim_keep, aim_schedule
from mminfer.tokens.prune import AIMPrune
from tests.views import layer_view


def dense_importance(q, k, temperature, iterations):
    """With the matrix of the last S tokens' attention to all N, float64."""
    rows, tokens = q.shape[2], k.shape[2]
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q.double() @ k.mT / math.sqrt(q.shape[-1]) / temperature
    matrix = logits.masked_fill(torch.ones(rows, tokens).triu(1 + tokens - rows).bool(), -math.inf).softmax(-1)
    x = torch.full((*q.shape[:2], 1, tokens), 1 / tokens).double()
    for _ in range(iterations):
        x = x[..., -rows:] @ matrix
    return x[:, :, 0].square().mean(1).sqrt()


@pytest.mark.parametrize("tokens", [1, 63, 300])
@pytest.mark.parametrize(("temperature", "iterations"), [(0.1, 5), (1.0, 2)])
def test_importance_equals_the_dense_one(tokens, temperature, iterations):
    q, k = torch.randn(2, 6, tokens, 16), torch.randn(2, 2, tokens, 16)
    found = aim_importance(q, k, temperature, iterations)
    wanted = dense_importance(q, k, temperature, iterations)
    assert found.shape == (2, tokens) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-8)


@settings(deadline=None, max_examples=80)
@given(layers=st.integers(1, 80), data=st.data())
def test_schedule_falls_from_one_to_zero(layers, data):
    end = data.draw(st.integers(1, layers))
    start = data.draw(st.integers(0, end - 1))
    schedule = aim_schedule(layers, start, end)
    assert len(schedule) == layers and schedule == sorted(schedule, reverse=True)
    assert all(rate == 1 for rate in schedule[:start]) and all(rate == 0 for rate in schedule[end - 1 :])
    assert schedule[start] == (end - 1 - start) / (end - start)


@pytest.mark.parametrize(("start", "end"), [(-1, 4), (4, 4), (5, 4), (2, 9)])
def test_schedule_out_of_range(start, end):
    with pytest.raises(ConfigError, match="8 layers"):
        aim_schedule(8, start, end)


@settings(deadline=None, max_examples=100)
@given(
    visual=st.lists(st.booleans(), min_size=1, max_size=50),
    gone=st.integers(0, 20),
    rate=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_keeps_text_and_the_most_important(visual, gone, rate, seed):
    visual = torch.tensor(visual)
    importance = torch.rand(len(visual), generator=torch.Generator().manual_seed(seed))
    texts, prompt_tokens = int((~visual).sum()), len(visual) + gone
    kept = aim_keep(importance, visual, prompt_tokens, rate)
    quota = min(int((prompt_tokens - texts) * rate), int(visual.sum()))
    assert len(kept) == quota + texts and (kept.diff() > 0).all()
    stays = torch.zeros_like(visual).scatter_(0, kept, True)
    assert stays[~visual].all()
    if 0 < quota < visual.sum():
        assert importance[visual & stays].min() > importance[visual & ~stays].max()


def test_rate_one_keeps_all_and_rate_zero_only_text():
    visual = torch.tensor([False, True, True, False, True])
    importance = torch.rand(5)
    assert aim_keep(importance, visual, 5, 1).tolist() == [0, 1, 2, 3, 4]
    assert aim_keep(importance, visual, 5, 0).tolist() == [0, 3]


def test_equal_importance_keeps_the_first():
    assert aim_keep(torch.ones(40), torch.ones(40).bool(), 40, 0.25).tolist() == list(range(10))


def test_wrong_input_is_named():
    importance, visual = torch.rand(5), torch.ones(5).bool()
    with pytest.raises(ConfigError, match=r"rate is 1\.5"):
        aim_keep(importance, visual, 5, 1.5)
    with pytest.raises(ValueError, match="prompt_tokens is 4"):
        aim_keep(importance, visual, 4, 0.5)
    with pytest.raises(ValueError, match=r"wanted \[N\] both"):
        aim_keep(importance[None], visual[None], 5, 0.5)


def test_the_papers_steps_count_from_the_tokens_that_came_in():
    """An eighth of all visual tokens leaves behind each layer from the 14th on, not an eighth of those left."""
    technique, is_visual = AIMPrune(), torch.tensor([False] * 3 + [True] * 64 + [False] * 4)
    keys, counts = torch.randn(1, 2, len(is_visual), 8), []
    for layer in range(28):
        if technique.prunes(layer, 28):
            queries = keys.repeat_interleave(2, 1)
            view = layer_view(
                queries, keys, is_visual=is_visual, layer_idx=layer, num_layers=28, prompt_tokens=71, scale=0.3
            )
            kept = technique.apply(view)
            keys, is_visual = keys[:, :, kept], is_visual[kept]
            counts.append((layer, int(is_visual.sum()), int((~is_visual).sum())))
    assert counts == [(14 + step, 56 - 8 * step, 7) for step in range(8)]


@pytest.mark.parametrize("earlier", [0, 5, 30])
def test_behind_an_earlier_pass_the_rows_of_this_one_are_judged(earlier):
    """The last keys are this pass's, whatever the cache held before."""
    queries, keys = torch.randn(1, 4, 24, 16), torch.randn(1, 2, earlier + 24, 16)
    is_visual = torch.tensor([False] * 2 + [True] * 20 + [False] * 2)
    view = layer_view(queries, keys, is_visual=is_visual, layer_idx=6, num_layers=12, prompt_tokens=24, scale=0.25)
    technique = AIMPrune(start=4, end=8)  # a quarter stays behind layer 6
    importance = dense_importance(queries, keys, 0.1, 5)[0]
    best = importance[earlier + 2 : earlier + 22].topk(5).indices.sort().values + 2
    assert technique.apply(view).tolist() == [0, 1, *best.tolist(), 22, 23]
    first = importance[2:22].topk(5).indices.sort().values + 2
    assert earlier == 0 or not torch.equal(first, best)  # what the first keys would say


def test_a_last_row_that_is_visual_counts_as_text():
    """It asks for the next token, so it stays and is no part of the quota."""
    keys = torch.randn(1, 1, 10, 8)
    view = layer_view(keys, keys, is_visual=torch.ones(10).bool(), layer_idx=4, num_layers=8, prompt_tokens=10)
    kept = AIMPrune(start=4, end=6).apply(view)
    assert len(kept) == int(9 / 2) + 1 and int(kept[-1]) == 9
    assert AIMPrune(start=2, end=5).apply(view).tolist() == [9]
