"""mminfer calibrate, and what the other commands make of its file."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from mminfer import InferenceConfig
from mminfer.calibration import Calibration, beside, calibrating, sensitivity
from mminfer.calibration.space import Family
from mminfer.cli.main import app
from mminfer.nano import samples_path
from mminfer.technique import Stage
from mminfer.tokens.merge import AIMMerge

pytest.importorskip("sklearn")
run = CliRunner().invoke


@pytest.fixture(autouse=True)
def small_space(monkeypatch):
    merges = {Stage.MERGE: [Family((AIMMerge(0.5),))]}
    monkeypatch.setattr(sensitivity, "families", lambda spec, target: merges)
    monkeypatch.setattr(beside, "PRESETS", {})


@pytest.fixture
def lines(tmp_path):
    """Samples of nano's own pictures, as a file beside them."""
    names = sorted(path.name for path in samples_path().glob("*.png"))[:4]
    for name in names:
        Image.open(samples_path() / name).save(tmp_path / name)
    made = [{"prompt": f"{n[:2]}: What digit is in image {n[:2]}?", "images": [n]} for n in names]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, made)))
    return tmp_path / "samples.jsonl"


def test_from_samples_to_settings_to_a_checked_promise(tmp_path, lines):
    out, plot = tmp_path / "settings.json", tmp_path / "found.png"
    told = run(
        app, ["calibrate", "--samples", str(lines), "--target", "flops", "--kl", "0.5", "--out", str(out),
              "--plot", str(plot)]
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert f"written: {out}" in told.stdout and "confidence" in told.stdout and plot.exists()
    assert not (tmp_path / "settings.json.part").exists()
    found = Calibration.load(out)
    assert found.saves and found.promise.kl == 0.5 and InferenceConfig.from_file(out) == found.config
    again = run(app, ["bench", "--settings", str(out), "--samples", str(lines), "--repeats", "0", "--images", "1",
                      "--contexts", "1", "--questions", "1", "--json"])  # fmt: skip
    assert again.exit_code == 0, again.output
    promise = json.loads(again.stdout)["promises"][str(out)]
    assert promise["held_out"] == 4 and promise["kept"] == (promise["held_out_kl"] <= 0.5)
    shown = run(app, ["inspect", "--config", str(out), "--out", str(tmp_path / "page"), "--max-new-tokens", "1"])
    assert shown.exit_code == 0 and (tmp_path / "page" / "calibration.png").exists()
    answered = run(app, ["generate", "--config", str(out), "--max-new-tokens", "1"])
    assert answered.exit_code == 0 and "calibrated on this model" in answered.stdout


def test_a_stop_leaves_the_file_as_it_was(tmp_path, lines, monkeypatch):
    out = tmp_path / "settings.json"
    out.write_text("before")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrating._Calibrating, "_checked", stop)
    told = run(app, ["calibrate", "--samples", str(lines), "--target", "flops", "--out", str(out)])
    assert told.exit_code == 130 and out.read_text() == "before" and (tmp_path / "settings.json.part").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kl", "0"], "kl=0.0: wanted a positive number"),
        (["--target", "speed"], "wanted one of flops, latency, cache"),
        (["--samples", "none.jsonl"], "No such file"),
        (["--samples", "a.jsonl", "--image", "a.png"], "pass one or the other"),
        (["--image", "a.png"], "pass --prompt TEXT as well"),
        (["--protocol", "streamed"], "wanted some of in-prompt, next-turn"),
        (["--model", "other"], "no samples: pass --samples FILE"),
        (["--out", "no/such/folder.json"], "there is no folder"),
        (["--plot", "a.xyz"], "no kind of picture"),
    ],
)
def test_refusals(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    told = run(app, ["calibrate", "--images", "1", "--contexts", "4", *arguments])
    assert told.exit_code == 2 and message in " ".join(told.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_promises_need_settings(tmp_path):
    told = run(app, ["bench", "--samples", "a.jsonl"])
    assert told.exit_code == 2 and "without --settings" in " ".join(told.stderr.split())
    bare = tmp_path / "bare.json"
    bare.write_text(InferenceConfig(merge=AIMMerge(0.5)).to_json())
    told = run(app, ["bench", "--settings", str(bare), "--repeats", "0", "--images", "1", "--contexts", "1"])
    assert told.exit_code == 2 and "no calibration" in " ".join(told.stderr.split())
