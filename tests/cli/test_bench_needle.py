"""`mminfer bench needle` and the runner behind it, on the bundled model and on a random one without videos."""

import csv
import json
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from mminfer import V2PE, Engine, InferenceConfig, LookM
from mminfer.cli.main import app
from mminfer.needle import Labels, MMNeedle, Temporal, runner
from mminfer.needle.runner import Asking, run
from mminfer.needle.scores import rows_of

pytest.importorskip("sklearn")

LABELS = Labels(depths=(0.0, 1.0))
SMALL = ["--samples", "1", "--images", "3", "--depths", "0,1"]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def loaded(monkeypatch, nano_engine):
    """The bundled model, loaded once."""

    def load(model, settings, device, dtype):
        return {name: Engine(nano_engine.model, nano_engine.processor, config) for name, config in settings.items()}

    monkeypatch.setattr(runner, "load", load)


def bench(*args):
    return CliRunner().invoke(app, ["bench", "needle", *map(str, args)])


def report(*args):
    result = bench(*args, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def refused(*args):
    result = bench(*args)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (result.exit_code, result.exception)
    assert result.stdout == "" and "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def test_nano_finds_needles_in_either_turn(nano_engine):
    """Few pictures, many questions: far above chance, and with nothing compressed the same answers by both ways."""
    in_prompt, next_turn = (
        run({"off": nano_engine}, LABELS, [4], 2, 0, Asking(next_turn=turn)) for turn in (False, True)
    )
    assert [a.text for a in in_prompt] == [a.text for a in next_turn]
    assert all(a.read_ms is None and a.ms > 0 for a in in_prompt) and all(a.read_ms > 0 for a in next_turn)
    assert all(a.cache_bytes == a.full_cache_bytes > 0 for a in in_prompt + next_turn)
    right = [hit for a in in_prompt for hit in a.verdict.right.values()]
    assert len(right) == 2 * (2 + 1 + 2 + 2) and sum(right) / len(right) > 0.6


def test_settings_answer_the_same_questions(nano_engine):
    small = Engine(nano_engine.model, nano_engine.processor, InferenceConfig(cache=LookM(0.1, 0.1)))
    answers = run({"off": nano_engine, "small": small}, LABELS, [6], 1, 0, Asking(next_turn=True))
    off, compressed = ([a for a in answers if a.setting == name] for name in ("off", "small"))
    assert [a.question for a in off] == [a.question for a in compressed]
    assert compressed[0].cache_bytes < 0.5 * off[0].cache_bytes
    assert compressed[0].full_cache_bytes == off[0].full_cache_bytes


def test_the_blind_see_no_pictures(nano_engine):
    answers = run({"off": nano_engine}, LABELS, [3], 1, 0, Asking(blind=True, max_new_tokens=2))
    blind = [a for a in answers if a.setting == "blind"]
    assert len(blind) == len(answers) / 2
    seeing = answers[0].full_cache_bytes - blind[0].full_cache_bytes
    assert seeing == pytest.approx(3 * 66 / (3 * 66 + 60) * answers[0].full_cache_bytes, rel=0.15)
    assert all(a.verdict.right["Q3"] for a in blind if a.question.kind == "q3")  # facts are text
    assert not any(a.verdict.right["Q1"] for a in blind if a.question.kind == "q1")


@pytest.mark.parametrize("next_turn", [False, True])
@pytest.mark.parametrize(
    "protocol", [MMNeedle(picture_size=16), Temporal(picture_size=16, depths=(0.5,)), Labels(depths=(0.5,))]
)
def test_a_random_model_of_another_family_is_asked(tiny_engine, protocol, next_turn):
    assert not tiny_engine.supports_video
    answers = run({"off": tiny_engine}, protocol, [2], 2, 0, Asking(next_turn=next_turn, max_new_tokens=2))
    rows = rows_of(answers, protocol)
    assert {row.metric for row in rows} == set(protocol.chance(2))
    assert all(row.right <= row.samples - row.unparsable for row in rows)
    per_token = answers[0].full_cache_bytes // (2 * 16 + 40)
    assert per_token > 0 and all(a.cache_bytes == a.full_cache_bytes for a in answers)


def test_nano_gets_frames_as_a_video(nano_engine, monkeypatch):
    assert nano_engine.supports_video
    kinds, generate = [], nano_engine.generate

    def watched(messages, **kwargs):
        parts = list(messages[0]["content"])
        kinds.append([part["type"] for part in parts])
        return generate([{"role": "user", "content": parts}], **kwargs)

    monkeypatch.setattr(nano_engine, "generate", watched)
    run({"off": nano_engine}, Temporal(picture_size=32, depths=(0.5,)), [3], 1, 0, Asking(max_new_tokens=1))
    assert kinds == [["video", "text"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("next_turn", [False, True])
def test_contexts_in_chunks_give_the_same_answers(nano_engine, next_turn):
    whole, chunked = (
        run({"off": nano_engine}, LABELS, [6], 1, 0, Asking(next_turn=next_turn, prefill_chunk_size=size))
        for size in (None, 140)
    )
    assert [a.text for a in whole] == [a.text for a in chunked]


def test_json_and_csv_hold_the_rows(loaded, tmp_path):
    path = tmp_path / "rows.csv"
    args = [*SMALL, "--next-turn", "--preset", "off", "--preset", "lookm-20", "--delta", "1/16", "--csv", path]
    found = report(*args, "--max-new-tokens", 2, "--seed", 5)
    assert found["model"] == "nano" and found["protocol"] == "labels" and found["turn"] == "next-turn"
    assert found["seed"] == 5 and found["depths"] == [0.0, 1.0]
    names = ["off, delta 1/16", "lookm-20, delta 1/16"]
    assert list(found["settings"]) == names
    configs = [InferenceConfig.from_dict(setting) for setting in found["settings"].values()]
    assert configs == [replace(InferenceConfig.from_preset(p), positions=V2PE(1 / 16)) for p in ("off", "lookm-20")]
    rows = found["rows"]
    cells = {(row["setting"], row["metric"], row["depth"]): row for row in rows}
    assert {key[2] for key in cells} == {None, 0.0, 1.0}
    for name in names:
        both = cells[name, "Q1", None]
        assert both["samples"] == cells[name, "Q1", 0.0]["samples"] + cells[name, "Q1", 1.0]["samples"] == 2
        assert both["low"] <= both["accuracy"] == both["right"] / 2 <= both["high"] and both["chance"] == 1 / 3
    assert cells[names[1], "Q2", None]["cache_bytes"] < cells[names[0], "Q2", None]["cache_bytes"]
    assert {a["setting"] for a in found["answers"]} == set(names) and all("expected" in a for a in found["answers"])
    with path.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows) and written[0]["torch"] == torch.__version__
    assert [row["accuracy"] for row in written] == [str(row["accuracy"]) for row in rows]


def test_tables_say_how_often_how_sure_and_by_what_luck(loaded):
    result = bench(*SMALL, "--images", 5, "--max-new-tokens", 2)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert result.stdout.startswith("labels on nano, in-prompt\n")
    assert "3 images: percent right" in result.stdout and "5 images: percent right" in result.stdout
    assert re.search(r"metric +setting +all +n +depth 0 +depth 1 +chance +no answer", result.stdout)
    assert re.search(r"Q1 +off +[\d.]+ +2 +[\d.]+ +[\d.]+ +33\.3 +\d", result.stdout)
    assert re.search(r"\d+-\d+ +1 each", result.stdout)
    assert re.search(r"images +setting +ms +ms to read +cache", result.stdout)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--protocol", "text"], "--protocol text: wanted one of mmneedle, temporal, labels"),
        (["--grid", 3], "--grid 3: labels has no such setting: leave it out"),
        (["--protocol", "mmneedle", "--grid", 0], "grid=0: wanted a whole number, 1 to 32"),
        (["--images", 4], "images=4: wanted 5 or more"),
        (["--depths", "0;1"], "--depths 0;1: wanted numbers"),
        (["--depths", "2"], "depth 2.0: wanted a number from 0"),
        (["--delta", "x"], "--delta x: wanted a number such as 1/16"),
        (["--delta", "1/0"], "--delta 1/0: wanted a number such as 1/16"),
        (["--delta", "7"], "ConfigError"),
        (["--preset", "turbo"], "unknown preset 'turbo'"),
        (["--preset", "off", "--preset", "off"], "passed twice"),
        (["--config", "/nowhere.json"], "--config /nowhere.json"),
        (["--csv", "/nowhere/rows.csv"], "--csv /nowhere/rows.csv: there is no folder"),
        (["--samples", 0], "--samples"),
    ],
)
def test_wrong_requests_are_refused_before_loading(monkeypatch, args, says):
    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(runner, "load", load)
    assert says in refused(*args)


def test_every_setting_is_checked_before_weights_are_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_: pytest.fail("weights were loaded"))
    path = tmp_path / "config.json"
    path.write_text('{"prune": {"technique": "AIMPrune", "start": 14, "end": 22}}')
    assert "a model of 6 layers" in refused(*SMALL, "--preset", "off", "--config", path)


def test_a_model_that_is_not_there_is_refused():
    assert "InputError: no model" in refused(*SMALL, "--model", "/nowhere/model")
    assert "InputError: no model" in refused(*SMALL, "--model", "/nowhere/model", "--delta", "1", "--delta", "1/4")
