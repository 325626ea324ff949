"""The benchmark of calibrations: its rows on a small space, and its tables."""

import argparse

import pytest

from benchmarks import common
from benchmarks.canaries import files
from benchmarks.quality import calibrated, calibrated_models
from benchmarks.tables import calibrated as tables
from mminfer import AIMMerge, InferenceConfig
from mminfer.bench.protocols import Protocol
from mminfer.calibration import sensitivity
from mminfer.calibration.space import Family
from mminfer.technique import Stage


@pytest.fixture
def args(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sensitivity, "families", lambda spec, target: {Stage.MERGE: [Family((AIMMerge(0.5),))]})
    monkeypatch.setattr("mminfer.calibration.beside.PRESETS", {"aim-merge": InferenceConfig(merge=AIMMerge(0.3))})
    return argparse.Namespace(
        targets=["flops"], kl=[0.5], seeds=[1], samples=6, held_out=0.5, unseen=4, no_presets=False
    )


def test_rows(args):
    """A calibration and what became of its promise, then the presets, on the same samples."""
    made = list(calibrated.rows(calibrated_models.subject_of("nano"), args))
    assert [row["setting"] for row in made] == ["flops 0.5", "off", "aim-merge"]
    found, off, preset = made
    assert found["kept"] == 1 and float(found["unseen_kl"]) <= 0.5 and found["held_out"] == 3 and found["flops"] < 100
    assert off["unseen_kl"] == "0" and off["flops"] == off["time"] == off["cache"] == 100
    assert off["right"] == off["full_right"] > 0 and preset["flops"] < 70 and preset["kept"] == ""
    assert all(row.keys() == found.keys() and set(calibrated.KEY) <= row.keys() for row in made)
    of = files.canaries_of("calibrated").of
    config = InferenceConfig.from_json(of({name: str(value) for name, value in found.items()}))
    assert config.calibrated_on is None and config.skip is not None
    assert of({"model": "SmolLM2", "target": "flops"}) == ""


def test_other_models_are_asked_alike():
    pytest.importorskip("sklearn")
    name = next(iter(calibrated_models.GEOMETRIES))
    subject = calibrated_models.subject_of(name)
    assert subject.engine.adapter.spec.num_layers == 10 and subject.samples(2, 1)[0].is_right is None


def row(model, setting, target, protocol, kl, loss, flops, kept=1):
    figures = {"unseen_kl": loss, "flops": flops, "time": flops, "cache": 50, "right": 20, "full_right": 24}
    told = {"kl": kl, "bound": 0.04, "kept": kept, "samples": 24, "held_out": 16, "unseen": 48} if target else {}
    own = {"model": model, "setting": setting, "target": target, "protocol": protocol, **figures, **told}
    return {name: str(value) for name, value in {**own, "seed": 1 if target else "", **common.ORIGIN}.items()}


def test_tables(monkeypatch):
    monkeypatch.setattr(tables, "_rows", list)
    for table in (tables.promises(), tables.verdicts(), tables.beside("flops")):
        assert table == tables.NO_ROWS
    made = [
        row("nano", "flops 0.05", "flops", "in-prompt", 0.05, 0.02, 20),
        row("nano", "flops 0.05", "flops", "in-prompt", 0.05, 0.06, 30, kept=0),
        row("nano", "off", "", "in-prompt", "", 0, 100),
        row("nano", "fast", "", "in-prompt", "", 0.03, 25),
        row("nano", "aim", "", "in-prompt", "", 0.03, 15),
        row("nano", "lookm-20", "", "next-turn", "", 0.03, 15),
    ]
    monkeypatch.setattr(tables, "_rows", lambda: made)
    assert "| nano | flops | 0.05 | 2 | 1 of 2 | 0.04 | 0.04 | 0.06 | 25 % | 40 of 48 |" in tables.promises()
    assert "| nano | flops | 1 of 2 | `aim` |" in tables.verdicts()
    lines = [line for line in tables.beside("flops").splitlines() if line.startswith("| nano")]
    assert [line.split("|")[2].strip() for line in lines] == ["`aim`", "**flops 0.05**", "`fast`", "`off`"]


def test_answers_in_the_next_turn():
    pytest.importorskip("sklearn")
    judge = calibrated.Judge.of(calibrated_models.subject_of("nano"), Protocol.NEXT_TURN, 4)
    figures = judge.figures(InferenceConfig.from_preset("replay-20"))
    assert judge.full == 4 and float(figures["unseen_kl"]) > 0 and 15 < figures["cache"] < 30 and figures["flops"] > 100
