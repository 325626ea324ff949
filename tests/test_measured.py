"""What presets were measured to keep: looked up by what is set, whatever it is called."""

import pytest

from mminfer import AIMMerge, ConfigError, Digest, InferenceConfig, LookM, measured
from mminfer.config import PRESETS
from mminfer.measured import ENOUGH, Measured, measured_of, measured_presets, sentence

LOST = Measured("lookm-20", 2, 100, 19.4, "abc1234")
WORSE = Measured("aim-merge", 1, 100, 25.0, "abc1234")
GOOD = Measured("replay-30", 95, 100, 30.2, "abc1234")
GONE = Measured("no-preset-any-more", 0, 100, 1.0, "abc1234")


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(measured, "measured_presets", lambda: {row.preset: row for row in (LOST, WORSE, GOOD, GONE)})


def test_rows_of_the_package_are_of_presets():
    rows = measured_presets()
    assert set(rows) <= set(PRESETS) - {"off"}
    assert all(0 <= row.stayed <= row.of and row.of > 0 and 0 < row.entries <= 100 for row in rows.values())
    assert all(row.fails == (row.kept < ENOUGH) for row in rows.values())


def test_settings_are_known_by_what_they_set(table):
    assert measured_of(InferenceConfig.from_preset("replay-30")) is GOOD
    assert measured_of(InferenceConfig(cache=LookM(0.1, 0.1, merge="pivot"))) is LOST
    assert measured_of(InferenceConfig(cache=LookM(0.2, 0.1, merge="pivot"))) is None
    assert measured_of(InferenceConfig()) is None


def test_a_part_that_failed_tells_of_the_whole_and_one_that_held_does_not(table):
    merge, lookm = AIMMerge(), LookM(0.1, 0.1, merge="pivot")
    assert measured_of(InferenceConfig(merge=merge, cache=lookm)) is WORSE
    assert measured_of(InferenceConfig(merge=AIMMerge(0.5), cache=lookm)) is LOST
    held = InferenceConfig(merge=AIMMerge(0.5), cache=PRESETS["replay-30"].cache)
    assert measured_of(held) is None


def test_the_line(table):
    assert sentence(PRESETS["lookm-20"]) == (
        "lookm-20 kept 2 % of the right answers of a real model that reads pages (SmolLM2-135M, 100 answers); "
        "measure it on yours: mminfer bench --model PATH --preset lookm-20"
    )
    assert sentence(PRESETS["digest-50"]).startswith("digest-50 was not measured on a real model; measure it")
    assert sentence(InferenceConfig(cache=Digest(0.31))) == (
        "this setting was not measured on a real model; measure it on yours: mminfer bench --model PATH --config FILE"
    )
    whole = sentence(InferenceConfig(merge=AIMMerge(), cache=Digest(0.31)))
    assert whole.startswith("aim-merge, a part of this setting, kept 1 % of ") and whole.endswith("--config FILE")
    assert sentence(InferenceConfig()) is None


def test_only_settings_are_asked_about():
    for ask in (measured_of, sentence):
        with pytest.raises(ConfigError, match="no InferenceConfig: pass InferenceConfig"):
            ask("balanced")
