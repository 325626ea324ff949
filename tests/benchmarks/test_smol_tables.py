"""Tables of the yardstick: seeds pooled, its column beside the bundled model's, or a sentence that there is none."""

import csv

import pytest

from benchmarks import common
from benchmarks.tables import needle, overview, smol
from mminfer.bench.protocols import Protocol

COUNTS = {  # setting -> questions, right, full right, stayed; for each of two seeds
    "off": ((40, 30, 30, 30), (60, 45, 45, 45)),
    "Digest 50 %": ((40, 8, 30, 6), (60, 40, 45, 39)),
    "H2O 20 %": ((40, 3, 30, 0), (60, 0, 45, 0)),
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Rows of the real model beside those that are there."""
    for path in common.RESULTS.glob("*.csv"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "smol.csv").unlink(missing_ok=True)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(smol, "RESULTS", tmp_path)
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


def test_seeds_are_pooled_by_their_questions(results):
    written(results)
    line = line_of(smol.rules(Protocol.NEXT_TURN), "`Digest 50 %`")
    assert line == "| `Digest 50 %` | 60.0 (49 to 70) | 75 | 50.0 | 1.600 | 25 % |"
    assert line_of(smol.abilities(), "dense text").endswith("| code | 100 | 75.0 |")
    assert line_of(smol.by_kind(Protocol.NEXT_TURN), "`H2O 20 %`").endswith("| 0.0 | 0.0 | 0.0 | 0.0 |")
    assert "seed 0 or 1" in smol.rules(Protocol.NEXT_TURN)
