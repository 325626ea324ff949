"""Tables of the yardstick: seeds pooled, its column beside the bundled model's, or a sentence that there is none."""

import csv

import pytest

from benchmarks import common
from benchmarks.tables import needle, overview, presets, smol
from mminfer.bench.protocols import Protocol
from mminfer.measured import Measured

COUNTS = {  # setting -> questions, right, full right, stayed; for each of two seeds
    "off": ((40, 30, 30, 30), (60, 45, 45, 45)),
    "Digest 50 %": ((40, 8, 30, 6), (60, 40, 45, 39)),
    "H2O 20 %": ((40, 3, 30, 0), (60, 0, 45, 0)),
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Rows of the real model beside those that are there."""
    for path in common.RESULTS.glob("*.csv"):
        if path.stem not in presets.FILES:
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(smol, "RESULTS", tmp_path)
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    return tmp_path


def written(folder):
    origin = {**common.ORIGIN, "threads": 1}
    rows = []
    for setting, seeds in COUNTS.items():
        for seed, (asked, *counts) in enumerate(seeds):
            for pages, kind in ((smol.ALL, smol.ALL), ("dense text", "code"), ("pictures", "picture")):
                named = dict(zip(("right", "full_right", "stayed"), counts, strict=True))
                row = {"model": smol.PIXELS, "setting": setting, "protocol": "next-turn", "seed": seed, "pages": pages}
                figures = {"kind": kind, "questions": asked, "same": 50, "kl": seed + 1, "cache_kept": 25}
                rows.append(row | figures | named | origin)
    with (folder / "smol.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def line_of(table, name):
    return next(line for line in table.splitlines() if line.startswith(f"| {name} |"))


def test_without_rows_tables_say_so(results):
    assert needle.budgets(Protocol.NEXT_TURN).endswith(smol.NOTHING)
    assert overview.techniques().endswith(smol.NOTHING)
    for table in (smol.abilities(), smol.rules(Protocol.STREAMED), smol.by_kind(Protocol.NEXT_TURN)):
        assert smol.NO_ROWS in table and "|" not in table


def test_its_column_stands_beside_the_bundled_models(results):
    written(results)
    table = needle.budgets(Protocol.NEXT_TURN)
    assert line_of(table, "rule").endswith("| KL, 5 % | real model, 50 % | real model, 30 % | real model, 20 % | "
                                           "real model, 10 % | real model, 5 % |")  # fmt: skip
    assert line_of(table, "nothing evicted").endswith("| 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |")
    assert line_of(table, "Digest").endswith("| 60.0 |  |  |  |  |")  # 45 of 75
    assert line_of(table, "H2O").endswith("|  |  | 0.0 |  |  |")
    assert "percent of 75 right answers" in table
    assert line_of(overview.techniques(), "Digest, ours").endswith("| 60.0 |")
    assert needle.budgets(Protocol.STREAMED).endswith(smol.NOTHING)


def test_what_presets_kept(results, monkeypatch):
    """Found by what a preset sets, under whatever name that was measured; all seeds together."""
    written(results)
    lines = presets.measured().splitlines()
    assert lines[0] == "preset,stayed,of,entries,commit"
    commit = common.ORIGIN["commit"]
    assert lines[1:] == [f"digest-50,45,75,25.0,{commit}", f"h2o-20,0,75,25.0,{commit}"]
    (results / "smol.csv").unlink()
    assert presets.measured().splitlines() == lines[:1]
    rows = {"digest-50": Measured("digest-50", 45, 75, 25.0, "a"), "regions": Measured("regions", 74, 75, 70.0, "b")}
    monkeypatch.setattr(presets, "measured_presets", lambda: rows)
    table = presets.presets()
    assert line_of(table, "`digest-50`").endswith("| **fails there**: 60 % of 75 answers, with 25 % of the entries |")
    assert line_of(table, "`regions`").endswith("| 99 % of 75 answers, with 70 % of the entries |")
    assert line_of(table, "`off`").endswith("|  |")
    assert line_of(table, "`balanced`").endswith("| not measured on a real model |")
    assert table.endswith("Commit `a`, `b`.")
    assert "`regions` (99 %)" in presets.choices() and "`balanced` (not measured)" in presets.choices()


def test_a_setting_is_found_by_its_other_name(results):
    written(results)
    assert smol.kept("digest-50", Protocol.NEXT_TURN) == smol.kept("Digest 50 %", Protocol.NEXT_TURN) == "60.0"
    assert smol.kept("nothing of ours", Protocol.NEXT_TURN) == smol.kept("balanced", Protocol.NEXT_TURN) == ""


def test_replay_stands_on_the_front_page_where_it_was_measured(results):
    rows = common.read_rows("replay")
    assert line_of(overview.techniques(), "Replay, ours").count(" % |") == 1
    (results / "replay.csv").unlink()
    assert "Replay" not in overview.techniques()
    with (results / "replay.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            if row["setting"] in ("off", "Replay 30 %", "Replay 20 %") and row["images"] == "16":
                right = {"101": 80, "102": 90, "103": 100}[row["seed"]]
                writer.writerow(row | {"accuracy": right, "questions": 50 if row["seed"] == "103" else 100})
    told = overview.techniques()
    assert line_of(told, "Replay, ours").split("|")[5].strip() == "88.0"
    assert "(Replay: 250 questions, of which the host's own tokens get 88.0 %, commit" in told


def test_seeds_are_pooled_by_their_questions(results):
    written(results)
    line = line_of(smol.rules(Protocol.NEXT_TURN), "`Digest 50 %`")
    assert line == "| `Digest 50 %` | 60.0 (49 to 70) | 75 | 50.0 | 1.600 | 25 % |"
    assert line_of(smol.abilities(), "dense text").endswith("| code | 100 | 75.0 |")
    assert line_of(smol.by_kind(Protocol.NEXT_TURN), "`H2O 20 %`").endswith("| 0.0 | 0.0 | 0.0 | 0.0 |")
    assert "seed 0 or 1" in smol.rules(Protocol.NEXT_TURN)
