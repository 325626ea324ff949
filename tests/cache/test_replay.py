"""Replay's rules: what it chooses, what it fits, what it refuses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from mminfer import ConfigError, Replay
from mminfer.cache import replay_parts
from mminfer.cache.replay_fit import MOST, RIDGE, Asked, fitted, fitted_masses
from mminfer.cache.replay_parts import fitted_together
from mminfer.cache.replay_rules import FOR_PICTURE, at_rest, one_for_each, run_numbers, shared_choice
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.packed_layer import layer_of
from mminfer.technique import NOTHING, CacheEntries, EarlierEntries, ReplayedStretch

GROUPS, REPEAT, SIZE = 2, 3, 8


def made(count, seed=0, visual=None):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, GROUPS, count, SIZE, generator=generator) for _ in range(2))
    is_visual = torch.zeros(count, dtype=torch.bool)
    for first, last in visual or ():
        is_visual[first:last] = True
    score = torch.zeros(1, GROUPS, count)
    return CacheEntries(keys, values, is_visual=is_visual.expand(1, GROUPS, count), score=score)


def looked(count, first=0, seed=1, rows=20):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(GROUPS * REPEAT, rows, SIZE, generator=generator)
    return ReplayedStretch(first, torch.rand(GROUPS, count, generator=generator), queries, None, SIZE**-0.5)


def fitted_alone(queries, keys, values, keep, movable, scale, log_mass=None):
    """Values and log-masses of one head's entries that stay ([N] bool), of which some are movable."""
    places = keep.nonzero()[:, 0]
    mass, count = None if log_mass is None else log_mass[None], torch.tensor([len(places)])
    values, mass = fitted(
        Asked(queries[None], keys[None], values[None], places[None], count, movable[None], scale, mass)
    )
    return values[0], mass[0]


def fitted_heads(entries, stretches, keep):
    """Values and log-masses of one layer's entries that stay, [G, N] bool, written over those of all of them."""
    kept = entries.select_heads(keep[None])
    (found,) = fitted_together([entries], [stretches], [keep.flatten()], [kept])
    values, mass = entries.values.clone(), entries.weighed().log_mass.clone()
    values[0][keep], mass[0][keep] = found.values[0, 0], found.weighed().log_mass[0, 0]
    return values[0], mass[0]


def in_head(head, keep):
    """[G, N] bool: what a head keeps, beside others that keep all."""
    flags = torch.ones(GROUPS, len(keep), dtype=torch.bool)
    flags[head] = keep
    return flags


def read(queries, keys, values, scale=SIZE**-0.5):
    return (queries @ keys.mT * scale).softmax(-1) @ values


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_heads_share_one_budget(lengths, share, sure, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n, generator=generator) for n in lengths]
    total = max(len(lengths), int(share * sum(lengths)))
    keep = shared_choice(torch.cat(scores), lengths, total, sure).split(lengths)
    assert [len(k) for k in keep] == lengths
    assert sum(int(k.sum()) for k in keep) == total
    least = max(int(sure * total / len(lengths)), 1)
    for score, kept in zip(scores, keep, strict=True):
        assert int(kept.sum()) >= min(least, len(score))
        assert not bool(kept.any()) or kept.all() or float(score[kept].min()) >= float(score[~kept].max())
    if sure == 0 and total > len(lengths):  # beyond the one that each is sure of, one threshold for all
        ranked = torch.cat([s.sort(descending=True).values[1:] for s in scores]).sort(descending=True).values
        extra = torch.cat([s[k].sort(descending=True).values[1:] for s, k in zip(scores, keep, strict=True)])
        torch.testing.assert_close(extra.sort(descending=True).values, ranked[: total - len(lengths)])


def test_what_is_promised_stays_before_what_heads_are_sure_of():
    crowded, quiet = torch.rand(30) * 0.1, torch.rand(30) * 0.9
    crowded[:16] += 1  # pictures
    for sure in (0.0, 0.5, 1.0):
        keep = shared_choice(torch.cat([crowded, quiet]), [30, 30], 20, sure).split(30)
        assert bool(keep[0][:16].all()) and sum(int(k.sum()) for k in keep) == 20
        assert int(keep[1].sum()) >= (4 if sure == 1 else 1)


@pytest.mark.parametrize("rows", [6, 60], ids=["fewer queries than entries", "more"])
@pytest.mark.parametrize("held", [False, True], ids=["free", "sink held"])
def test_values_are_the_least_squares_under_the_ridge(rows, held):
    generator = torch.Generator().manual_seed(3)
    queries, keys, values = (torch.randn(n, SIZE, generator=generator) for n in (rows, 30, 30))
    keep = torch.arange(30) % 3 > 0
    movable = torch.ones(20, dtype=torch.bool)
    movable[0] = not held
    found, mass = fitted_alone(queries, keys, values, keep, movable, SIZE**-0.5)
    shares = (queries @ keys[keep].mT * SIZE**-0.5 + mass).softmax(-1)
    missing = read(queries, keys, values) - shares @ values[keep]
    shares = shares * movable
    ridge = RIDGE * shares.square().sum() / 20
    stacked = torch.cat([shares.double(), ridge.double().sqrt() * torch.eye(20).double()])
    change = torch.linalg.lstsq(stacked, torch.cat([missing, torch.zeros(20, SIZE)]).double()).solution
    torch.testing.assert_close(found.double(), values[keep] + change, atol=1e-4, rtol=1e-4)
    if held:
        assert torch.equal(found[0], values[keep][0]) and float(mass[0]) == 0


@pytest.mark.parametrize(("rows", "keep_one_in"), [(12, 2), (60, 2), (60, 5)])
def test_masses_come_close_to_the_best_positive_ones(rows, keep_one_in):
    generator = torch.Generator().manual_seed(4)
    shares = (3 * torch.randn(rows, 30, generator=generator)).softmax(-1)[:, ::keep_one_in]
    ridge = RIDGE * shares.square().sum() / shares.shape[1]

    def loss(factor):
        return float((shares @ factor - 1).square().sum() + ridge * (factor - 1).square().sum())

    best = torch.ones(shares.shape[1])
    for _ in range(20_000):  # plain projected gradients, until nothing moves
        gradient = shares.mT @ (shares @ best - 1) + ridge * (best - 1)
        best = (best - gradient / (shares.square().sum() + ridge)).clamp(1 / MOST, MOST)
    found = fitted_masses(shares.mT[None], torch.tensor([shares.shape[1]]))[0]
    assert loss(found) <= loss(best) + 0.05 * (loss(torch.ones_like(best)) - loss(best))
    assert loss(found) < 0.9 * loss(torch.ones_like(best))


def test_fitting_brings_replayed_readings_closer_and_touches_nothing_else():
    entries, stretch = made(4 + 20), looked(20, rows=40)
    keys, before = entries.keys[0, 1, 4:], entries.values[0, 1]
    keep = torch.arange(20) % 2 == 0
    values, mass = fitted_heads(entries, [stretch], in_head(1, torch.cat([torch.ones(4).bool(), keep])))
    assert torch.equal(values[0], entries.values[0, 0]) and not bool(mass[0].any())
    values, mass = values[1], mass[1]
    queries = stretch.queries.view(GROUPS, -1, SIZE)[1]
    want = read(queries, keys, before[4:])
    logits = queries @ keys[keep].mT * SIZE**-0.5
    found = (logits + mass[4:][keep]).softmax(-1) @ values[4:][keep]
    assert float((found - want).norm()) < 0.7 * float((read(queries, keys[keep], before[4:][keep]) - want).norm())
    of_all = (queries @ keys.mT * SIZE**-0.5).logsumexp(-1)
    missing = [float((kept.logsumexp(-1) - of_all).abs().mean()) for kept in (logits, logits + mass[4:][keep])]
    assert missing[1] < 0.5 * missing[0]
    assert torch.equal(values[:4], before[:4]) and not bool(mass[:4].any())


@pytest.mark.parametrize("older", [0, 5])
@pytest.mark.parametrize("weighed", [False, True])
def test_stretches_are_fitted_where_something_left_them(older, weighed):
    """Two stretches behind older entries; nothing leaves the first in head 0, nor the second in head 1."""
    entries = made(older + 24)
    entries = replace(entries, log_mass=torch.rand(1, GROUPS, older + 24)) if weighed else entries
    first, second = (looked(count, first=start, seed=start) for start, count in ((0, 14), (14, 10)))
    keep = torch.ones(GROUPS, older + 24, dtype=torch.bool)
    keep[0, older + 14 :: 2] = keep[1, older : older + 14 : 2] = False
    whole, (held,) = entries.values.clone(), [entries.select_heads(keep[None])]
    (found,) = fitted_together([entries], [[first, second]], [keep.flatten()], [held])
    wanted = held.weighed()
    values, mass = wanted.values.clone(), wanted.log_mass.clone()
    for head, stretch in ((0, second), (1, first)):
        own = torch.ones_like(keep)
        rows = slice(older + stretch.first, older + stretch.last)
        own[head, rows] = keep[head, rows]
        moved, weighs = fitted_heads(entries, [first, second], own)
        into = int(keep[:head].sum()) + int(keep[head, : rows.start].sum())
        into = slice(into, into + int(keep[head, rows].sum()))
        values[0, 0, into], mass[0, 0, into] = moved[head, rows][own[head, rows]], weighs[head, rows][own[head, rows]]
    assert torch.equal(found.values, values) and torch.equal(found.log_mass, mass)
    assert not torch.equal(found.values, held.values) and torch.equal(entries.values, whole)
    all_of_them = entries.select_heads(torch.ones_like(keep)[None])
    (same,) = fitted_together([entries], [[first, second]], [torch.ones_like(keep).flatten()], [all_of_them])
    assert same is all_of_them


def test_what_entries_weigh_counts_as_if_their_keys_said_it():
    generator = torch.Generator().manual_seed(6)
    queries, keys, values = (torch.randn(n, SIZE, generator=generator) for n in (40, 30, 30))
    log_mass, keep = torch.randn(30, generator=generator), torch.arange(30) % 3 > 0
    found, mass = fitted_alone(queries, keys, values, keep, keep[keep], 0.5, log_mass)
    told, said = torch.cat([queries, torch.full((40, 1), 2.0)], 1), torch.cat([keys, log_mass[:, None]], 1)
    wanted, beyond = fitted_alone(told, said, values, keep, keep[keep], 0.5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mass, log_mass[keep] + beyond, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighed", [False, True])
def test_what_came_before_a_stretch_is_read_and_not_changed(weighed):
    entries, stretch = made(20), looked(20, rows=40)
    generator = torch.Generator().manual_seed(7)
    log_mass = torch.rand(GROUPS, 6, generator=generator) if weighed else None
    earlier = EarlierEntries(*(torch.randn(GROUPS, 6, SIZE, generator=generator) for _ in range(2)), log_mass)
    keep = torch.arange(20) % 2 == 0
    keys, before = (
        torch.cat([a[1], b[0, 1]]) for a, b in ((earlier.keys, entries.keys), (earlier.values, entries.values))
    )
    mass = torch.zeros(26) if log_mass is None else torch.cat([log_mass[1], torch.zeros(20)])
    found, found_mass = fitted_heads(entries, [replace(stretch, earlier=earlier)], in_head(1, keep))
    stays, movable = torch.cat([torch.ones(6).bool(), keep]), torch.cat([torch.zeros(6).bool(), keep[keep]])
    queries = stretch.queries.view(GROUPS, -1, SIZE)[1]
    values, masses = fitted_alone(queries, keys, before, stays, movable, SIZE**-0.5, mass)
    torch.testing.assert_close(found[1][keep], values[6:])
    torch.testing.assert_close(found_mass[1][keep], masses[6:])


@pytest.mark.parametrize("numbers", [1, 1 << 20], ids=["one by one", "together"])
def test_heads_of_all_layers_are_fitted_as_each_is_alone(numbers, monkeypatch):
    """Of stretches of different lengths, some behind other entries, and keeping different numbers."""
    monkeypatch.setattr(replay_parts, "WEIGHTS_ON_CPU", numbers)
    generator = torch.Generator().manual_seed(8)
    sizes, layers, stretches, keep = (20, 19), [], [], []
    for n in range(3):
        entries, earlier = made(3 + sum(sizes), seed=n), None
        own = []
        for first, size in zip((0, sizes[0]), sizes, strict=True):
            own.append(replace(looked(size, first, seed=first + n), earlier=earlier))
            mass = torch.tensor([[0.0, 0.3], [0.0, NOTHING]]) if n == 2 else None
            earlier = EarlierEntries(*(torch.randn(GROUPS, 2, SIZE, generator=generator) for _ in range(2)), mass)
        layers, stretches = [*layers, entries], [*stretches, own]
        keep.append(torch.rand(GROUPS, 3 + sum(sizes), generator=generator) < torch.tensor([[0.8], [0.3]]))
    kept = [entries.select_heads(own[None]) for entries, own in zip(layers, keep, strict=True)]
    found = fitted_together(layers, stretches, [own.flatten() for own in keep], kept)
    for entries, looks, own, held, fit in zip(layers, stretches, keep, kept, found, strict=True):
        assert torch.equal(fit.keys, held.keys) and fit.lengths == held.lengths
        for head, part in enumerate(fit.heads()):
            values, mass = entries.values[0, head].clone(), torch.zeros(own.shape[1])
            for look in looks:
                rows = slice(3 + look.first, 3 + look.last)
                flags, before = own[head, rows], look.earlier
                ahead = 0 if before is None else 2
                keys, read = entries.keys[0, head, rows], entries.values[0, head, rows]
                if before is not None:
                    keys, read = torch.cat([before.keys[head], keys]), torch.cat([before.values[head], read])
                weighs = (
                    None if before is None or before.log_mass is None else pad(before.log_mass[head], (0, len(flags)))
                )
                asks = look.queries.view(GROUPS, -1, SIZE)[head]
                stays, moves = pad(flags, (ahead, 0), value=True), pad(flags[flags], (ahead, 0), value=False)
                told, heavy = fitted_alone(asks, keys, read, stays, moves, SIZE**-0.5, weighs)
                values[rows][flags], mass[rows][flags] = told[ahead:], heavy[ahead:]
            torch.testing.assert_close(part.values[0, 0], values[own[head]], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(part.log_mass[0, 0], mass[own[head]], atol=1e-5, rtol=1e-4)


def test_a_head_of_half_precision_keeps_its_type():
    entries, stretch = made(20), looked(20)
    entries = replace(entries, keys=entries.keys.bfloat16(), values=entries.values.bfloat16())
    keep = torch.arange(20) % 2 == 0
    half = replace(stretch, queries=stretch.queries.bfloat16())
    values, mass = fitted_heads(entries, [half], in_head(0, keep))
    assert values.dtype == torch.bfloat16 and bool(values.isfinite().all())
    assert mass.dtype == torch.float32 and bool(mass.isfinite().all())


def test_large_products_in_half_precision_lose_nothing():
    entries, stretch = made(20), looked(20)
    offset = torch.zeros(SIZE)
    offset[0] = 300.0  # their products are beyond float16, and alike for all entries
    keep = in_head(0, torch.arange(20) % 2 == 0)
    queries = torch.cat([stretch.queries[..., 1:], offset[:1].expand(*stretch.queries.shape[:2], 1)], -1)
    keys = torch.cat([entries.keys[..., 1:], offset[:1].expand(*entries.keys.shape[:3], 1)], -1)
    plain = replace(stretch, queries=torch.cat([stretch.queries[..., 1:], torch.zeros_like(queries[..., :1])], -1))
    level = replace(entries, keys=torch.cat([entries.keys[..., 1:], torch.zeros_like(keys[..., :1])], -1))
    wanted, _ = fitted_heads(level, [plain], keep)
    halves = replace(entries, keys=keys.half(), values=entries.values.half())
    found, _ = fitted_heads(halves, [replace(stretch, queries=queries.half())], keep)
    torch.testing.assert_close(found.float(), wanted, atol=2e-2, rtol=2e-2)


def test_every_picture_leaves_an_entry_in_each_layer():
    peaks = torch.rand(GROUPS, 12)
    flags = torch.zeros(12, dtype=torch.bool)
    flags[2:5] = flags[7:12] = True
    found = one_for_each(peaks, run_numbers([flags]))
    assert int(found.sum()) == 2
    for first, last in ((2, 5), (7, 12)):
        head, place = found[:, first:last].nonzero()[0].tolist()
        assert float(peaks[head, first + place]) == float(peaks[:, first:last].max())
    assert (
        run_numbers([flags, flags.flip(0)]).tolist()
        == [-1] * 2 + [0] * 3 + [-1] * 2 + [1] * 5 + [2] * 5 + [-1] * 2 + [3] * 3 + [-1] * 2
    )  # no run goes on in the next layer


def compressed(technique, layers, stretches, seen):
    return technique.compress_replayed(layers, stretches, seen)


@pytest.mark.parametrize("fit", [0, 64])
def test_the_budget_is_kept_exactly_and_shared_by_score(fit):
    layers = [made(40, seed=n, visual=[(3, 20), (25, 40)]) for n in range(3)]
    stretches = [[looked(40, seed=n)] for n in range(3)]
    stretches[1][0].peaks.mul_(0.001)  # nobody asks the second layer
    kept = compressed(Replay(0.3, fit=fit), layers, stretches, [40] * 3)
    assert sum(entries.total for entries in kept) == int(0.3 * 120 * GROUPS)
    assert all(entries.is_packed for entries in kept)
    even = 0.3 * 40
    assert max(kept[1].lengths) <= 2 * int(0.25 * even) + 2 < min(kept[0].lengths)
    for entries, whole in zip(kept, layers, strict=True):
        for head, of_whole in zip(entries.heads(), whole.heads(), strict=True):
            assert torch.equal(head.keys[0, 0, 0], of_whole.keys[0, 0, 0])  # the first entry
        assert entries.is_visual is not None
        found = torch.cat([x.keys[0, 0] for x in entries.heads()])
        for first, last in ((3, 20), (25, 40)):
            own = whole.keys[0, :, first:last].flatten(0, 1)
            assert bool((found[:, None] == own).all(-1).any())


def test_what_was_kept_competes_with_what_is_new_by_its_score():
    technique = Replay(budget=20, fit=0)
    first = compressed(technique, [made(60)], [[looked(60)]], [60])[0]
    assert first.total == 20 * GROUPS
    old_scores = [float(head.score.min()) for head in first.heads()]
    weak, strong = (looked(30, seed=5), looked(30, seed=5))
    weak.peaks.mul_(min(old_scores) / 2)
    strong.peaks.add_(0.5).clamp_max_(1.0)
    both = first.extend(made(30, seed=9))
    after_weak = compressed(Replay(budget=20, fit=0, sure=0), [both], [[weak]], [90])[0]
    assert sum(int((h.score > min(old_scores) / 2).sum()) for h in after_weak.heads()) == 20 * GROUPS
    after_strong = compressed(Replay(budget=20, fit=0, sure=0), [both], [[strong]], [90])[0]
    assert sum(int((h.score <= 0.5).sum()) for h in after_strong.heads()) == 0
    assert after_strong.total == 20 * GROUPS


def test_generated_tokens_stay_in_the_same_share_the_latest_first():
    """No replay has judged them: they take the others' scores by age."""
    held = compressed(Replay(budget=40, fit=0, sure=0), [made(80)], [[looked(80)]], [80])[0]
    spoken = made(20, seed=4)
    both = held.extend(spoken).extend(made(20, seed=5))
    kept = compressed(Replay(budget=40, fit=0, sure=0), [both], [[looked(20, seed=6)]], [120])[0]
    assert kept.total == 40 * GROUPS
    stayed = [
        [bool((head.keys[0, 0] == key).all(-1).any()) for key in spoken.keys[0, n]]
        for n, head in enumerate(kept.heads())
    ]
    for own in stayed:
        assert 4 <= sum(own) <= 16 and own == sorted(own)


def test_what_nobody_can_judge_leaves_no_layer_empty():
    layers, stretches = [made(30), made(30, seed=1)], [[looked(30)], [looked(30)]]
    stretches[0][0].peaks.fill_(torch.nan)
    kept = compressed(Replay(0.1, fit=0), layers, stretches, [30] * 2)
    assert [entries.total > 0 for entries in kept] == [True] * 2


def test_a_budget_above_everything_changes_nothing():
    entries = made(30)
    kept = compressed(Replay(1.0), [entries], [[looked(30)]], [30])[0]
    assert torch.equal(kept.keys, entries.keys) and torch.equal(kept.values, entries.values)


@pytest.mark.parametrize(
    "setting",
    [
        {"ratio": 0.0}, {"ratio": 1.5}, {"ratio": "0.3"}, {"ratio": float("nan")}, {"budget": 0}, {"budget": 2.5},
        {"sure": -0.1}, {"sure": 1.1}, {"fit": -1}, {"fit": 1.5}, {"stretch": 3}, {"stretch": None},
        {"text": "yes"}, {"fast": 1}, {"alike": 2.0},
        {"alike": -0.5},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(setting):
    with pytest.raises(ConfigError, match=f"Replay.*{next(iter(setting))}"):
        Replay(**setting)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_half_precision_holds_three_per_cent_beside_keys_and_values(ratio):
    """Of heads of 64, at rest: scores in two bytes, kinds, log-masses where entries were fitted, and spare room."""
    wide = made(1200)
    keys, values = torch.randn(2, 1, GROUPS, 1200, 64, dtype=torch.bfloat16)
    stretch = replace(looked(1200), queries=torch.randn(GROUPS * REPEAT, 20, 64, dtype=torch.bfloat16))
    kept = compressed(Replay(ratio), [replace(wide, keys=keys, values=values)], [[stretch]], [1200])[0]
    cache = CompressedCache()
    cache.headroom = 0
    layer = layer_of([kept], [1200], cache)
    assert layer.allocated_bytes <= 1.03 * (kept.keys.nbytes + kept.values.nbytes)


def test_scores_at_rest_promise_what_they_promised():
    """Rounded to two bytes, none rises to where entries are promised, and what was judged stays judged."""
    score = torch.cat(
        [1 - 10.0 ** -torch.arange(1.0, 8), torch.rand(50), torch.tensor([0.0, 1e-30, 1.0, 1.001, 2.999])]
    )
    score = score.clamp_max(1 - 2**-20).where(score < FOR_PICTURE, score)[None, None]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        keys = torch.zeros(1, 1, score.shape[2], 4, dtype=dtype)
        held = at_rest(CacheEntries(keys, keys, score=score)).score
        assert torch.equal(held >= FOR_PICTURE, score >= FOR_PICTURE) and torch.equal(held == 0, score == 0)
        torch.testing.assert_close(held.float(), score, rtol=2**-8, atol=0)
        order = score[0, 0].argsort()
        assert bool((held[0, 0, order].diff() >= 0).all())


def test_later_passes_take_scores_in_two_bytes():
    def half(entries):
        return replace(entries, keys=entries.keys.bfloat16(), values=entries.values.bfloat16())

    technique, halves, wholes = Replay(budget=20, fit=0), None, None
    for turn in range(3):
        new, asked = made(60, seed=turn, visual=[(3, 20)]), looked(60, seed=turn)
        seen = [60 * (turn + 1)]
        wholes = compressed(technique, [new if wholes is None else wholes.extend(new)], [[asked]], seen)[0]
        halves = compressed(technique, [half(new) if halves is None else halves.extend(half(new))], [[asked]], seen)[0]
        assert halves.score.dtype == torch.bfloat16 and wholes.score.dtype == torch.float32
        assert halves.head_lengths == wholes.head_lengths
        assert torch.equal(halves.keys, wholes.keys.bfloat16())
