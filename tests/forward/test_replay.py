"""Rows that go by again: what they look at is what the host's own attention says, at every family, door and turn."""

import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mminfer import (
    V2PE,
    AIMMerge,
    AIMPrune,
    ConfigError,
    Digest,
    Engine,
    InferenceConfig,
    InputError,
    LookM,
    OperatorSkip,
    Replay,
    patched,
)
from mminfer.forward.kv_cache import CACHE_NAME
from mminfer.forward.replayed_rows import ReplayedRows
from mminfer.models.registry import adapter_for
from mminfer.nano import sample_messages
from mminfer.technique import NOTHING, CacheTechnique, ReplayPlan
from tests.tiny import IMAGE, MARKED_FAMILIES, VIDEO, fitting, tiny_inputs, tiny_model, tiny_rows

FAMILIES = [family for family in MARKED_FAMILIES if family != "gemma3"]  # its layers slide
PROMPT = [5, IMAGE, 3, IMAGE, 4]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@dataclass(frozen=True)
class Noted(Replay, register=False):
    """Keeps what it was shown."""

    seen: list = field(default_factory=list, compare=False)

    def compress_replayed(self, layers, replayed, tokens_seen):
        self.seen.append((layers, replayed))
        return super().compress_replayed(layers, replayed, tokens_seen)


def groups_of(layout):
    """Rows of each picture, and of text, of a single sequence."""
    rows, visual = torch.arange(len(layout)), layout.is_visual
    edges = torch.cat([torch.tensor([True]), visual[1:] != visual[:-1], torch.tensor([True])]).nonzero()[:, 0].tolist()
    runs = [rows[a:b] for a, b in itertools.pairwise(edges)]
    return [run for run in runs if visual[run[0]]], rows[~visual]


def host_peaks(model, embeds, layout):
    """[L][G, N]: the largest share that rows of a second time give to each entry, by the host's own layers."""
    adapter = adapter_for(model)
    count, spec = len(layout), adapter.spec
    pictures, text = groups_of(layout)
    behind = layout.position.amax().floor() + 1
    peaks = [torch.zeros(spec.num_key_value_heads, count) for _ in range(spec.num_layers)]
    for rows in [*pictures, text]:
        again = layout.position[:, rows]
        if layout.is_visual[rows[0]]:
            again = again - again[:, 0].amin()
        else:
            again = torch.arange(len(rows), dtype=again.dtype).expand_as(again)
        position = torch.cat([layout.position, again + behind], 1).long()[:, None]
        found = {}

        def attention(module, query, key, value, attention_mask, scaling=None, found=found, **others):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            per_group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(per_group, 1) for x in (key, value))
            size = query.shape[2]
            mask = torch.full((size, size), -torch.inf).triu(1)
            shares = (query @ key.mT * scale + mask).softmax(-1)
            found[module.layer_idx] = shares[0, :, count:, :count].amax(1).unflatten(0, (-1, per_group)).amax(1)
            return (shares @ value).transpose(1, 2), shares

        config, before = adapter.text_config, adapter.text_config._attn_implementation_internal
        ALL_ATTENTION_FUNCTIONS["noted"] = attention
        config._attn_implementation_internal = "noted"
        try:
            adapter.language_model(
                inputs_embeds=torch.cat([embeds, embeds[rows]])[None],
                position_ids=position if adapter.position_axes > 1 else position[0],
                attention_mask=None,
                use_cache=False,
            )
        finally:
            config._attn_implementation_internal = before
            ALL_ATTENTION_FUNCTIONS._local_mapping.pop("noted", None)
        for layer, own in found.items():
            peaks[layer] = peaks[layer].maximum(own)
    return peaks


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_vl", "qwen2_5_vl"])
def test_entries_are_worth_what_the_host_gives_them_the_second_time(family):
    model, inputs = tiny_model(family), tiny_inputs(family, [PROMPT])
    adapter, technique = adapter_for(model), Noted(1.0, alike=1.0)
    embeds, layout = adapter.embed(inputs)
    with patched(model, InferenceConfig(cache=technique)):
        model(**inputs, use_cache=True)
    want = host_peaks(model, adapter.entering(embeds), layout)
    for (stretch,), own in zip(technique.seen[0][1], want, strict=True):
        assert stretch.first == 0 and stretch.last == len(layout)
        torch.testing.assert_close(stretch.peaks, own, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fast", [False, True], ids=["again", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_a_batch_gets_what_it_gets_alone(family, fast):
    model, prompts = tiny_model(family), [[5, IMAGE, 3], [4], [3, IMAGE, 2, IMAGE, 6]]
    config = InferenceConfig(cache=Replay(0.5, fast=fast))
    with patched(model, config):
        batch = model.generate(**tiny_inputs(family, prompts), **GREEDY)
        alone = [model.generate(**inputs, **GREEDY) for inputs in tiny_rows(family, prompts)]
    for row, own in enumerate(alone):
        logits, whole = torch.stack(own.logits, 1)[0], torch.stack(batch.logits, 1)[row]
        torch.testing.assert_close(whole[: len(logits)], logits, atol=1e-4, rtol=1e-4)
    lengths = [layer.head_lengths for layer in batch[CACHE_NAME].layers]
    assert len({n for layer in lengths for row in layer for n in row}) > 1


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize(
    "others",
    [
        {"merge": AIMMerge(0.5)}, {"prune": AIMPrune(1, 2)}, {"skip": OperatorSkip(ffn=[1], attention=[2])},
        {"positions": V2PE(1 / 4)},
    ],
    ids=lambda others: next(iter(others)),
)  # fmt: skip
@pytest.mark.parametrize("fast", [False, True], ids=["again", "fast"])
def test_it_goes_with_every_other_technique(family, others, fast):
    model, inputs = tiny_model(family), tiny_inputs(family, [PROMPT])
    technique = Noted(0.5, fast=fast)
    with patched(model, fitting(family, InferenceConfig(**others, cache=technique))) as handle:
        out = model.generate(**inputs, **GREEDY)
    layers, replayed = technique.seen[0]
    for entries, stretches in zip(layers, replayed, strict=True):
        assert stretches[-1].last == len(entries)
        assert float(torch.cat([s.peaks for s in stretches], 1).max()) <= 1 + 1e-5
    assert bool(torch.stack(out.logits).isfinite().all())
    held = sum(sum(layer.head_lengths[0]) for layer in out[CACHE_NAME].layers)
    seen = sum(e.total for e in layers)
    assert held - 3 * len(layers) * len(layers[0].lengths) == max(int(0.5 * seen), 1)
    assert handle.records[0].layers[0].cache_flops[0] > 0


@pytest.mark.parametrize("fast", [False, True], ids=["again", "fast"])
def test_a_layer_that_spares_queries_is_still_asked(fast):
    """Rows whose query a layer leaves out look all the same, and read nothing."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [PROMPT])
    technique = Noted(1.0, fast=fast)
    skip = OperatorSkip(attention=[0, 1, 2, 3][: adapter_for(model).spec.num_layers])
    with patched(model, InferenceConfig(skip=skip, cache=technique)):
        model(**inputs, use_cache=True)
    for (stretch,) in technique.seen[0][1]:
        assert float(stretch.peaks.min(1).values.max()) > 0


def test_long_prompts_are_judged_stretch_by_stretch():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[60, IMAGE, 50, IMAGE, 70]])
    technique = Noted(0.4, stretch=64)
    with patched(model, InferenceConfig(cache=technique)):
        model.generate(**inputs, **GREEDY)
    layers, replayed = technique.seen[0]
    stretches = replayed[0]
    assert len(stretches) > 2 and stretches[0].earlier is None and all(s.earlier is not None for s in stretches[1:])
    assert [s.first for s in stretches[1:]] == [s.last for s in stretches[:-1]]
    assert stretches[-1].last == len(layers[0])
    torch.testing.assert_close(stretches[1].earlier.keys[:, 0], layers[0].keys[0, :, 0])


def test_chunks_and_turns_go_on_from_what_was_kept():
    model = tiny_model("llava")
    rows = tiny_inputs("llava", [[5, IMAGE, 30]])
    technique = Noted(0.5)
    turn = torch.randint(10, 400, (1, 24), generator=torch.Generator().manual_seed(0))
    with patched(model, InferenceConfig(cache=technique)):
        out = model(**rows, use_cache=True)
        model(input_ids=turn, **{CACHE_NAME: out[CACHE_NAME]})
    (first, _), (second, replayed) = technique.seen
    assert any(entries.is_packed for entries in second)
    for _entries, (stretch,) in zip(second, replayed, strict=True):
        assert stretch.first == 0 and stretch.peaks.shape[1] == 24 and stretch.earlier is not None
    held = sum(sum(layer.head_lengths[0]) for layer in out[CACHE_NAME].layers)
    assert held == int(0.5 * (len(first[0]) + 24) * len(first) * len(first[0].lengths))


def test_short_turns_do_not_push_the_context_out():
    """Their rows look at what was held before, too: a share of a dozen entries says nothing beside one of hundreds."""
    engine = Engine.from_pretrained("nano", InferenceConfig(cache=Replay(budget=120)))
    chat = engine.chat()
    chat.read(sample_messages()[0]["content"][:8])
    held = []
    for _ in range(5):
        chat.send("Which image shows a blue 1?", max_new_tokens=2)
        layers = chat.cache.layers
        held.append(sum(int(head.is_visual.sum()) for layer in layers for head in layer.row(0).heads()))
    assert held[-1] > 0.6 * held[0]


def test_rows_of_a_turn_look_at_what_each_head_holds():
    model = tiny_model("llava")
    technique = Noted(0.5, by_output=False)  # by it both heads of this model's first layer keep all
    turn = torch.randint(10, 400, (1, 6), generator=torch.Generator().manual_seed(0))
    with patched(model, InferenceConfig(cache=technique)):
        out = model(**tiny_inputs("llava", [[5, IMAGE, 30]]), use_cache=True)
        held = [layer.head_lengths[0] for layer in out[CACHE_NAME].layers]
        model(input_ids=turn, **{CACHE_NAME: out[CACHE_NAME]})
    for lengths, entries, (stretch,) in zip(held, *technique.seen[1], strict=True):
        earlier = stretch.earlier
        for head, (length, own) in enumerate(zip(lengths, entries.heads(), strict=True)):
            assert torch.equal(earlier.keys[head, :length], own.keys[0, 0, :length])
            mass = own.weighed().log_mass[0, 0, :length]
            assert torch.equal(earlier.log_mass[head], pad(mass, (0, max(lengths) - length), value=NOTHING))
        queries = stretch.queries.unflatten(0, (len(lengths), -1)).flatten(1, 2)
        for head, own in enumerate(entries.heads()):  # no share of theirs is more than it is without their own rows
            alone = (queries[head] @ own.keys[0, 0].mT * stretch.scale).softmax(-1).amax(0)
            assert bool((stretch.peaks[head] <= alone[-6:] + 1e-5).all())


def test_text_beside_pictures_may_be_left_out():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [PROMPT])
    found = []
    for text in (True, False):
        technique = Noted(1.0, text=text)
        with patched(model, InferenceConfig(cache=technique)):
            model(**inputs, use_cache=True)
        found.append(technique.seen[0][1][1][0])
    assert bool((found[0].peaks >= found[1].peaks - 1e-6).all()) and not torch.equal(found[0].peaks, found[1].peaks)


def test_rows_like_the_one_before_them_go_by_once():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [PROMPT])
    adapter = adapter_for(model)
    embeds, layout = adapter.embed(inputs)
    picture = layout.visual_rows[layout.image_id[layout.visual_rows] == 0]
    embeds = embeds.detach().clone()
    embeds[picture[1:]] = embeds[picture[0]].clone()
    again = ReplayedRows(embeds, layout, ReplayPlan(alike=0.99), 1)
    assert sorted({*range(len(layout))} - {*again.rows.tolist()}) == picture[1:].tolist()
    assert len(ReplayedRows(embeds, layout, ReplayPlan(), 1).rows) == len(layout)


@pytest.mark.parametrize("pictures", [1, 6])
@pytest.mark.parametrize("merge", [None, AIMMerge(0.1)], ids=["whole", "merged"])
def test_no_room_for_the_pictures_is_told_before_any_pass(pictures, merge):
    """There is room from one entry for each of them on, beside the first of each head."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[2] + [IMAGE, 1] * pictures])
    heads = adapter_for(model).spec.num_key_value_heads
    least = -(-(pictures + heads) // heads)
    with patched(model, InferenceConfig(merge=merge, cache=Replay(budget=least - 1))) as handle:
        with pytest.raises(InputError, match=rf"{least - 1} entries a head for {pictures} pictures.*raise ratio or"):
            model.generate(**inputs, **GREEDY)
        assert not handle.records
    for sure in (0.0, 1.0):
        with patched(model, InferenceConfig(merge=merge, cache=Replay(budget=least, sure=sure))):
            cache = model(**inputs, use_cache=True)[CACHE_NAME]
        for layer in cache.layers:
            assert sum(int(head.is_visual.sum()) for head in layer.row(0).heads()) >= pictures


def test_room_is_of_what_merging_leaves_and_of_all_turns():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[2] + [IMAGE, 1] * 6])
    with patched(model, InferenceConfig(cache=Replay(0.06))):
        cache = model(**tiny_inputs("llava", [[200]]), use_cache=True)[CACHE_NAME]
        model(**tiny_inputs("llava", [[2, IMAGE, 2]]) | {"attention_mask": None, CACHE_NAME: cache})
        with pytest.raises(InputError, match=r"1\.2 entries a head for 1 pictures"):
            model(**tiny_inputs("llava", [[2, IMAGE, 2]]), use_cache=True)
    merged = InferenceConfig(merge=AIMMerge(0.1), cache=Replay(0.15))
    with patched(model, merged), pytest.raises(InputError, match=r"3 entries a head for 6 pictures"):
        model(**inputs, use_cache=True)
    one_token = tiny_inputs("llava", [[IMAGE]])
    with patched(model, InferenceConfig(merge=AIMMerge(0.01), cache=Replay(1.0))):
        model(**one_token, use_cache=True)


def test_room_of_a_turn_is_of_all_tokens_that_came_in():
    """Also of those that left behind a later layer."""
    model, told = tiny_model("llava"), []

    @dataclass(frozen=True)
    class Asked(Replay, register=False):
        def check_prompt(self, layout, spec, tokens_seen):
            told.append(tuple(tokens_seen))

    with patched(model, InferenceConfig(prune=AIMPrune(1, 3), cache=Asked(0.5))):
        first = tiny_inputs("llava", [PROMPT, [4, IMAGE]])
        out = model(**first, use_cache=True)
        turn = torch.full((2, 6), 20)
        mask = torch.cat([first["attention_mask"], torch.ones_like(turn)], 1)
        model(input_ids=turn, attention_mask=mask, **{CACHE_NAME: out[CACHE_NAME]})
    assert told == [(0, 0), tuple(first["attention_mask"].sum(1).tolist())]


@pytest.mark.parametrize("before", [None, Digest(0.5)], ids=["all", "digest"])
def test_entries_without_scores_are_refused_before_any_pass(before):
    model, inputs, turn = tiny_model("llava"), tiny_inputs("llava", [PROMPT]), tiny_inputs("llava", [[9]])["input_ids"]
    with patched(model, InferenceConfig(cache=before)):
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
    held = cache.head_lengths
    with patched(model, InferenceConfig(cache=Replay(0.5))) as handle:
        with pytest.raises(InputError, match=r"does not say the .*score of its entries, by which Replay judges"):
            model(input_ids=turn, **{CACHE_NAME: cache})
        assert not handle.records and cache.head_lengths == held


@pytest.mark.parametrize("techniques", [(LookM(0.5, 0.3), Replay(0.5)), (Replay(1.0), LookM(0.5, 0.3))], ids=str)
def test_scores_of_another_kind_are_refused_before_any_pass(techniques):
    """Sums of attention over a prompt are no shares of a replay's."""
    model, inputs, turn = tiny_model("llava"), tiny_inputs("llava", [PROMPT]), tiny_inputs("llava", [[9]])["input_ids"]
    first, second = techniques
    with patched(model, InferenceConfig(cache=first)):
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
    with patched(model, InferenceConfig(cache=second)), pytest.raises(InputError, match="scored by a replay"):
        model(input_ids=turn, **{CACHE_NAME: cache})


def test_models_whose_layers_slide_are_refused():
    with pytest.raises(ConfigError, match="Replay"), patched(tiny_model("gemma3"), InferenceConfig(cache=Replay())):
        pass


def test_frequencies_that_follow_the_length_are_refused(monkeypatch):
    model = tiny_model("llava")
    kind = type(adapter_for(model))
    monkeypatch.setattr(kind, "rotary_follows_length", True)
    with (
        pytest.raises(ConfigError, match="Replay runs rows again at positions behind the prompt"),
        patched(model, InferenceConfig(cache=replace(Replay(), ratio=0.123))),
    ):
        pass


def test_a_technique_that_asks_for_no_replay_runs_none():
    assert CacheTechnique.replay.fget(None) is None


def test_videos():
    model, inputs = tiny_model("qwen2_vl"), tiny_inputs("qwen2_vl", [[4, VIDEO, 5]])
    with patched(model, InferenceConfig(cache=Replay(0.5))):
        out = model.generate(**inputs, **GREEDY)
    assert bool(torch.stack(out.logits).isfinite().all())


@pytest.mark.parametrize(
    "technique", [Replay(0.5), Replay(0.5, fast=True), Digest(0.5)], ids=["whole", "fast", "digest"]
)
def test_a_row_that_has_nothing_in_a_chunk_stays_as_it_is(technique):
    model, prompts = tiny_model("llava"), [[30, IMAGE, 3], [9], [3, IMAGE, 2, IMAGE, 16]]
    turn = torch.randint(10, 400, (3, 45), generator=torch.Generator().manual_seed(0))
    own = [7, 2, 45]
    seen = torch.arange(45) >= 45 - torch.tensor(own)[:, None]
    with patched(model, InferenceConfig(cache=technique), prefill_chunk_size=40):
        inputs = tiny_inputs("llava", prompts)
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
        step = turn[:, :1]
        model(input_ids=step, **{CACHE_NAME: cache})
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.int64), seen.long()], 1)
        found = model(input_ids=turn, attention_mask=mask, **{CACHE_NAME: cache}).logits
        for n, row in enumerate(tiny_rows("llava", prompts)):
            alone = model(**row, use_cache=True)[CACHE_NAME]
            model(input_ids=step[n : n + 1], **{CACHE_NAME: alone})
            wanted = model(input_ids=turn[n : n + 1, -own[n] :], **{CACHE_NAME: alone}).logits
            torch.testing.assert_close(found[n, -own[n] :], wanted[0], atol=2e-5, rtol=1e-4)
            assert [layer.lengths[n] for layer in cache.layers] == [layer.lengths[0] for layer in alone.layers]


def test_values_are_fitted_under_autocast():
    model = tiny_model("llava")
    with patched(model, InferenceConfig(cache=Replay(0.5))), torch.autocast("cpu", torch.bfloat16):
        assert bool(model(**tiny_inputs("llava", [PROMPT])).logits.isfinite().all())
