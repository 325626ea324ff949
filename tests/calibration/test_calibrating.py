"""Calibrations of small spaces: the promise, the file, stopping in between, and what is refused."""

import copy
import dataclasses
import json
import math

import pytest
import torch

from mminfer import (
    AIMMerge,
    AIMPrune,
    Calibration,
    ConfigError,
    Engine,
    InferenceConfig,
    InputError,
    OperatorSkip,
    calibrate,
    patched,
)
from mminfer.bench.contexts import made_contexts
from mminfer.cache.lookm import LookM
from mminfer.calibration import Plan, beside, bounds, calibrating, recheck, sensitivity, trials
from mminfer.calibration.pictures import draw, left_out
from mminfer.calibration.samples import Split
from mminfer.calibration.space import Family, families
from mminfer.calibration.trials import Bench
from mminfer.models.fingerprint import fingerprint_of
from mminfer.technique import Stage

pytest.importorskip("sklearn")
SMALL = {
    Stage.MERGE: [Family((AIMMerge(0.5), AIMMerge(0.2)))],
    Stage.PRUNE: [Family((AIMPrune(start=3, end=4),))],
    Stage.CACHE: [Family((LookM(0.25, 0.25, merge="average"), LookM(0.1, 0.1, merge="average")))],
}


@pytest.fixture(autouse=True)
def small_space(monkeypatch):
    def small(spec, target):
        return {stage: own for stage, own in SMALL.items() if stage in families(spec, target)}

    monkeypatch.setattr(sensitivity, "families", small)
    monkeypatch.setattr(beside, "PRESETS", {"aim": InferenceConfig.from_preset("aim")})


def chats(count, seed, pictures=2):
    made = made_contexts(pictures, count, 4, seed, None)
    return [own.chat(own.questions[n % len(own.questions)]) for n, own in enumerate(made)]


def text_chats(count):
    return [
        [{"role": "user", "content": f"The code of stone is {n}2. What is the code of stone?"}] for n in range(count)
    ]


@pytest.fixture(scope="module")
def found(nano_engine):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "families", lambda spec, target: {Stage.MERGE: SMALL[Stage.MERGE]})
        patch.setattr(beside, "PRESETS", {"aim": InferenceConfig.from_preset("aim")})
        return calibrate(nano_engine, chats(6, seed=3), kl=0.05, target="flops", progress=False)


def test_what_it_finds(nano_engine, found):
    assert found.saves and 0 < found.cost < 80 and found.config.skip is not None
    promise = found.promise
    assert promise.held_out_kl <= promise.bound <= promise.kl == 0.05 and promise.held_out == 3
    assert {point.kind for point in found.curve} == {"path", "part", "preset"}
    assert {name: sorted(own) for name, own in found.operators.items()} == {
        n: [*range(6)] for n in ("ffn", "attention")
    }
    assert "below 0.05 nats with 95 % confidence" in found.told() and "37 % of such contents" in found.told()
    assert [look.bound <= 0.05 for look in found.looks[:-1]] == [True] * (len(found.looks) - 1)
    assert found.off == InferenceConfig()
    engine = Engine(nano_engine.model, nano_engine.processor, found.config)
    (stats,) = [engine.generate(chat, max_new_tokens=1).stats for chat in chats(1, seed=3)]
    assert stats.prompt_flops < 0.85 * stats.full_prompt_flops


def test_the_promise_is_kept_on_samples_that_nobody_saw(nano_engine, found):
    told = recheck(nano_engine, found, chats(8, seed=99))
    assert told.held_out == 8 and told.held_out_kl <= told.kl
    broken = dataclasses.replace(found, config=dataclasses.replace(found.config, merge=AIMMerge(0.02)))
    assert recheck(nano_engine, broken, chats(4, seed=99)).held_out_kl > 0.05


def test_where_nothing_can_be_saved(nano_engine, monkeypatch):
    """Whatever is tried loses more than is allowed; or so few samples may not promise it."""
    own = calibrate(nano_engine, chats(4, seed=3), kl=1e-9, target="cache", progress=False)
    assert not own.saves and own.cost == 100 and own.promise.bound == own.promise.held_out_kl == 0
    assert own.told().endswith("every setting that was tried loses more, or costs no less cache. All is off.")
    monkeypatch.setattr(bounds, "PRIOR_SPREAD", 3.0)
    few = calibrate(nano_engine, chats(4, seed=3), kl=0.5, target="flops", progress=False)
    assert not few.saves and few.looks[0].held_out_kl <= 0.5 < few.looks[0].bound and len(few.looks) == 1
    assert "2 contents are too few to promise less than" in few.told()


def test_a_promise_is_checked_on_a_model_that_nobody_looked_at_yet(tiny_engine, found):
    """Of another family, whose layers' branches are found when settings want to leave one out."""
    fresh = Engine(copy.deepcopy(tiny_engine.model), tiny_engine.processor)
    skipping = dataclasses.replace(found, config=InferenceConfig(skip=OperatorSkip(ffn=(0,))))
    told = recheck(fresh, skipping, chats(4, seed=1, pictures=1))
    assert 0 < told.held_out_kl < math.inf and told.contents == 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_promises_of_several_seeds(nano_engine, seed):
    plan = Plan(protocols=("in-prompt", "next-turn"), seed=seed)
    own = calibrate(nano_engine, chats(8, seed=10 + seed), 0.02, "flops", progress=False, plan=plan)
    told = recheck(nano_engine, own, chats(8, seed=50 + seed))
    assert own.promise.bound <= 0.02 and told.held_out_kl <= 0.02


def test_entries_of_the_cache(nano_engine):
    own = calibrate(nano_engine, chats(4, seed=5), kl=1.0, target="cache", progress=False)
    assert own.config.skip is None and own.cost < 100 and own.operators == {}


def test_time_and_dense_text(nano_engine):
    """No visual token can leave where there is none: all is off, and said to be."""
    own = calibrate(nano_engine, text_chats(4), kl=0.05, target="latency", progress=False)
    assert not own.saves and own.cost == 100 and own.config == InferenceConfig()
    assert own.told().startswith("Nothing can be saved on these samples at KL 0.05") and own.promise.bound < 1e-6


def test_the_file(tmp_path, nano_engine, tiny_engine, found):
    path = tmp_path / "settings.json"
    found.save(path)
    assert Calibration.load(path) == found and Calibration.load(path).to_dict() == found.to_dict()
    config = InferenceConfig.from_file(path)
    assert config == found.config and config.calibrated_on == found.config.calibrated_on
    assert Engine.from_pretrained("nano", config).config is config
    with pytest.raises(ConfigError, match=r"were calibrated on internvl of 6 layers.*this model is llava"):
        Engine(tiny_engine.model, tiny_engine.processor, config)
    other = copy.deepcopy(nano_engine.model)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ConfigError, match=r"with other weights.*any_model=True"):
        Engine(other, nano_engine.processor, config)
    with pytest.raises(ConfigError, match="with other weights"), patched(other, config):
        pass
    any_model = InferenceConfig.from_file(path, any_model=True)
    assert Engine(other, nano_engine.processor, any_model).config == config
    with patched(copy.deepcopy(nano_engine.model).bfloat16(), config, verify=False):  # the same model in less
        pass


def test_files_that_are_none(tmp_path, found):
    path = tmp_path / "settings.json"
    path.write_text(InferenceConfig(merge=AIMMerge()).to_json())
    assert InferenceConfig.from_file(path) == InferenceConfig(merge=AIMMerge())
    with pytest.raises(ConfigError, match="bare settings, no calibration"):
        Calibration.load(path)
    for text, message in (
        ("{", "not JSON"),
        ('{"calibration": {}, "format": 2}', "format 2, this version reads 1"),
        ('{"calibration": {}, "format": 1, "config": {}}', '"model" is None'),
        (
            '{"calibration": {}, "format": 1, "config": {"x": 1}, "model": {"geometry": "a", "weights": "b"}}',
            "wanted an",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            InferenceConfig.from_file(path)
    with pytest.raises(InputError, match="No such file"):
        InferenceConfig.from_file(tmp_path / "none")
    for where, name, value in (("promise", "bound", "low"), ("promise", "kl", None), ("looks", 0, {"cost": "a"})):
        damaged = copy.deepcopy(found.to_dict())
        damaged["calibration"][where][name] = value
        path.write_text(json.dumps(damaged))
        with pytest.raises(InputError, match="a damaged calibration"):
            Calibration.load(path)
    damaged = found.to_dict()
    del damaged["calibration"]["promise"]["bound"]
    path.write_text(json.dumps(damaged))
    with pytest.raises(InputError, match="a damaged calibration"):
        Calibration.load(path)


def test_a_promise_is_of_no_other_settings_than_those_it_was_made_of(tmp_path, found):
    path, changed = tmp_path / "settings.json", found.to_dict()
    changed["config"] = InferenceConfig(merge=AIMMerge(0.01)).to_dict()
    path.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="its settings were changed since, so that its promise is of others"):
        Calibration.load(path)
    assert InferenceConfig.from_file(path).merge == AIMMerge(0.01)


def test_pictures_of_another_size_go_on_from_no_state(nano_engine, monkeypatch):
    parts, model = Split((), ()), fingerprint_of(nano_engine.adapter.spec, nano_engine.model)
    before = calibrating._identity(nano_engine, parts, Plan(), model)
    monkeypatch.setattr(nano_engine.processor.image_processor, "size", {"height": 64, "width": 64})
    after = calibrating._identity(nano_engine, parts, Plan(), model)
    assert [name for name in before if before[name] != after[name]] == ["processor"]


def test_a_stop_in_between(tmp_path, nano_engine, monkeypatch):
    """Model and files are as they were, and the next run measures nothing twice."""
    state, samples, outcome = tmp_path / "state", chats(4, seed=7), Bench._outcome
    left = 20

    def stopping(*args):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return outcome(*args)

    before = {name: id(module) for name, module in nano_engine.model.named_modules()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Bench, "_outcome", stopping)
        calibrate(nano_engine, samples, 0.05, "flops", progress=False, plan=Plan(state=state))
    assert state.exists() and before == {name: id(module) for name, module in nano_engine.model.named_modules()}
    with pytest.raises(InputError, match="another tokens"):
        calibrate(nano_engine, samples, 0.05, "flops", progress=False, plan=Plan(state=state, tokens=3))
    kept = json.loads(state.read_text())
    assert len(kept["outcomes"]) >= 4 and len(kept["numbers"]) >= 2
    found = calibrate(nano_engine, samples, 0.05, "flops", progress=False, plan=Plan(state=state, keep=True))
    assert found.promise.bound <= 0.05 and state.exists()
    with monkeypatch.context() as patch:
        patch.setattr(trials, "outcome_of", None)  # nothing is measured twice
        again = calibrate(nano_engine, samples, 0.05, "flops", progress=False, plan=Plan(state=state))
    assert again.config == found.config and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kl", [0, -0.1, math.nan, math.inf, "0.05", None, True])
def test_a_loss_that_is_no_positive_number(nano_engine, kl):
    with pytest.raises(ConfigError, match="wanted a positive number of nats"):
        calibrate(nano_engine, text_chats(4), kl=kl)


def test_what_else_is_refused(nano_engine):
    with pytest.raises(ConfigError, match="target='speed': wanted one of flops, latency, cache"):
        calibrate(nano_engine, text_chats(4), target="speed")
    with pytest.raises(InputError, match="0 samples of 0 different contents"):
        calibrate(nano_engine, [])
    with pytest.raises(ConfigError, match="engine of type"):
        calibrate(nano_engine.model, text_chats(4))
    for wrong in ({"protocols": ("streamed",)}, {"tokens": 0}, {"held_out": 1.0}, {"confidence": 0.5}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Plan(**wrong)
    with pytest.raises(InputError, match="a sample for next-turn is one message of the user's"):
        calibrate(nano_engine, text_chats(4), progress=False, plan=Plan(("next-turn",)))
    broken = copy.deepcopy(nano_engine.model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(InputError, match="the uncompressed model answers nan"):
        calibrate(Engine(broken, nano_engine.processor, verify=False), text_chats(4), progress=False)


def test_the_picture(tmp_path, found):
    pytest.importorskip("matplotlib")
    draw(found, tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert left_out(found, "ffn") == found.config.skip.ffn
    with pytest.raises(InputError, match="no kind of picture"):
        draw(found, tmp_path / "found.xyz")
