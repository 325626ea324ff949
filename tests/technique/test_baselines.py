"""Random baselines spend the techniques' own budgets; LOOK-M's scores and budget over several passes."""

from collections import defaultdict
from typing import NamedTuple

import pytest
import torch

from mminfer import AIMMerge, AIMPrune, ConfigError, InferenceConfig, LookM, OperatorSkip, patched
from mminfer.cache.h2o import H2O
from mminfer.cache.random_evict import RandomEvict
from mminfer.cache.snapkv import SnapKV
from mminfer.models.registry import adapter_for
from mminfer.technique import CacheEntries
from mminfer.tokens.downsample import Downsample, _smaller_grid
from mminfer.tokens.fastv import FastV
from mminfer.tokens.random_prune import RandomPrune
from tests.tiny import FAMILIES, IMAGE, LAYERS, VIDEO, skip_if_refused, tiny_inputs, tiny_model
from tests.views import layer_view

PROMPTS = [[3, IMAGE, 5, IMAGE, 4], [8], [2, IMAGE, 9]]


def batch(family):
    videos = bool(FAMILIES[family].video_tokens)
    return tiny_inputs(family, [*PROMPTS, [2, VIDEO, 3]] if videos else PROMPTS)


def run(family, inputs=None, **config):
    """Logits of the last tokens, rows a layer and sequence, entries a layer and sequence."""
    model = tiny_model(family)
    inputs = batch(family) if inputs is None else inputs
    with patched(model, InferenceConfig(**config)) as handle:
        out = model(**inputs, logits_to_keep=1, use_cache=True)
    rows = [list(layer.rows) for layer in handle.records[-1].layers]
    return out.logits, rows, out.past_key_values


@pytest.mark.parametrize("merge", [None, AIMMerge(0.5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_pruning_keeps_as_many_rows(family, merge):
    skip_if_refused(family, InferenceConfig(prune=AIMPrune(1, 3)))
    logits, rows, cache = run(family, prune=AIMPrune(1, 3), merge=merge)
    lots = [run(family, prune=RandomPrune(1, 3, seed=seed), merge=merge) for seed in (0, 0, 1)]
    for _, lot_rows, lot_cache in lots:
        assert lot_rows == rows and lot_cache.lengths == cache.lengths
    same, again, other = (lot[0] for lot in lots)
    assert torch.equal(same, again) and not torch.allclose(same, other, atol=1e-4)
    assert not torch.allclose(same, logits, atol=1e-4)
    torch.testing.assert_close(same[1], other[1], rtol=0, atol=1e-5)  # text alone has nothing to lose


BUDGETS = [
    {"important_ratio": 0.4, "recent_ratio": 0.1},
    {"important_ratio": (0.5, 0.1, 0.6, 0.4), "recent_ratio": 0.0},
    {"budget": 20},
    {"important_ratio": 0.3, "recent_ratio": 0.3, "text_prior": False},
]


@pytest.mark.parametrize(
    ("family", "budget"), [*((f, BUDGETS[0]) for f in FAMILIES), *(("llava", b) for b in BUDGETS[1:])]
)
def test_random_eviction_keeps_as_many_entries(family, budget):
    skip_if_refused(family, InferenceConfig(cache=LookM(**budget)))
    _, _, cache = run(family, cache=LookM(**budget))
    _, _, full = run(family)
    same, again, other = (run(family, cache=RandomEvict(**budget, seed=seed))[2] for seed in (0, 0, 1))
    assert same.lengths == again.lengths == other.lengths == cache.lengths
    assert sum(map(sum, cache.lengths)) < sum(map(sum, full.lengths))
    differs = False
    for layer in range(LAYERS):
        for row in range(len(same.tokens)):
            kept, whole = same.layers[layer].row(row), full.layers[layer].row(row)
            place = places(kept.keys, whole.keys)  # entries stay as they were: nothing is merged
            assert (place.diff() > 0).all()
            index = place[None, ..., None].expand_as(kept.values)
            torch.testing.assert_close(kept.values, whole.values.gather(2, index), rtol=0, atol=1e-4)
            assert torch.equal(kept.keys, again.layers[layer].row(row).keys)
            differs |= not torch.equal(kept.keys, other.layers[layer].row(row).keys)
    assert differs


def test_every_layer_and_head_draws_its_own_lot():
    q, k = torch.zeros(1, 4, 30, 8), torch.zeros(1, 2, 30, 8)
    evict, prune = RandomEvict(seed=3), RandomPrune(seed=3)
    lots = [evict.score(layer_view(q, k, layer_idx=layer)) for layer in (0, 1)]
    assert lots[0].shape == (1, 2, 30)
    assert len({tuple(head.tolist()) for lot in lots for head in lot[0]}) == 4
    first, second = (prune.importance(layer_view(q, k, layer_idx=layer)) for layer in (0, 1))
    assert first.shape == (30,) and not torch.equal(first, second)
    assert torch.equal(first, prune.importance(layer_view(q + 1, k + 1)))


def test_random_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    run("llava", prune=RandomPrune(1, 3), cache=RandomEvict())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("technique", [RandomPrune(), RandomEvict()])
def test_a_lot_costs_nothing(technique):
    assert technique.cost(adapter_for(tiny_model("llava")).spec, [1000]) == 0


@pytest.mark.parametrize("prompts", [[[IMAGE]], [[5], [IMAGE]], [[IMAGE], [5]]])
@pytest.mark.parametrize("prune", [AIMPrune, RandomPrune])
def test_pruning_leaves_every_prompt_its_last_row(prune, prompts):
    """The next token comes from the last row, whatever it is: it must be there in every layer."""
    inputs = tiny_inputs("llava", prompts)
    _, rows, _ = run("llava", inputs, prune=prune(1, 3))
    assert all(count >= 1 for layer in rows for count in layer)


def test_pruning_answers_from_the_prompts_last_row():
    """Text in front of an image has not seen it: its row would answer as if there were no image."""
    answer, _, _ = run("llava", tiny_inputs("llava", [[3, IMAGE]]), prune=AIMPrune(1, 3))
    blind, _, _ = run("llava", tiny_inputs("llava", [[3]]))
    assert not torch.allclose(answer, blind, atol=1e-4)


class Pass(NamedTuple):
    """One call of LOOK-M: a sequence's queries and entries in one layer, and what stays of them."""

    q: torch.Tensor
    entries: CacheEntries
    seen: int
    asked: torch.Tensor
    scale: float
    out: CacheEntries

    @property
    def new_votes(self):
        """What this pass's queries give each entry, by the whole matrix in float64: [G, N]."""
        q, k = self.q[0].double(), self.entries.keys[0].double()
        repeat = q.shape[0] // k.shape[0]
        scores = q @ k.repeat_interleave(repeat, 0).mT * self.scale
        hidden = torch.arange(k.shape[1]) > self.asked[:, None]
        votes = scores.masked_fill(hidden, -torch.inf).softmax(-1).sum(1)
        return votes.view(-1, repeat, k.shape[1]).sum(1)


@pytest.fixture
def passes(monkeypatch):
    """Every call of LOOK-M, by (layer, sequence), in order of time."""
    found, apply = defaultdict(list), LookM.apply

    def recorded(self, view):
        out = apply(self, view)
        call = Pass(view.queries, view.entries, view.tokens_seen, view.query_places, view.scale, out)
        found[view.layer_idx].append(call)
        return out

    monkeypatch.setattr(LookM, "apply", recorded)
    return found


def by_sequence(calls, sequences):
    """A layer's calls, turn after turn, of each sequence."""
    return [calls[row::sequences] for row in range(sequences)]


def places(part, whole):
    """Where each key of `part` [1, G, S, D] stands in `whole` [1, G, N, D]: [G, S]."""
    distance = torch.cdist(part[0].double(), whole[0].double())
    assert (distance.amin(-1) < 1e-4).all()
    return distance.argmin(-1)


def feed(family, config, turns):
    """Feeds turns (each a batch of prompts) to one cache; visual tokens and tokens of each turn and row."""
    model, cache, counts, masks = tiny_model(family), None, [], []
    with patched(model, config):
        for n, prompts in enumerate(turns):
            inputs = tiny_inputs(family, prompts, seed=n)
            mask = inputs.pop("attention_mask")
            masks.append(mask)
            inputs["attention_mask"] = torch.cat(masks, 1)
            out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            visual = [FAMILIES[family].image_tokens * prompt.count(IMAGE) for prompt in prompts]
            counts.append(list(zip(mask.sum(1).tolist(), visual, strict=True)))
    return cache, counts


TURNS = [[[3, IMAGE, 5], [6]], [[4, IMAGE, 2, IMAGE, 3], [2, IMAGE, 4]], [[6], [3, IMAGE, 2]], [[9], [4]]]


@pytest.mark.parametrize(
    ("family", "merge"),
    [("llava", "none"), ("llava", "average"), ("llava", "weighted"), ("llava", "pivot"), ("qwen2_5_vl", "pivot")],
)
def test_turns_keep_to_the_budget_and_keep_all_text(family, merge, passes):
    config = LookM(0.1, 0.1, merge=merge)
    cache, counts = feed(family, InferenceConfig(cache=config), TURNS)
    for layer in range(LAYERS):
        for row, calls in enumerate(by_sequence(passes[layer], 2)):
            assert len(calls) == len(TURNS)
            tokens = texts = 0
            for (new, visual), call in zip((turn[row] for turn in counts), calls, strict=True):
                tokens, texts = tokens + new, texts + new - visual
                important, recent = int(0.1 * tokens), int(0.1 * tokens)
                assert call.seen == tokens
                before = ~call.entries.is_visual[0, :, : len(call.entries) - recent]
                wanted = recent + max(important, int(before.sum(-1).max()))
                assert len(call.out) == min(wanted, len(call.entries))
                assert ((~call.out.is_visual).sum(-1) == texts).all()  # in every head
            assert cache.lengths[layer][row] == len(calls[-1].out)
            assert cache.layers[layer].tokens_seen[row] == cache.tokens[row] == tokens


@pytest.mark.parametrize(
    ("family", "skip"),
    [("llava", None), ("qwen2_5_vl", None), ("llava", OperatorSkip(attention=list(range(LAYERS))))],
)
def test_scores_are_carried_over_turns(family, skip, passes):
    """An entry's score is the attention of all queries since it came, and it goes where its entry goes."""
    feed(family, InferenceConfig(skip=skip, cache=LookM(0.2, 0.1, merge="none")), TURNS)
    for layer in range(LAYERS):
        for calls in by_sequence(passes[layer], 2):
            carried = torch.zeros(2, 0, dtype=torch.float64)
            held = calls[0].entries.keys[:, :, :0]
            for call in calls:
                old = carried.shape[1]
                assert torch.equal(call.entries.keys[:, :, :old], held)  # the cache gave back what it took
                new = torch.zeros(2, len(call.entries) - old, dtype=torch.float64)
                total = torch.cat([carried, new], 1) + call.new_votes
                kept = places(call.out.keys, call.entries.keys)
                assert (kept.diff() > 0).all()
                carried = total.gather(1, kept)
                torch.testing.assert_close(call.out.score[0].double(), carried, rtol=1e-4, atol=1e-5)
                held = call.out.keys
                check_choice(call, total, kept)


def check_choice(call, total, kept):
    """Recent entries and text stay; of the older visual entries, no dropped one has a better score."""
    entries = len(call.entries)
    stays = torch.zeros(2, entries, dtype=torch.bool).scatter_(1, kept, True)
    older = torch.arange(entries) < entries - int(0.1 * call.seen)
    visual = call.entries.is_visual[0]
    assert stays[:, ~older].all() and stays[~visual].all()
    for head in range(2):
        dropped, chosen = total[head, ~stays[head]], total[head, stays[head] & visual[head] & older]
        if len(dropped) and len(chosen):
            assert chosen.min() > dropped.max() - 1e-5


def test_nothing_dropped_yet_means_the_scores_of_one_prompt(passes):
    """Text in front, all of it kept: after two turns the scores are those of the whole prompt at once."""
    config = InferenceConfig(cache=LookM(0.05, 0.05, merge="none"))
    feed("llava", config, [[[20]], [[4, IMAGE, 3]]])
    model = tiny_model("llava")
    turns = [tiny_inputs("llava", [[20]], seed=0), tiny_inputs("llava", [[4, IMAGE, 3]], seed=1)]
    whole = {
        "input_ids": torch.cat([turn["input_ids"] for turn in turns], 1),
        "pixel_values": turns[1]["pixel_values"],
    }
    with patched(model, config):
        model(**whole, use_cache=True)
    for layer in range(LAYERS):
        _, second, at_once = passes[layer]
        assert at_once.seen == second.seen == 43
        torch.testing.assert_close(second.entries.keys, at_once.entries.keys, rtol=0, atol=1e-4)
        votes = at_once.new_votes.gather(1, places(second.out.keys, at_once.entries.keys))
        torch.testing.assert_close(second.out.score[0].double(), votes, rtol=1e-3, atol=1e-4)


def test_turns_within_the_budget_vote_too(passes):
    """The second turn overflows the budget; the first turn's queries have looked at the first image too."""
    feed("llava", InferenceConfig(cache=LookM(budget=30, merge="none")), [[[3, IMAGE, 5]], [[4, IMAGE, 3]]])
    first, second = passes[0]
    assert len(first.out) == len(first.entries) == 24 and len(second.out) == 30
    votes = second.new_votes
    votes[:, :24] += first.new_votes
    kept = places(second.out.keys, second.entries.keys)
    torch.testing.assert_close(second.out.score[0].double(), votes.gather(1, kept), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LookM")
@pytest.mark.parametrize("budget", [1, 5, 26, 40])
def test_a_budget_is_a_bound_over_turns(budget, passes):
    """Visual entries go first; then the text before the recent entries that is looked at least."""
    cache, counts = feed("llava", InferenceConfig(cache=LookM(budget=budget)), TURNS)
    texts = [sum(turn[row][0] - turn[row][1] for turn in counts) for row in range(2)]
    for layer in cache.layers:
        for row in range(2):
            visual, recent = layer.row(row).is_visual, budget // 2
            assert visual.shape[2] == min(budget, layer.tokens_seen[row])
            older = visual[:, :, : visual.shape[2] - recent]
            assert not older.any() or ((~visual).sum(-1) == texts[row]).all()  # no text gave way to a visual entry


@pytest.mark.filterwarnings("ignore:LookM")
@pytest.mark.parametrize("budget", [1, 5, 26, 40])
def test_a_budget_that_text_may_outgrow_holds_over_turns_and_steps(budget, passes):
    """Visual entries go first; text is never dropped, so it may exceed the budget alone."""
    model = tiny_model("llava")
    config = InferenceConfig(cache=LookM(budget=budget, text_overflow="keep"))
    cache, counts = feed("llava", config, TURNS)
    texts = [sum(turn[row][0] - turn[row][1] for turn in counts) for row in range(2)]
    for layer in cache.layers:
        for row in range(2):
            kept = layer.row(row)
            assert ((~kept.is_visual).sum(-1) == texts[row]).all()
            assert len(kept) <= max(budget, texts[row] + budget // 2)
    held = cache.lengths
    with patched(model, config):
        for _ in range(3):
            model(input_ids=torch.tensor([[7], [8]]), past_key_values=cache, use_cache=True)
        assert cache.lengths == [[n + 3 for n in layer] for layer in held]
        assert all(layer.tokens_seen == cache.tokens for layer in cache.layers)
        model(input_ids=torch.tensor([[7, 9], [8, 9]]), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        for row in range(2):
            assert ((~layer.row(row).is_visual).sum(-1) == texts[row] + 5).all()  # generated tokens are text


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_down_sampling_averages_cells_of_the_grid(family, ratio):
    adapter = adapter_for(tiny_model(family))
    with torch.no_grad():
        embeds, layout = adapter.embed(batch(family))
    out, left = Downsample(ratio).apply(embeds, layout)
    patches = layout.size > 0
    assert float(left.size.sum()) == pytest.approx(float(layout.size.sum()))  # every patch is in some token
    for image, tokens in enumerate(layout.image_lengths):
        assert 0.5 * ratio * tokens <= int(((left.image_id == image) & (left.size > 0)).sum()) <= ratio * tokens
    for image in layout.image_id[patches & (layout.image_id >= 0)].unique().tolist():
        before, after = (x.size * (x.image_id == image) for x in (layout, left))
        torch.testing.assert_close(before @ embeds, after @ out, rtol=0, atol=1e-4)  # means weighted by size
    text = ~layout.is_visual
    assert torch.equal(out[~left.is_visual], embeds[text])
    assert (left.source.diff() > 0).all()


def test_down_sampling_a_square():
    adapter = adapter_for(tiny_model("llava"))
    with torch.no_grad():
        embeds, layout = adapter.embed(tiny_inputs("llava", [[IMAGE]]))
    out, left = Downsample(0.25).apply(embeds, layout)
    grid = embeds.view(2, 2, 2, 2, -1).mean((1, 3)).flatten(0, 1)  # 4 x 4 tokens, cells of 2 x 2
    torch.testing.assert_close(out, grid)
    assert left.size.tolist() == [4.0] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_fastv_prunes_once_by_the_last_tokens_attention(family):
    logits, rows, _ = run(family, prune=FastV(2, 0.5))
    adapter = adapter_for(tiny_model(family))
    with torch.no_grad():
        _, layout = adapter.embed(batch(family))
    full = list(layout.lengths)
    left = [n - v + int(v * 0.5) for n, v in zip(full, layout.visual_lengths, strict=True)]
    assert rows == [full, full, *[left] * (LAYERS - 2)]
    assert torch.isfinite(logits).all()


def test_fastv_keeps_what_the_last_query_sees():
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, heads, 12, 8, generator=generator) for heads in (4, 2))
    is_visual = torch.tensor([False, *[True] * 10, False])
    kept = FastV(1, 0.3).apply(layer_view(q, k, is_visual=is_visual, num_layers=LAYERS, scale=8**-0.5))
    attention = (q[:, :, -1:] @ k.repeat_interleave(2, 1).mT * 8**-0.5).softmax(-1).mean(1)[0, 0]
    best = attention[1:11].topk(3).indices + 1
    assert kept.tolist() == [0, *sorted(best.tolist()), 11]


@pytest.mark.parametrize("technique", [H2O, SnapKV])
@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "llava_onevision"])
def test_eviction_rules_keep_exactly_their_budget(family, technique):
    cache = run(family, tiny_inputs(family, [[20, IMAGE, 15], [40]]), cache=technique(0.3, 0.2))[2]
    for lengths in cache.lengths:
        assert lengths == [int(n * 0.3) + int(n * 0.2) for n in cache.tokens]


def test_snapkv_is_what_its_paper_says():
    generator = torch.Generator().manual_seed(6)
    q, k = (torch.randn(1, heads, 40, 8, generator=generator) for heads in (4, 2))
    v = torch.randn(1, 2, 40, 8, generator=generator)
    heads = torch.zeros(1, 2, 40)
    technique = SnapKV(0.3, 0.2, window=6, pool=3)
    kept = technique.apply(layer_view(q, CacheEntries(k, v, heads.bool(), heads), scale=8**-0.5))
    logits = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    score = logits.softmax(-1)[:, :, -6:].sum(2).view(1, 2, 2, 40).sum(2)
    score = torch.nn.functional.avg_pool1d(score[..., :-6], 3, 1, 1)  # the window is not pooled with what is before it
    score = torch.nn.functional.pad(score, (0, 6))
    score[..., :4], score[..., -6:] = 98, 99
    index = score.topk(20).indices.sort().values[..., None].expand(1, 2, 20, 8)
    assert torch.equal(kept.keys, k.gather(2, index)) and torch.equal(kept.values, v.gather(2, index))


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (Downsample, {"ratio": 0}),
        (FastV, {"ratio": 1.5}),
        (FastV, {"layer": 0}),
        (SnapKV, {"pool": 4}),
        (SnapKV, {"text_prior": True}),
        (SnapKV, {"queries": "all"}),
        (SnapKV, {"budget": 100, "recent": 20}),
        (H2O, {"text_prior": True}),
    ],
)
def test_wrong_settings_are_refused(cls, kwargs):
    with pytest.raises(ConfigError):
        cls(**kwargs)


@pytest.mark.parametrize(
    ("tokens", "shape"), [(16, (4, 4)), (27, (5, 5)), (8, (4, 2)), (5, (2, 2)), (3, (3, 1)), (1, (1, 1))]
)
def test_smaller_grids_keep_number_and_shape(tokens, shape):
    assert _smaller_grid(8, 8, tokens) == shape


def test_fastv_refuses_to_judge_by_a_window():
    adapter = adapter_for(tiny_model("gemma3"))
    sliding = adapter.spec.sliding_layers[0]
    with pytest.raises(ConfigError, match="window"):
        FastV(sliding + 1).check(adapter.spec)


def test_chance_draws_one_lot_for_each_entry():
    """Over many chunks who survives a budget does not depend on when it came."""
    technique, kept = RandomEvict(0.5, 0.0, budget=100, text_prior=False), None
    for chunk in range(16):
        new = torch.full((1, 1, 50, 2), float(chunk))
        fresh = CacheEntries(new, new, torch.ones(1, 1, 50).bool(), torch.zeros(1, 1, 50))
        entries = fresh if kept is None else kept.extend(fresh)
        kept = technique.apply(layer_view(new, entries, tokens_seen=50 * (chunk + 1)))
    counts = torch.bincount(kept.keys[0, 0, 4:, 0].long(), minlength=16)
    assert len(kept) == 100 and 25 < counts[:8].sum() < 75


def test_nothing_is_scored_where_nothing_is_evicted():
    assert SnapKV(0.5, 0.5).quota(500, 0) == (500, 0)


def test_the_first_entries_are_within_a_budget():
    cache = run("internvl", tiny_inputs("internvl", [[10, IMAGE]]), cache=H2O(0.1, 0.1))[2]
    assert {lengths[0] for lengths in cache.lengths} == {4}  # 28 tokens: 2 and 2
