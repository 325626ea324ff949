import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mminfer.cache import lookm_compress, lookm_keep, lookm_merge
from mminfer.cache.lookm import LookM
from mminfer.errors import ConfigError
from mminfer.technique import CacheEntries
from tests.views import layer_view


def cache(entries, batch=1, groups=2, size=8, visual_share=0.7):
    k, v = torch.randn(2, batch, groups, entries, size)
    visual = (torch.rand(entries) < visual_share).expand(batch, entries)
    return k, v, torch.rand(batch, groups, entries), visual


def merge_one_by_one(k, v, kept, merge):
    """The rule for one sequence, entry after entry, in float64: [G, N, D] and [G, S] -> two [G, S, D]."""
    k, v = k.double(), v.double()
    places = [sorted(set(range(k.shape[1])) - set(row)) for row in kept.tolist()]
    unit = torch.nn.functional.normalize(k, dim=-1)
    best = [(unit[g, places[g]] @ unit[g, kept[g]].mT).max(-1) for g in range(k.shape[0])]
    similarity = torch.stack([head.values for head in best])  # [G, N - S]
    chosen = similarity.mean(0) >= similarity.mean()
    results = []
    for x in (k, v):
        rows = []
        for g in range(k.shape[0]):
            members = [[x[g, place]] for place in kept[g].tolist()]
            for i, place in enumerate(places[g]):
                target = int(best[g].indices[i])
                entry = x[g, place]
                if merge == "weighted":
                    if not chosen[i]:
                        continue
                    entry = similarity[g, i] * entry
                elif merge == "pivot":
                    entry = (entry + x[g, kept[g, target]]) / 2
                members[target].append(entry)
            rows.append(torch.stack([torch.stack(group).mean(0) for group in members]))
        results.append(torch.stack(rows))
    return results


@pytest.mark.parametrize("merge", ["average", "weighted", "pivot"])
@pytest.mark.parametrize("text_prior", [True, False])
@pytest.mark.parametrize("entries", [10, 63, 300])
def test_equals_the_rule_entry_by_entry(entries, text_prior, merge):
    k, v, score, visual = cache(entries)
    found_k, found_v, kept = lookm_compress(k, v, score, visual, 0.4, 0.1, merge, text_prior)
    wanted = merge_one_by_one(k[0], v[0], kept[0], merge)
    torch.testing.assert_close(found_k[0].double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_v[0].double(), wanted[1], rtol=1e-5, atol=1e-5)
    assert found_k.shape[2] < entries and found_k.untyped_storage().nbytes() < k.untyped_storage().nbytes()


@settings(deadline=None, max_examples=100)
@given(
    visual=st.lists(st.booleans(), min_size=1, max_size=60),
    important=st.integers(0, 70),
    recent=st.integers(0, 70),
    seed=st.integers(0, 99),
)
def test_what_stays_with_the_text_prior(visual, important, recent, seed):
    visual = torch.tensor(visual)
    entries = len(visual)
    score = torch.rand(1, 2, entries, generator=torch.Generator().manual_seed(seed))
    kept = lookm_keep(score, visual[None], important, recent)
    assert (kept.diff() > 0).all()
    older = max(entries - recent, 0)
    texts = int((~visual[:older]).sum())
    wanted = min(older, max(important, texts)) + min(recent, entries)
    assert kept.shape == (1, 2, max(wanted, 1))
    for head, row in enumerate(kept[0]):
        stays = torch.zeros(entries, dtype=torch.bool).scatter_(0, row, True)
        assert stays[older:].all() and stays[~visual].all()
        dropped, chosen = ~stays, stays & visual & (torch.arange(entries) < older)
        if dropped.any() and chosen.any():
            assert score[0, head, chosen].min() > score[0, head, dropped].max()


def test_without_the_text_prior_sinks_stay_and_text_competes():
    score = torch.arange(100.0).expand(1, 2, 100)
    visual = torch.zeros(1, 100, dtype=torch.bool)
    kept = lookm_keep(score, visual, 10, 5, text_prior=False)
    assert kept[0, 1].tolist() == [0, 1, 2, 3, *range(89, 95), *range(95, 100)]
    assert lookm_keep(score, visual, 2, 0, text_prior=False)[0, 0].tolist() == [0, 1, 2, 3]


def test_heads_that_hold_different_text_keep_as_many_entries():
    visual = torch.ones(1, 2, 30, dtype=torch.bool)
    visual[0, 0, :7] = False
    visual[0, 1, :3] = False
    kept = lookm_keep(torch.rand(1, 2, 30), visual, 5, 4)
    assert kept.shape == (1, 2, 11)
    assert kept[0, 0, :7].tolist() == list(range(7)) and kept[0, 1, :3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("merge", ["average", "weighted", "pivot", "none"])
@pytest.mark.parametrize("ratios", [(1.0, 0.0), (0.6, 0.4), (0.9, 0.9)])
def test_a_ratio_of_one_is_the_identity(ratios, merge):
    k, v, score, visual = cache(63)
    found_k, found_v, kept = lookm_compress(k, v, score, visual, *ratios, merge)
    assert torch.equal(found_k, k) and torch.equal(found_v, v)
    assert torch.equal(kept, torch.arange(63).expand(1, 2, 63))


@pytest.mark.parametrize("merge", [None, "none"])
def test_evicting_only_leaves_entries_as_they_were(merge):
    k, v, score, visual = cache(63)
    found_k, found_v, kept = lookm_compress(k, v, score, visual, 0.4, 0.1, merge)
    index = kept[..., None].expand(-1, -1, -1, 8)
    assert torch.equal(found_k, k.gather(2, index)) and torch.equal(found_v, v.gather(2, index))


def test_sequences_of_a_batch_do_not_touch():
    k, v, score, visual = cache(90, batch=3)
    for merge in ("average", "weighted", "pivot"):
        together = lookm_compress(k, v, score, visual, 0.5, 0.1, merge)
        for b in range(3):
            part = slice(b, b + 1)
            alone = lookm_compress(k[part], v[part], score[part], visual[part], 0.5, 0.1, merge)
            for whole, single in zip(together, alone, strict=True):
                torch.testing.assert_close(whole[part], single)


def test_merging_averages_what_it_drops():
    """One kept entry takes everything: its value is the plain mean."""
    v = torch.randn(1, 1, 40, 8)
    _, merged = lookm_merge(torch.ones(1, 1, 40, 8), v, torch.tensor([[[39]]]), "average")
    torch.testing.assert_close(merged[0, 0, 0], v[0, 0].mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_non_contiguous(dtype):
    k, v = torch.randn(2, 1, 90, 2, 8).to(dtype).transpose(2, 3)
    _, _, score, visual = cache(90)
    found = lookm_compress(k, v, score, visual, 0.4, 0.1, "pivot")
    wanted = lookm_compress(k.float(), v.float(), score, visual, 0.4, 0.1, "pivot")
    assert found[0].dtype == dtype and torch.equal(found[2], wanted[2])
    assert torch.equal(found[0], wanted[0].to(dtype)) and torch.equal(found[1], wanted[1].to(dtype))


def test_a_compressed_cache_can_be_compressed_again():
    k, v, score, visual = cache(120)
    k, v, kept = lookm_compress(k, v, score, visual, 0.4, 0.1, "pivot")
    per_head = visual[:, None].expand(1, 2, 120).gather(2, kept)
    again = lookm_compress(k, v, torch.rand(kept.shape), per_head, 0.4, 0.1, "pivot")
    assert again[0].shape[2] < k.shape[2] and again[0].isfinite().all()


def test_wrong_input_is_named():
    k, v, score, visual = cache(20)
    for ratios in ((0, 0.1), (1.1, 0.1), (-0.1, 0.1)):
        with pytest.raises(ConfigError, match="important_ratio"):
            lookm_compress(k, v, score, visual, *ratios, "pivot")
    for ratios in ((0.1, -0.1), (0.1, 1.1)):
        with pytest.raises(ConfigError, match="recent_ratio"):
            lookm_compress(k, v, score, visual, *ratios, "pivot")
    with pytest.raises(ConfigError, match="merge is 'mean'"):
        lookm_compress(k, v, score, visual, 0.1, 0.1, "mean")
    with pytest.raises(ConfigError, match="num_recent -1"):
        lookm_keep(score, visual, 1, -1)
    with pytest.raises(ValueError, match="visual_mask \\[1, 19\\]"):
        lookm_keep(score, visual[:, 1:], 1, 1)
    two = torch.ones(2, 20, dtype=torch.bool)
    two[0, :9] = False
    with pytest.raises(ValueError, match="one at a time"):
        lookm_keep(score.expand(2, 2, 20), two, 3, 3)


def entries_of(visual, score, size=8):
    """Entries of one head whose keys are distinct."""
    count = len(visual)
    k, v = (torch.randn(1, 1, count, size, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    return CacheEntries(k, v, torch.tensor(visual)[None, None], torch.tensor(score)[None, None].float())


def compress(policy, entries):
    """With a query that adds nothing to the scores that there are."""
    mass = torch.zeros(1, 1, len(entries))
    return policy.apply(layer_view(entries.keys[:, :, -1:], entries, attention_mass=mass))


@pytest.mark.parametrize("merge", ["average", "weighted", "pivot", "none"])
def test_the_technique_follows_the_rule(merge):
    """Keys and values apart: what the technique gives is what the rule says entry by entry, by both kinds of scores."""
    k, v, score, visual = cache(40)
    earlier = torch.rand(1, 2, 40)
    entries = CacheEntries(k, v, visual[:, None].expand(1, 2, 40), earlier)
    mass = torch.stack([score / 4, 3 * score / 4], 2).flatten(1, 2)  # two query heads a group
    found = LookM(0.3, 0.2, merge=merge).apply(layer_view(torch.randn(1, 4, 40, 8), entries, attention_mass=mass))
    places = lookm_keep(score + earlier, visual, 12, 8)
    assert torch.equal(found.score, (earlier + mass.view(1, 2, 2, 40).sum(2)).gather(2, places))
    assert torch.equal(found.is_visual, entries.is_visual.gather(2, places))
    index = places[..., None].expand(-1, -1, -1, 8)
    plain = k.gather(2, index)[0], v.gather(2, index)[0]
    wanted = plain if merge == "none" else merge_one_by_one(k[0], v[0], places[0], merge)
    for ours, theirs in zip((found.keys, found.values), wanted, strict=True):
        torch.testing.assert_close(ours[0].double(), theirs.double(), rtol=1e-5, atol=1e-5)


TEXT, SEEN = [False] * 6 + [True] * 4 + [False] * 2, [9, 1, 8, 2, 7, 3, 50, 40, 30, 20, 0, 0]


def test_a_budget_is_a_bound_and_text_still_comes_first():
    """Six text entries for four places: the text looked at least leaves, before any text the visual ones."""
    policy = LookM(budget=6, recent=2, merge="none")
    with pytest.warns(UserWarning, match=r"more than the 4 entries.*budget of 6.*2 recent.*looked at least leaves"):
        kept = compress(policy, entries_of(TEXT, SEEN))
    assert kept.score[0, 0].tolist() == [9, 8, 7, 3, 0, 0]
    assert not kept.is_visual.any()
    roomy = compress(LookM(budget=9, recent=2, merge="none"), entries_of(TEXT, SEEN))
    assert roomy.score[0, 0].tolist() == [9, 1, 8, 2, 7, 3, 50, 0, 0]


def test_text_may_outgrow_a_budget_if_asked_to():
    policy = LookM(budget=6, recent=2, merge="none", text_overflow="keep")
    with pytest.warns(UserWarning, match="the cache grows"):
        kept = compress(policy, entries_of(TEXT, SEEN))
    assert kept.score[0, 0].tolist() == [9, 1, 8, 2, 7, 3, 0, 0]


def test_without_a_budget_all_text_stays_and_nobody_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = compress(LookM(0.2, 0.2, merge="none"), entries_of(TEXT, SEEN))
        compress(LookM(budget=10, recent=2), entries_of(TEXT, SEEN))
    assert kept.score[0, 0].tolist() == [9, 1, 8, 2, 7, 3, 0, 0]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"budget": 64, "recent": 64}, r"budget=64 leaves nothing.*window of 64.*wanted 65 or more"),
        ({"budget": 10, "recent": 64}, r"budget=10 .*window of 64"),
        ({"recent": 3}, "LookM.recent=3, wanted .* beside a budget"),
        ({"budget": 10, "recent": -1}, "LookM.recent=-1"),
        ({"budget": 10, "text_overflow": "drop"}, "text_overflow='drop', wanted one of evict, keep"),
    ],
)
def test_budgets_that_leave_nothing_are_refused(settings, wanted):
    with pytest.raises(ConfigError, match=wanted):
        LookM(**settings)
