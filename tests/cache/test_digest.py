"""Digest: budgets shared out by need, entries spread over each picture, what is alike joined; through every door."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mminfer import AIMMerge, AIMPrune, ConfigError, Engine, InferenceConfig, OperatorSkip, patched
from mminfer.bench.contexts import made_contexts
from mminfer.cache import digest_at_once, digest_pieces
from mminfer.cache.digest import Digest
from mminfer.cache.digest_pieces import digested
from mminfer.cache.digest_rules import PIECE, Piece, Rule, farthest_first, pieces_of, runs_of, share_out
from mminfer.cache.random_evict import RandomEvict
from mminfer.forward.kv_cache import CACHE_NAME
from mminfer.forward.room import HEADROOM
from mminfer.metrics.fidelity import kl_divergence
from mminfer.technique import CacheEntries
from tests.tiny import FAMILIES, IMAGE, LAYERS, fitting, refusal, skip_if_refused, tiny_inputs, tiny_model, tiny_rows
from tests.views import layer_view


def clustered(entries, rows, count, **rule):
    """Places, keys, values and sizes of `count` of these rows."""
    stand_for = torch.ones(len(rows)) if entries.size is None else entries.size[0, 0, rows]
    each = rule.pop("each", False)
    numbered = replace(entries, source=torch.arange(len(entries)).expand(entries.keys.shape[:3]))
    (left,) = digested([numbered], [pieces_of(rows, stand_for, count, each)], Rule(**rule))
    return left.source, left.keys, left.values, left.size


def made(pattern, groups=2, size=4, seed=0):
    """Random entries; pattern: lengths of text and visual runs in turn."""
    flags = torch.cat([torch.full((n,), bool(i % 2)) for i, n in enumerate(pattern)])
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, groups, len(flags), size, generator=generator) for _ in range(2))
    heads = (1, groups, len(flags))
    return CacheEntries(
        keys,
        values,
        flags.expand(heads),
        size=torch.ones(heads),
        source=torch.arange(len(flags)).expand(heads),
    )


def test_runs():
    flags = torch.tensor([1, 1, 0, 0, 1, 0, 1, 1, 1]).bool()
    assert runs_of(flags).tolist() == [[0, 2], [4, 5], [6, 9]]
    assert runs_of(~flags).tolist() == [[2, 4], [5, 6]]
    assert runs_of(flags[2:4]).tolist() == []


@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 10)), min_size=1, max_size=8), st.floats(0, 1), st.booleans()
)
@settings(max_examples=200, deadline=None)
def test_shares_add_up_and_keep_their_bounds(parts, share, at_least):
    most, weights = [p[0] for p in parts], [p[1] for p in parts]
    total = int(share * sum(most))
    least = [min(1, m) for m in most] if at_least and sum(min(1, m) for m in most) <= total else None
    given_ = share_out(most, weights, total, least)
    assert sum(given_) == total
    assert all(0 <= g <= m for g, m in zip(given_, most, strict=True))
    assert least is None or all(g >= n for g, n in zip(given_, least, strict=True))


def test_shares_follow_the_weights():
    assert share_out([100] * 3, [1, 2, 5], 80) == [10, 20, 50]
    assert share_out([100, 100, 30], [1, 1, 8], 80) == [25, 25, 30]  # what one cannot take goes to the others
    assert share_out([9, 9], [0, 0], 6) == [3, 3]


def test_the_farthest_come_first():
    x = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [-1, 0], [0.1, 1]]), dim=-1)
    assert farthest_first(x @ x.mT, 1).tolist() == [3]
    assert farthest_first(x @ x.mT, 2).tolist() == [3, 0]
    same = torch.ones(6, 6)
    assert sorted(farthest_first(same, 6).tolist()) == list(range(6))  # none twice, even among equals


@pytest.mark.parametrize("spread", ["farthest", "even"])
@pytest.mark.parametrize(
    "pattern", [(3, 256, 2, 4, 2, 256, 2, 4, 3), (1, 1, 1, 400, 1, 1), (5, 129, 1, 1, 1, 1, 1, 1, 9)]
)
def test_small_pictures_keep_something_beside_large_ones(pattern, spread):
    entries = made(pattern)
    pictures = runs_of(entries.is_visual[0, 0]).tolist()
    layers = [entries, made(pattern, seed=1), made(pattern, seed=2)]
    for ratio in (0.06, 0.1, 0.3):
        if ratio * len(entries) < 4 * len(pictures):
            continue  # not enough for all
        technique = Digest(ratio=ratio, recent=0, spread=spread)
        for kept in technique.compress_layers(layers, [0.0, 0.1, 5.0], [len(entries)] * 3):
            for first, end in pictures:
                sources = kept.source[0]  # [G, S]
                assert ((sources >= first) & (sources < end)).any(-1).all(), (ratio, first)


@pytest.mark.parametrize(("most", "cosines"), [(1 << 27, 1 << 26), (1, 1)], ids=["together", "one by one"])
def test_a_gpu_makes_of_all_layers_at_once_what_a_cpu_does(most, cosines, monkeypatch):
    """Pieces of several lengths; layers of several; one that keeps all it has, one that loses some by being in none."""
    layers = [made([3, 30, 2, 30, 1, 9 + n], seed=n) for n in range(3)]
    layers[2] = replace(layers[2], size=1 + torch.rand(layers[2].size.shape))
    kept = ((30, 7, 4, 2), (5, 20, 3, 3), (23, 1, 9, 1))
    pieces = [[Piece(*x) for x in zip((35, 3, 66, 0), (30, 30, 9, 3), own, strict=True)] for own in kept]
    pieces[2][0] = Piece(35, 24, 23)
    pieces[1] = [Piece(0, 3, 3), Piece(3, 30, 30)]
    wanted = digested(layers, pieces, Rule())
    monkeypatch.setattr(digest_pieces, "AT_ONCE_ON", {"cpu"})
    monkeypatch.setattr(digest_at_once, "MOST_BYTES", most)
    monkeypatch.setattr(digest_at_once, "COSINES", cosines)
    for found, own in zip(digested(layers, pieces, Rule()), wanted, strict=True):
        for name in ("keys", "values", "size", "source", "is_visual"):
            torch.testing.assert_close(getattr(found, name), getattr(own, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cosines", [1, 1 << 30], ids=["one by one", "together"])
@pytest.mark.parametrize("spread", ["farthest", "even"])
@pytest.mark.parametrize("join", [False, True])
def test_pieces_of_all_layers_become_fewer_as_each_does_alone(cosines, spread, join, monkeypatch):
    """Pieces of one length that keep different numbers, some all they have, and one that loses all."""
    monkeypatch.setattr(digest_pieces, "COSINES_ON_CPU", cosines)
    kept = ((30, 7, 4), (5, 20, 3), (29, 1, 6))
    layers = [made([3, 30, 2, 30, 1, 9], seed=n) for n in range(3)]
    pieces = [[Piece(*x) for x in zip((3, 35, 66), (30, 30, 9), own, strict=True)] for own in kept]
    pieces[1].append(Piece(0, 3, 3))
    rule = Rule(spread, join)
    for entries, own, found in zip(layers, pieces, digested(layers, pieces, rule), strict=True):
        alone = [digested([entries], [[piece]], rule)[0] for piece in sorted(own)]
        for name in ("keys", "values", "size", "source", "is_visual"):
            wanted = torch.cat([getattr(x, name) for x in alone], 2)
            torch.testing.assert_close(getattr(found, name), wanted, atol=1e-5, rtol=1e-5)
        assert bool((found.source.diff() > 0).all())


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_every_run_keeps_something_of_what_is_enough_for_all(lengths, share):
    entries = made([n for length in lengths for n in (1, length)])
    rows = entries.is_visual[0, 0].nonzero()[:, 0]
    count = len(lengths) + int(share * (len(rows) - len(lengths)))
    place, _, _, size = clustered(entries, rows, count, each=True)
    assert place.shape[-1] == count
    if count >= sum(-(-length // PIECE) for length in lengths):  # and so does every piece of a long one
        assert size.sum(-1).tolist() == [[len(rows)] * 2]
    for first, end in runs_of(entries.is_visual[0, 0]).tolist():
        assert ((place >= first) & (place < end)).any(-1).all()


@given(
    st.lists(st.tuples(st.sampled_from([1, 3, 40]), st.sampled_from([1, 4, 130])), min_size=1, max_size=6),
    st.integers(2, 20),
    st.sampled_from([0.01, 0.5, 1.0]),
    st.sampled_from([0, 5, 64]),
    st.lists(st.sampled_from([0.0, 1e-9, 0.1, 50.0]), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_no_picture_starves_where_there_is_one_entry_for_each(pairs, spare, text_share, recent, demands):
    """Whatever text may take, however much stays as it is behind the pictures, and whichever layer needs most."""
    layers = [made([n for pair in pairs for n in pair] + [70], seed=n) for n in range(len(demands))]
    budget = len(pairs) + spare  # one for each, one for older text, and one for what is behind
    technique = Digest(budget=budget, text_share=text_share, recent=recent)
    kept = technique.compress_layers(layers, demands, [len(entries) for entries in layers])
    assert sum(map(len, kept)) == min(budget, len(layers[0])) * len(layers)
    for entries in kept:
        for first, end in runs_of(layers[0].is_visual[0, 0]).tolist():
            assert ((entries.source[0] >= first) & (entries.source[0] < end)).any(-1).all()


def test_layers_share_the_pictures_where_there_is_not_one_entry_for_each():
    layers = [made([1, 4, 1, 4, 1, 4, 70], seed=n) for n in range(3)]
    kept = Digest(budget=3, recent=0).compress_layers(layers, [0.0, 50.0, 0.1], [84] * 3)
    assert [int(entries.is_visual[0, 0].sum()) for entries in kept] == [2, 2, 2]


def test_what_is_alike_becomes_one_mean_by_size():
    entries = made([0, 4])
    two = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]])
    keys = two[[0, 1, 0, 1]].expand(1, 2, 4, 4)
    values = keys + 0.01 * torch.arange(4.0)[:, None]
    sized = CacheEntries(keys, values, entries.is_visual, size=torch.tensor([3.0, 1, 1, 1]).expand(1, 2, 4))
    place, k, v, size = clustered(sized, torch.arange(4), 2)
    for head in range(2):
        by_place = {p % 2: i for i, p in enumerate(place[0, head].tolist())}
        assert set(by_place) == {0, 1}
        assert size[0, head, by_place[0]] == 4 and size[0, head, by_place[1]] == 2  # a size of 0 counts as one
        torch.testing.assert_close(k[0, head, by_place[0]], two[0])
        torch.testing.assert_close(v[0, head, by_place[0]], (3 * values[0, head, 0] + values[0, head, 2]) / 4)


@pytest.mark.parametrize(("count", "stand_for"), [(1, 100), (3, 300), (20, 320), (299, 320), (300, 320)])
def test_runs_share_by_length_and_long_ones_are_cut(count, stand_for):
    """The long run is cut into three; where there is not one entry for each piece, the rest is in nothing."""
    entries = made([10, 300, 5, 20, 4])
    rows = entries.is_visual[0, 0].nonzero()[:, 0]
    place, k, _, size = clustered(entries, rows, count)
    assert place.shape == (1, 2, count) and k.shape == (1, 2, count, 4)
    torch.testing.assert_close(size.sum(-1), torch.full((1, 2), float(stand_for)))
    assert all(len(set(p.tolist())) == count for p in place[0])
    long = ((place >= 10) & (place < 310)).sum(-1)
    assert (long.float() / count - 300 / 320).abs().max() < 0.07
    assert PIECE < 300


def test_without_joining_what_stays_is_as_it_was():
    entries = made([4, 40, 4])
    rows = entries.is_visual[0, 0].nonzero()[:, 0]
    for spread in ("farthest", "even"):
        place, k, v, size = clustered(entries, rows, 8, spread=spread, join=False)
        index = place[..., None].expand(*place.shape, 4)
        assert torch.equal(k, entries.keys.gather(2, index)) and torch.equal(v, entries.values.gather(2, index))
        assert (size == 5).all()
        assert spread == "farthest" or (place[0, 0].diff() == 5).all()


def test_what_was_digested_before_does_not_shrink_beside_what_is_new():
    technique, kept = Digest(0.25), []
    for chunk in range(4):
        new = made([4, 40], seed=chunk)
        entries = new if not kept else kept[0].extend(new)
        kept = technique.compress_layers([entries], [1.0], [44 * (chunk + 1)])
    entries = kept[0]
    assert len(entries) == 44
    runs = runs_of(entries.is_visual[0, 0])
    assert len(runs) == 4
    assert int((runs[:, 1] - runs[:, 0]).min()) >= int((runs[:, 1] - runs[:, 0]).max()) - 1
    assert float(entries.size[0, 0].sum()) == 4 * 44  # everything is in something


def test_layers_get_detail_where_it_is_read():
    layers = [made([6, 30, 4, 30, 6], seed=n) for n in range(3)]
    kept = Digest(0.5).compress_layers(layers, [0.1, 0.1, 0.8], [76] * 3)
    visual = [int(e.is_visual[0, 0].sum()) for e in kept]
    assert sum(map(len, kept)) == 3 * 38 and visual[0] == visual[1] < visual[2]
    for entries, whole in zip(kept, layers, strict=True):
        assert torch.equal(entries.keys[:, :, :6], whole.keys[:, :, :6])  # text stays as it is
        assert (entries.source.diff() > 0).all()  # and everything in its order
        held = entries.is_visual[0, 0].nonzero()[:, 0]
        assert len(runs_of(entries.is_visual[0, 0])) == 2 and len(held) >= 2  # no picture starves


@pytest.mark.parametrize(("contrast", "visual"), [(0.0, [50, 50]), (1.0, [34, 66]), (2.0, [21, 79])])
def test_layers_share_by_a_power_of_their_need(contrast, visual):
    layers = [made([2, 100], seed=n) for n in range(2)]
    kept = Digest(budget=52, recent=0, contrast=contrast).compress_layers(layers, [0.3, 0.6], [102] * 2)
    assert [int(entries.is_visual[0, 0].sum()) for entries in kept] == visual
    assert Digest().contrast == 2


def test_text_is_digested_where_it_is_too_much():
    layers = [made([60, 10, 20], seed=n) for n in range(2)]
    kept = Digest(0.2, text_share=0.5, recent=0).compress_layers(layers, [1.0, 1.0], [90] * 2)
    assert [len(e) for e in kept] == [18, 18]
    assert [int((~e.is_visual[0, 0]).sum()) for e in kept] == [9, 9]
    alone = Digest(0.2).compress_layers([made([60])] * 2, [0.0, 0.0], [60] * 2)
    assert [len(e) for e in alone] == [12, 12]


def test_no_layer_is_left_empty():
    """A chunk of a picture alone, and less to keep than there are layers."""
    kept = Digest(0.05).compress_layers([made([0, 10], seed=n) for n in range(4)], [1.0] * 4, [10] * 4)
    assert all(len(entries) >= 1 for entries in kept)


def test_what_was_asked_last_stays_as_it_is():
    layers = [made([30, 40, 12], seed=n) for n in range(2)]
    for entries, whole in zip(Digest(0.3).compress_layers(layers, [1.0, 1.0], [82] * 2), layers, strict=True):
        assert torch.equal(entries.keys[:, :, -12:], whole.keys[:, :, -12:])
    tight = Digest(0.1).compress_layers(layers, [1.0, 1.0], [82] * 2)  # no more of it than half of the budget
    assert [int((entries.source[0, 0] >= 70).sum()) for entries in tight] == [4, 4]


def test_demand_is_detail_that_text_reads():
    entries = made([4, 20, 4])
    q = torch.randn(1, 4, 28, 4, generator=torch.Generator().manual_seed(1))
    technique = Digest()
    same = replace(entries, keys=entries.keys.clone(), values=entries.values.clone())
    same.keys[:, :, 4:24], same.values[:, :, 4:24] = same.keys[:, :, 4:5], same.values[:, :, 4:5]
    assert technique.layer_demand(layer_view(q, same, scale=0.5)) < 1e-6  # equal ones are their mean
    assert technique.layer_demand(layer_view(q, entries, scale=0.5)) > 1e-3
    sharper = technique.layer_demand(layer_view(8 * q, entries, scale=0.5))
    assert sharper > technique.layer_demand(layer_view(q, entries, scale=0.5))
    assert technique.layer_demand(layer_view(q[:, :, :0], entries, query_index=torch.empty(0).long(), scale=0.5)) == 0
    assert technique.layer_demand(layer_view(q, made([28]), scale=0.5)) == 0


def need_query_by_query(q, entries, pictures, asking, scale):
    """The rule, one query and one head after the other, in float64.

    Args:
        pictures: first and end of each.
        asking: the queries that count, which are the last entries.
    """
    keys, values, flags = entries.keys[0].double(), entries.values[0].double(), entries.is_visual[0, 0]
    group, changes, sizes = q.shape[1] // keys.shape[0], [], []
    for row in asking:
        change, whole = [], []
        for head, query in enumerate(q[0, :, row].double()):
            k, v = keys[head // group], values[head // group]
            exact = (k @ query * scale).softmax(0) @ v
            parts = [(k[i], v[i], 1) for i in range(len(flags)) if not flags[i]]
            parts += [(k[a:b].mean(0), v[a:b].mean(0), b - a) for a, b in pictures]
            logits = torch.stack([k @ query * scale + math.log(n) for k, _, n in parts])
            pooled = logits.softmax(0) @ torch.stack([v for _, v, _ in parts])
            change.append(exact - pooled)
            whole.append(exact)
        changes.append(torch.cat(change))
        sizes.append(torch.cat(whole).norm())
    common = torch.stack(changes).mean(0)
    shares = [float((change - common).norm() / size) for change, size in zip(changes, sizes, strict=True)]
    return sorted(shares)[(len(shares) - 1) // 4]


@pytest.mark.parametrize("queries", [64, 5])
def test_the_need_is_the_first_quartile_of_what_a_mean_would_change(queries):
    """Of nine text queries, or of five of them: the first quartile is one of them, the third or the second."""
    entries = made([4, 20, 3, 12, 2])
    q = torch.randn(1, 4, 41, 4, generator=torch.Generator().manual_seed(1))
    text = [0, 1, 2, 3, 24, 25, 26, 39, 40]
    asking = text if queries > 9 else text[::2]
    wanted = need_query_by_query(q, entries, [(4, 24), (27, 39)], asking, 0.7)
    assert Digest(queries=queries).layer_demand(layer_view(q, entries, scale=0.7)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_budget(family):
    config = InferenceConfig(cache=Digest(0.4))
    skip_if_refused(family, config)
    prompts = [[8, IMAGE, 5, IMAGE, 30], [9], [12, IMAGE, 9]]
    with patched(tiny_model(family), config) as handle:
        out = tiny_model(family)(**tiny_inputs(family, prompts), logits_to_keep=1, use_cache=True)
    cache = out.past_key_values
    for b, tokens in enumerate(cache.tokens):
        entries = [layer.lengths[b] for layer in cache.layers]
        assert sum(entries) <= 0.4 * tokens * LAYERS
        assert sum(entries) >= 0.4 * tokens * LAYERS - LAYERS
    assert [layer.entries for layer in handle.records[-1].layers] == [tuple(x.lengths) for x in cache.layers]
    assert all(sum(layer.cache_flops) > 0 for layer in handle.records[-1].layers)


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "llava_onevision"])
def test_a_batch_keeps_what_each_keeps_alone(family):
    before = {"merge": AIMMerge(0.5), "prune": AIMPrune(1, 3), "skip": OperatorSkip(ffn=[1])}
    config = fitting(family, InferenceConfig(cache=Digest(0.3), **before))
    prompts = [[8, IMAGE, 5, IMAGE, 30], [12, IMAGE, 9]]
    model = tiny_model(family)
    with patched(model, config):
        batch = model(**tiny_inputs(family, prompts), logits_to_keep=1, use_cache=True).past_key_values
        alone = [model(**row, logits_to_keep=1, use_cache=True).past_key_values for row in tiny_rows(family, prompts)]
    for b, own in enumerate(alone):
        for held, layer in zip(batch.layers, own.layers, strict=True):
            torch.testing.assert_close(held.row(b).keys, layer.row(0).keys, rtol=0, atol=1e-4)
            torch.testing.assert_close(held.row(b).values, layer.row(0).values, rtol=0, atol=1e-4)


def answer(family, seed, cache):
    """Logits of a question's last token, asked once the context was compressed."""
    model = tiny_model(family)
    context = tiny_inputs(family, [[20, IMAGE, 10, IMAGE, 10, IMAGE, 15, IMAGE, 9]], seed)
    ids = tiny_inputs(family, [[12]], seed + 99)["input_ids"]
    with patched(model, InferenceConfig(cache=cache)):
        cache = getattr(model(**context, logits_to_keep=1, use_cache=True), CACHE_NAME)
        mask = torch.ones(1, cache.get_seq_length() + 12, dtype=torch.int64)
        out = model(input_ids=ids, attention_mask=mask, **{CACHE_NAME: cache}, logits_to_keep=1, use_cache=True)
    return out.logits[:, -1]


@pytest.mark.slow
def test_it_stays_nearer_to_the_whole_cache_than_chance():
    """Over all families; on random weights, of which none has learned to look anything up."""

    def lost(cache):
        cells = [(family, seed) for family in FAMILIES if family != "gemma3" for seed in range(3)]
        logits = ((answer(*cell, c) for c in (None, cache)) for cell in cells)
        return sum(kl_divergence(*pair).item() for pair in logits)

    assert lost(Digest(0.5)) < 0.8 * lost(RandomEvict(0.25, 0.25, text_prior=False))


def test_a_whole_budget_changes_nothing():
    model, inputs = tiny_model("internvl"), tiny_inputs("internvl", [[8, IMAGE, 12]])
    with patched(model, InferenceConfig(cache=Digest(1.0))):
        kept = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(kept, model.generate(**inputs, max_new_tokens=5, do_sample=False))


def test_gemmas_windows_are_refused():
    assert "sliding window" in refusal("gemma3", InferenceConfig(cache=Digest()))


def test_turns_and_chunks_keep_the_budget():
    pytest.importorskip("sklearn")
    plain = Engine.from_pretrained("nano")
    engine = Engine(plain.model, plain.processor, InferenceConfig(cache=Digest(budget=100)))
    (context,) = made_contexts(6, 1, 2, 0, None)
    for chunk in (None, 150):
        chat = engine.chat(prefill_chunk_size=chunk)
        chat.read(context.content)
        held = [lengths[0] for lengths in chat.cache.lengths]
        assert 590 <= sum(held) <= 600 and len(set(held)) > 1
        for question in context.questions:
            chat.send(question, max_new_tokens=3)
            assert sum(lengths[0] for lengths in chat.cache.lengths) <= 600 + 6 * 3
    assert InferenceConfig.from_json(engine.config.to_json()) == engine.config


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 0},
        {"ratio": 1.5},
        {"budget": 0},
        {"text_share": 0},
        {"contrast": -1},
        {"queries": 0},
        {"recent": -1},
        {"spread": "far"},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="Digest"):
        Digest(**wrong)


def test_generated_tokens_stand_for_one_entry_each():
    """Also beyond the room that a cache has for them from the start; the next turn's digest weighs them so."""
    engine = Engine.from_pretrained("nano", InferenceConfig(cache=Digest(0.5)))
    chat = engine.chat(output_logits=True)
    for length in (2, HEADROOM + 3):
        assert not chat.send("Then comes a clip:", length, min_new_tokens=length).logits.isnan().any()
        sizes = chat.cache.layers[0].row(0).size
        assert (sizes[..., 1 - length :] == 1).all() and (sizes > 0).all()
    assert not chat.send("x", 2, min_new_tokens=2).logits.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_demand_in_half_precision_is_float32s(dtype):
    """Logits beyond what float16 holds, readings whose squares are, and more patches than bfloat16 can count."""
    generator = torch.Generator().manual_seed(0)
    entries = made([40, 700, 40], size=64)
    keys = 40 * entries.keys + 20 * torch.randn(64, generator=generator)
    entries = replace(entries, keys=keys.to(dtype), values=(20 * entries.values + 30).to(dtype))
    queries = (20 * torch.randn(1, 4, len(entries), 64, generator=generator)).to(dtype)
    digest = Digest(0.2)

    def demand(cast):
        own = replace(entries, keys=cast(entries.keys), values=cast(entries.values))
        view = layer_view(queries=cast(queries), entries=own, is_visual=own.is_visual[0, 0], scale=0.01)
        return digest.layer_demand(view)

    exact = demand(torch.Tensor.float)
    assert exact > 0.01
    assert demand(lambda x: x) == pytest.approx(exact, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert demand(torch.Tensor.float) == pytest.approx(exact, rel=1e-5)


def test_sizes_of_entries_without_any_are_counted_in_float32():
    entries = replace(made([600]), size=None)
    entries = replace(entries, keys=entries.keys.bfloat16(), values=entries.values.bfloat16())
    *_, size = clustered(entries, torch.arange(600), 5)
    assert size.dtype == torch.float32 and (size.sum(-1) == 600).all()
