"""What replaying costs: every setting reads the same rows, and the table says what was measured."""

import csv
from itertools import count

import pytest

from benchmarks import common
from benchmarks.models import replay_cost
from benchmarks.models.replay_cost import PLAIN, SETTINGS, content_of, measure, rows_of
from benchmarks.tables import cost
from mminfer import Engine


def test_every_setting_reads_so_many_rows():
    plain = Engine.from_pretrained("nano")
    content = content_of(plain, 100)
    pages = [part["embedding"] for part in content if part["type"] == "embedding"]
    assert [len(page) for page in pages] == [64, 36]
    rows = measure(plain, "nano", 100, 2)
    assert [row["setting"] for row in rows] == list(SETTINGS) and len({row["tokens"] for row in rows}) == 1
    assert 100 < rows[0]["tokens"] < 140 and all(row["repeats"] == 2 and row["cpu_s_min"] > 0 for row in rows)


def test_shares_are_of_the_plain_pass_of_the_same_round():
    seconds = {PLAIN: [(1.0, 2.0), (4.0, 4.0), (2.0, 2.0)], "replay-30": [(2.5, 3.0), (6.0, 9.0), (4.0, 5.0)]}
    plain, replayed = rows_of("nano", 300, seconds)
    assert plain["extra_median"] == plain["extra_of_min"] == 0
    assert replayed["extra_median"] == 1.0  # of 1.5, 0.5 and 1
    assert replayed["extra_of_min"] == 1.5  # 2.5 for 1
    assert (replayed["cpu_s_median"], replayed["wall_s_min"], replayed["repeats"]) == (4.0, 3.0, 3)


def test_the_first_round_counts_not_and_every_other_goes_backwards(monkeypatch):
    read, clock = [], count()

    class Chat:
        class cache:
            tokens = (7,)

        def __init__(self, name):
            self.name = name

        def read(self, content):
            read.append(self.name)

    class Reader:
        def __init__(self, name):
            self.chat = lambda: Chat(name)

    monkeypatch.setattr(replay_cost.time, "process_time", lambda: next(clock))
    seconds, tokens = replay_cost.timed({name: Reader(name) for name in "ab"}, [], 2)
    assert read == list("abbaab") and tokens == 7
    assert [len(spent) for spent in seconds.values()] == [2, 2] and seconds["a"][0][0] == 1


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in (common, cost):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def test_without_rows_the_table_says_so(results):
    assert cost.replay_cost().startswith("No rows") and "|" not in cost.replay_cost()


def test_the_table_has_a_line_a_setting(results):
    seconds = {PLAIN: [(1.0, 2.0)], "replay-30": [(2.0625, 3.0)]}
    rows = [{**row, "seed": 0, **common.ORIGIN, "threads": 1} for row in rows_of("nano", 1300, seconds)]
    with (results / "replay_cost.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = cost.replay_cost().splitlines()
    assert lines[2:4] == [
        "| nano | 1,300 | `off` | 1.000 | 1.000 | 2.000 |  |  |",
        "| nano | 1,300 | `replay-30` | 2.062 | 2.062 | 3.000 | 1.06 | 1.06 |",
    ]
    assert "1 rounds" in lines[-1] and "1 thread" in lines[-1]
