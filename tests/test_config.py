"""Settings: JSON both ways, every mistake a ConfigError, and layers that scale with the depth."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mminfer import V2PE, AIMMerge, AIMPrune, ConfigError, InferenceConfig, LookM, OperatorSkip, RegionMerge, Replay
from mminfer.cache.random_evict import RandomEvict
from mminfer.config import PRESETS, TECHNIQUES
from mminfer.models.spec import ModelSpec
from mminfer.positions import DynamicNTK, LinearScaling
from mminfer.technique import LayerRange, Stage, layer_index
from mminfer.tokens.random_prune import RandomPrune

NAN, INF = float("nan"), float("inf")
DEPTHS = (4, 6, 12, 24, 28, 32, 80)


def spec(num_layers, **changes):
    made = ModelSpec(
        family="test", num_layers=num_layers, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=128, vocab_size=500, max_position_embeddings=32768,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_through_json(name):
    preset = InferenceConfig.from_preset(name)
    again = InferenceConfig.from_json(preset.to_json())
    assert again == preset and hash(again) == hash(preset)
    assert again.to_json() == preset.to_json()
    for mine, theirs in zip(again.techniques, preset.techniques, strict=True):
        assert type(mine) is type(theirs)


fractions = st.floats(0, 1, exclude_min=True)
layers = st.one_of(st.integers(0, 100), st.floats(0, 1))
listed = st.lists(st.integers(0, 80), max_size=5)
skipped = st.one_of(listed, listed.map(tuple), st.builds(LayerRange, layers, layers, st.integers(1, 9)))
ratios = st.one_of(fractions, st.lists(fractions, min_size=1, max_size=5).map(tuple))
prunes = {
    "start": layers, "end": layers, "temperature": st.floats(1e-3, 10), "iterations": st.integers(1, 9),
}  # fmt: skip
caches = {
    "important_ratio": ratios,
    "recent_ratio": st.one_of(ratios, st.just(0.0)),
    "merge": st.sampled_from(["average", "weighted", "pivot", "none"]),
    "text_prior": st.booleans(),
    "budget": st.none() | st.integers(1, 10**6),
}
seeds = st.integers(0, 2**31)
configs = st.builds(
    InferenceConfig,
    positions=st.one_of(
        st.none(),
        st.builds(V2PE, fractions),
        st.builds(LinearScaling, st.just("auto") | st.floats(1, 64)),
        st.builds(DynamicNTK, st.floats(1, 64), st.none() | st.integers(1, 10**6)),
    ),
    merge=st.one_of(
        st.none(),
        st.builds(AIMMerge, fractions),
        st.builds(RegionMerge, st.floats(0, 1), st.none() | st.integers(2, 99), st.none() | fractions, st.booleans()),
    ),
    prune=st.one_of(st.none(), st.builds(AIMPrune, **prunes), st.builds(RandomPrune, **prunes, seed=seeds)),
    skip=st.none() | st.builds(OperatorSkip, ffn=skipped, attention=skipped, block=skipped),
    cache=st.one_of(
        st.none(),
        st.builds(LookM, **caches),
        st.builds(RandomEvict, **caches, seed=seeds),
        st.builds(Replay, fractions, fit=st.integers(0, 200), alike=st.floats(0, 1), fast=st.booleans()),
    ),
)


@settings(deadline=None, max_examples=80)
@given(config=configs)
def test_any_config_goes_through_json(config):
    again = InferenceConfig.from_json(config.to_json())
    assert again == config
    for stage in Stage:
        before, after = getattr(config, stage.value), getattr(again, stage.value)
        assert type(before) is type(after)
        fields = () if before is None else dataclasses.fields(before)
        for field in fields:  # 1 and 1.0 mean different layers
            assert type(getattr(before, field.name)) is type(getattr(after, field.name))
    assert json.loads(config.to_json()).keys() == {stage.value for stage in Stage}


def test_every_technique_has_defaults_and_says_its_stage():
    for name, technique in TECHNIQUES.items():
        config = InferenceConfig.from_dict({technique.stage.value: {"technique": name}})
        assert config.techniques == (technique(),)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"rope": None}, "rope"),
        ([], "wanted an object"),
        ("aim", "wanted an object"),
        ({"merge": {"technique": "Nothing"}}, "unknown technique 'Nothing'.*AIMMerge"),
        ({"merge": {}}, "unknown technique None"),
        ({"merge": {"technique": "AIMMerge", "keep": 0.5}}, "merge: .*keep"),
        (
            {"cache": {"technique": "AIMMerge"}},
            "no cache technique: use Digest, LookM, Replay, H2O, RandomEvict, SnapKV or None",
        ),
        ({"positions": {"technique": "V2PE", "delta": "x"}}, "positions"),
    ],
)
def test_unknown_names_are_refused(data, says):
    with pytest.raises(ConfigError, match=says):
        InferenceConfig.from_dict(data)


@pytest.mark.parametrize("text", ["", "{", "{'merge': null}", "\ufeff{}"])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(ConfigError, match="not JSON"):
        InferenceConfig.from_json(text)


HOSTILE = {
    "none": (None, "of type NoneType: wanted the string"),
    "a list": ([], "of type list: wanted the string"),
    "bytes of no text": (b"\xff", "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "deep objects": ('{"merge":' * 100_000, "not JSON"),
    "a deep setting": (
        '{"merge": {"technique": "AIMMerge", "ratio": [[[[[[1]]]]]]}}',
        "merge: ratio: nested more than 4",
    ),
    "a number of 71 bits": (f'{{"cache": {{"technique": "LookM", "budget": {2**70}}}}}', "budget: .* of 71 bits"),
    "a number in a list": (f'{{"skip": {{"technique": "OperatorSkip", "ffn": [{-(2**70)}]}}}}', "ffn: .* of 71 bits"),
    "5,000 digits": ('{"cache": {"technique": "LookM", "budget": ' + "1" * 5000 + "}}", "not JSON .*4300 digits"),
    "1e999": ('{"merge": {"technique": "AIMMerge", "ratio": 1e999}}', "AIMMerge.ratio=inf"),
    "NaN": ('{"merge": {"technique": "AIMMerge", "ratio": NaN}}', "AIMMerge.ratio=nan"),
    "Infinity": ('{"cache": {"technique": "LookM", "budget": Infinity}}', "LookM.budget=inf"),
    "a stage twice": ('{"merge": null, "merge": {"technique": "AIMMerge"}}', "'merge' stands there twice"),
    "a field twice": ('{"merge": {"technique": "AIMMerge", "ratio": 0.5, "ratio": 0.1}}', "'ratio' stands there twice"),
    "a long name": ('{"' + "x" * 9999 + '": 1}', "config {'xxx"),
    "a long word": ('{"cache": {"technique": "LookM", "merge": "' + "x" * 9999 + '"}}', "of 9999 characters"),
    "half a pair": ('{"merge": {"technique": "\\ud800"}}', "unknown technique"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_refused_in_a_few_words(name):
    text, says = HOSTILE[name]
    with pytest.raises(ConfigError, match=says) as caught:
        InferenceConfig.from_json(text)
    assert len(str(caught.value)) < 500


def test_hostile_data_is_refused_in_a_few_words():
    ring: list = []
    ring.append(ring)
    for data in (
        {"merge": ring},
        {"merge": {"technique": ring}},
        {"merge": {"technique": "AIMMerge", "ratio": ring}},
        {"merge": {"technique": "AIMMerge", "ratio": 10**400}},
        {"merge": {"technique": "AIMMerge", 3: 4}},
        {"x" * 9999: 1},
        {(1,): 2, None: 3},
    ):
        with pytest.raises(ConfigError) as caught:
            InferenceConfig.from_dict(data)
        assert len(str(caught.value)) < 700
    for name in (["a"], None, {}, "x" * 9999):
        with pytest.raises(ConfigError, match="unknown preset") as caught:
            InferenceConfig.from_preset(name)
        assert len(str(caught.value)) < 600


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'fastest'.*lookm-20"):
        InferenceConfig.from_preset("fastest")


@pytest.mark.parametrize("stage", list(Stage))
def test_a_technique_in_another_stage_is_refused(stage):
    for technique in (
        V2PE(),
        LinearScaling(),
        DynamicNTK(),
        AIMMerge(),
        RegionMerge(),
        AIMPrune(),
        OperatorSkip(),
        LookM(),
    ):
        if technique.stage is stage:
            assert InferenceConfig(**{stage.value: technique}).techniques == (technique,)
        else:
            with pytest.raises(ConfigError, match=f"no {stage.value} technique"):
                InferenceConfig(**{stage.value: technique})


@pytest.mark.parametrize("other", ["AIMMerge", 0.25, {"ratio": 0.25}, object()])
def test_what_is_no_technique_is_refused(other):
    with pytest.raises(ConfigError, match="no merge technique"):
        InferenceConfig(merge=other)


WRONG_RATIOS = [-1, 1.5, NAN, INF, "0.1", True, None]


@pytest.mark.parametrize("ratio", [0, *WRONG_RATIOS], ids=repr)
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(ConfigError, match=r"AIMMerge.ratio=.*\(0, 1\]"):
        AIMMerge(ratio)
    with pytest.raises(ConfigError, match=r"LookM.important_ratio=.*\(0, 1\]"):
        LookM(important_ratio=ratio)
    with pytest.raises(ConfigError, match=r"LookM.important_ratio="):
        LookM(important_ratio=(0.5, ratio))


@pytest.mark.parametrize("ratio", WRONG_RATIOS, ids=repr)
def test_recent_ratios_may_be_zero_but_no_less(ratio):
    assert LookM(recent_ratio=0).recent_ratio == 0
    with pytest.raises(ConfigError, match=r"LookM.recent_ratio=.*\[0, 1\]"):
        LookM(recent_ratio=ratio)


@pytest.mark.parametrize("delta", [0, 2, -1, 1.0000001, NAN, INF])
def test_deltas_out_of_range_are_refused(delta):
    with pytest.raises(ConfigError, match="delta is"):
        V2PE(delta)


@pytest.mark.parametrize("budget", [0, -5, 1.5, 1000.0, "8k", NAN])
def test_budgets_are_numbers_of_entries(budget):
    with pytest.raises(ConfigError, match=r"LookM\.budget="):
        LookM(budget=budget)


@pytest.mark.parametrize("merge", ["mean", "", None, "Pivot"])
def test_unknown_cache_merges_are_refused(merge):
    with pytest.raises(ConfigError, match="pivot"):
        LookM(merge=merge)


@pytest.mark.parametrize("field", ["important_ratio", "recent_ratio"])
@pytest.mark.parametrize("values", [(), (0.1,) * 5, (0.1,) * 7])
def test_ratios_a_layer_must_be_as_many_as_layers(field, values):
    with pytest.raises(ConfigError, match=rf"LookM.{field} has {len(values)} values for 6 layers"):
        InferenceConfig(cache=LookM(**{field: values})).check(spec(6))
    InferenceConfig(cache=LookM(**{field: [0.1] * 6})).check(spec(6))


def test_eviction_and_sliding_windows_do_not_go_together():
    with pytest.raises(ConfigError, match=r"2 of 6 layers.*sliding window"):
        InferenceConfig(cache=LookM()).check(spec(6, sliding_layers=(1, 3)))
    InferenceConfig(merge=AIMMerge()).check(spec(6, sliding_layers=(1, 3)))


WRONG_SPANS = [(4, 4), (5, 3), (4, 9), (-1, 3), (6, 7), (0.9, 0.1), (0.5, 1.5), (-0.1, 0.5)]


@pytest.mark.parametrize(("start", "end"), [*WRONG_SPANS, ("3", 5), (True, 5), (None, 5)])
def test_prune_layers_that_do_not_fit_are_refused(start, end):
    with pytest.raises(ConfigError):
        InferenceConfig(prune=AIMPrune(start, end)).check(spec(6))


@pytest.mark.parametrize("setting", [{"temperature": 0}, {"temperature": -0.1}, {"iterations": 0}])
def test_importance_settings_out_of_range_are_refused(setting):
    with pytest.raises(ConfigError, match="AIMPrune"):
        AIMPrune(**setting)


@pytest.mark.parametrize("name", ["ffn", "attention", "block"])
@pytest.mark.parametrize("listed", [[6], [-1], [0, 99], [1.5], [0.5], ["1"], [None], [True], [[1]]])
def test_skipped_layers_that_do_not_fit_are_refused(name, listed):
    with pytest.raises(ConfigError, match=f"OperatorSkip.{name}"):
        InferenceConfig(skip=OperatorSkip(**{name: listed})).check(spec(6))


@pytest.mark.parametrize("layers", [3, "all", None, {1, 2}, range(3), 0.5])
def test_skipped_layers_that_are_no_list_are_refused(layers):
    with pytest.raises(ConfigError, match=r"OperatorSkip.attention=.*LayerRange"):
        OperatorSkip(attention=layers)


@pytest.mark.parametrize("interval", [0, -2])
def test_intervals_below_one_are_refused(interval):
    with pytest.raises(ConfigError, match="interval"):
        LayerRange(interval=interval)


WRONG_RANGES = [{"start": 6}, {"end": 7}, {"start": -1}]


@pytest.mark.parametrize("wrong", WRONG_RANGES)
def test_layer_ranges_that_do_not_fit_are_refused(wrong):
    layers = LayerRange(**wrong)
    with pytest.raises(ConfigError, match=r"OperatorSkip\.ffn"):
        InferenceConfig(skip=OperatorSkip(ffn=layers)).check(spec(6))


@pytest.mark.parametrize("num_layers", DEPTHS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_every_depth(name, num_layers):
    config = InferenceConfig.from_preset(name)
    config.check(spec(num_layers))
    if isinstance(config.prune, AIMPrune):
        schedule = config.prune.schedule(num_layers)
        assert schedule[-1] == 0 and all(a >= b for a, b in zip([1.0, *schedule], schedule, strict=False))
    if config.prune is not None:
        assert any(config.prune.prunes(i, num_layers) for i in range(num_layers))
    if config.skip is not None:
        skipped = config.skip.ffn.layers(num_layers)
        assert skipped and all(0 <= i < num_layers for i in skipped)


def test_aims_schedule_at_28_layers_is_the_papers():
    """Pruning starts behind layer 14, an eighth leaves behind each, and layer 22 sees no visual token."""
    wanted = [1.0] * 14 + [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0] + [0.0] * 6
    assert InferenceConfig.from_preset("aim").prune.schedule(28) == pytest.approx(wanted, abs=1e-12)
    assert AIMPrune(14, 22).schedule(28) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("layer", "num_layers", "wanted"),
    [(0.5, 28, 14), (22 / 28, 28, 22), (1.0, 6, 6), (1, 6, 1), (0.0, 6, 0), (0, 6, 0)],
)
def test_a_float_is_a_fraction_and_an_int_an_index(layer, num_layers, wanted):
    assert layer_index(layer, num_layers) == wanted


@settings(deadline=None, max_examples=60)
@given(start=layers, end=layers, interval=st.integers(1, 9), num_layers=st.integers(1, 100))
def test_ranges_stay_within_the_model(start, end, interval, num_layers):
    skip = OperatorSkip(ffn=LayerRange(start, end, interval))
    try:
        InferenceConfig(skip=skip).check(spec(num_layers))
    except ConfigError:
        return
    found = skip.ffn.layers(num_layers)
    assert all(0 <= i < num_layers and i % interval == 0 for i in found)
    assert list(found) == sorted(set(found))


def test_configs_are_frozen():
    config = InferenceConfig.from_preset("balanced")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.merge = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.merge.ratio = 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: V2PE("0.1"),
        lambda: V2PE(True),
        lambda: V2PE(None),
        lambda: LookM(budget=True),
        lambda: LookM(text_prior="no"),
        lambda: AIMPrune(temperature=NAN),
        lambda: AIMPrune(temperature="0.1"),
        lambda: AIMPrune(iterations=2.5),
        lambda: AIMPrune(iterations=NAN),
        lambda: InferenceConfig(prune=AIMPrune(start=NAN)).check(spec(6)),
        lambda: InferenceConfig(prune=AIMPrune(end=INF)).check(spec(6)),
        lambda: InferenceConfig(skip=OperatorSkip(ffn=LayerRange(start=NAN))).check(spec(6)),
        lambda: InferenceConfig(skip=OperatorSkip(ffn=LayerRange(interval=1.5))).check(spec(6)),
        lambda: InferenceConfig(skip=OperatorSkip(ffn=LayerRange(interval="2"))).check(spec(6)),
        lambda: InferenceConfig(merge=AIMMerge),  # the class, not an instance
        lambda: InferenceConfig.from_dict({"merge": "AIMMerge"}),
        lambda: InferenceConfig.from_dict({"merge": 5}),
        lambda: InferenceConfig.from_dict({"merge": {"technique": ["AIMMerge"]}}),
        lambda: InferenceConfig.from_dict({"skip": {"technique": "OperatorSkip", "ffn": {"first": 1}}}),
    ],
)
def test_wrong_types_are_refused(make):
    with pytest.raises(ConfigError):
        make()
