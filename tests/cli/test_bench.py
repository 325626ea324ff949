"""`mminfer bench`: tables, rows, plots, and requests that are refused before a model is loaded."""

import csv
import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from mminfer import Engine, InferenceConfig
from mminfer.bench.plots import Panels, Point, frontier, pareto_plot
from mminfer.bench.sweeps import cache_sweeps, token_sweeps
from mminfer.cli.main import app
from mminfer.needle import runner

pytest.importorskip("sklearn")

SMALL = ["--images", "3", "--new-tokens", "2", "--contexts", "1", "--questions", "1"]


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
    return CliRunner().invoke(app, ["bench", *map(str, args)])


def refused(*args):
    result = bench(*args)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (result.exit_code, result.exception)
    assert result.stdout == "" and "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.mark.slow
def test_tables_of_time_memory_and_fidelity(loaded):
    result = bench(*SMALL, "--repeats", 1, "--preset", "aim", "--preset", "lookm-20", "--protocol", "streamed")
    assert result.exit_code == 0, (result.stderr, result.exception)
    for told in ("TTFT", "TPOT", "cache MiB", "peak MiB", "fidelity, streamed", "aim", "lookm-20", "host"):
        assert told in result.stdout
    assert "next-turn" not in result.stdout


@pytest.mark.slow
def test_one_json_object_and_a_csv_of_the_same_rows(loaded, tmp_path):
    path = tmp_path / "rows.csv"
    result = bench(*SMALL, "--repeats", 1, "--preset", "aim", "--json", "--csv", path)
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    assert InferenceConfig.from_dict(report["settings"]["aim"]) == InferenceConfig.from_preset("aim")
    host, aim = report["rows"]
    assert (host["setting"], aim["setting"], aim["protocol"]) == ("host", "aim", "next-turn")
    assert host.keys() == aim.keys() and host["kl"] == "" and aim["kl"] > 0
    assert aim["prompt_gflop"] < host["prompt_gflop"] and aim["ttft_ms_p20"] <= aim["ttft_ms_p80"]
    with path.open() as file:
        assert [row["setting"] for row in csv.DictReader(file)] == ["host", "aim"]


def test_own_files(loaded, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    ask = ["--image", tmp_path / "a.png", "--prompt", "What digit is it?", "--new-tokens", 2]
    result = bench(*ask, "--preset", "off", "--repeats", 0, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    (row,) = json.loads(result.stdout)["rows"]
    assert row["prompt"] == "What digit is it?" and row["kl"] < 1e-6 and "ttft_ms_p50" not in row


def test_a_chunk_that_no_image_fits_is_refused_before_anything_is_timed(loaded):
    assert "--chunk-size 20: an image of this model takes up to 64 tokens" in refused(
        *SMALL, "--preset", "off", "--protocol", "streamed", "--chunk-size", 20
    )


def test_settings_named_like_other_rows_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "host").write_text(InferenceConfig().to_json())
    assert "rows of that name are something else's" in refused("--config", "host")


def test_what_a_model_cannot_take_is_left_out_of_what_nobody_named(loaded, monkeypatch):
    monkeypatch.setattr(runner, "refusals", lambda model, settings: {"aim": "too much for it"})
    result = bench(*SMALL, "--repeats", 0, "--json")
    assert result.exit_code == 0 and "left out: aim: too much for it" in result.stderr
    assert [row["setting"] for row in json.loads(result.stdout)["rows"]] == ["off", "lookm-20", "balanced"]
    monkeypatch.setattr(runner, "refusals", lambda model, settings: dict.fromkeys(settings, "no"))
    assert "takes none of the default settings" in refused(*SMALL)


@pytest.mark.slow
def test_a_plot_has_the_baselines(loaded, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    few = [sweep for sweep in cache_sweeps() if sweep.rule in ("LOOK-M pivot", "H2O")]
    monkeypatch.setattr("mminfer.bench.sweeps.cache_sweeps", lambda: few)
    monkeypatch.setattr("mminfer.bench.sweeps.token_sweeps", lambda: ())
    result = bench(*SMALL, "--plot", tmp_path / "p.png", "--json", "--delta", "1/4")
    assert result.exit_code == 0, (result.stderr, result.exception)
    report = json.loads(result.stdout)
    assert {setting["positions"]["delta"] for setting in report["settings"].values()} == {0.25}
    rows = report["rows"]
    assert [r["setting"] for r in rows] == [
        f"{rule} {s} %" for rule in ("LOOK-M pivot", "H2O") for s in (50, 20, 10, 5)
    ]
    assert Image.open(tmp_path / "p.png").width > 1000


def test_every_rule_of_the_plots_is_there_with_its_baselines():
    for sweeps in (token_sweeps(), cache_sweeps()):
        assert {sweep.baseline for sweep in sweeps} == {True, False}
        names = [name for sweep in sweeps for name in sweep.settings]
        assert len(set(names)) == len(names)


def test_the_frontier_is_what_nobody_beats():
    def point(cost, loss):
        return Point("a", {"c": cost}, loss)

    best = [point(10, 5), point(20, 3), point(50, 1)]
    beaten = [point(10, 6), point(30, 3), point(40, 4), point(60, 1)]
    assert frontier([*beaten, *best], "c") == best


def test_a_plot_of_points(tmp_path):
    pytest.importorskip("matplotlib")
    points = [Point("ours", {"x": 20, "y": 100}, 0.5), Point("chance", {"x": 20, "y": 100}, 0.0, True)]
    pareto_plot([Panels("t", points, "loss")] * 2, ["x", "y"], tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").height > 500


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--preset", "nope"], "unknown preset 'nope'"),
        (["--preset", "off", "--preset", "off"], "passed twice"),
        (["--protocol", "later"], "in-prompt, next-turn, streamed"),
        (["--prompt", "What?"], "without files"),
        (["--image", "a.png"], "--prompt"),
        (["--csv", "/nowhere/rows.csv"], "there is no folder"),
        (["--plot", "/nowhere/p.png"], "there is no folder"),
        (["--plot", "p.png", "--contexts", "0", "--repeats", "1"], "a plot needs fidelity"),
        (["--repeats", "0", "--contexts", "0"], "nothing is left to measure"),
        (["--preset", "off", "needle"], "--preset: wanted behind `needle`"),
        (["--model", "/nowhere"], "no model"),
        (["--plot", "p.foo"], "no kind of picture"),
        (["--csv", "/tmp"], "no file can be written"),
        (["--image", "/nowhere.png", "--prompt", "What?"], "/nowhere.png"),
        (["--image", "a.png", "--prompt", "What?", "--seed", "3"], "--seed beside files"),
        (["--preset", "v2pe-auto", "--protocol", "streamed"], "nobody sees the whole prompt"),
        (["--plot", "p.png", "--delta", "1", "--delta", "1/4"], "pass one --delta"),
        (["--json", "--csv", "x.csv", "needle"], "--json, --csv: wanted behind `needle`"),
    ],
)
def test_wrong_requests(args, told):
    assert told in refused(*args)
