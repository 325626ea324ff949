"""Metrics count what they say: perfect, blind and constant answerers get what they deserve."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mminfer.needle import Labels, MMNeedle, Temporal
from mminfer.needle.protocol import Question, Verdict
from mminfer.needle.scores import Answer, rows_of, wilson

PROTOCOLS = [MMNeedle(picture_size=32), MMNeedle(needles=2, picture_size=32), Temporal(needles=2), Labels()]
IDS = ["mmneedle", "mmneedle, 2 needles", "temporal", "labels"]


def in_words(expected):
    return expected if isinstance(expected, str) else "; ".join(", ".join(map(str, place)) for place in expected)


def rows(protocol, say, images=10, count=20):
    """All answers of somebody who says `say(question)`, by metric and depth."""
    answers = [
        Answer("s", images, q, say(q), protocol.score(q, say(q)), 2.0, None, 10, 20, 30)
        for sample in protocol.samples(images, count, 0)
        for q in sample.questions
    ]
    return {(row.metric, row.depth): row for row in rows_of(answers, protocol)}


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=IDS)
def test_the_perfect_answerer(protocol):
    found = rows(protocol, lambda question: in_words(question.expected))
    assert {metric for metric, _ in found} == set(protocol.chance(10))
    for row in found.values():
        assert row.accuracy == row.high == 1 and row.right == row.samples and row.unparsable == 0


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=IDS)
def test_who_says_nothing_is_wrong_everywhere_and_told_apart(protocol):
    for row in rows(protocol, lambda question: "").values():
        assert row.accuracy == row.low == row.right == 0 and row.unparsable == row.samples > 0


def test_who_always_denies_has_the_negatives_alone():
    found = rows(MMNeedle(picture_size=32), lambda question: "-1")
    right = {metric: row.accuracy for (metric, _), row in found.items()}
    assert right == {"existence, positives": 0, "existence, negatives": 1, "index": 0, "exact": 0}


def test_who_always_names_the_first_place_has_existence_and_chance():
    found = rows(MMNeedle(picture_size=32), lambda question: "1, 1, 1", images=2, count=800)
    right = {metric: row for (metric, _), row in found.items()}
    assert right["existence, positives"].accuracy == 1 and right["existence, negatives"].accuracy == 0
    assert right["index"].low < right["index"].chance == 1 / 2 < right["index"].high
    assert right["exact"].low < right["exact"].chance == 1 / 8 < right["exact"].high


def test_the_right_image_alone_is_no_exact_answer():
    found = rows(MMNeedle(picture_size=32), lambda q: f"Image {q.expected[0].image}" if q.kind == "positive" else "-1")
    assert {metric: row.accuracy for (metric, _), row in found.items()} == {
        "existence, positives": 1, "existence, negatives": 1, "index": 1, "exact": 0
    }  # fmt: skip


def test_one_of_two_needles_is_not_enough():
    protocol = MMNeedle(needles=2, picture_size=32)
    found = rows(protocol, lambda q: f"{in_words(q.expected[:1])}; -1" if q.kind == "positive" else "-1; -1")
    assert {metric: row.accuracy for (metric, _), row in found.items()} == {
        "existence, positives": 1, "existence, negatives": 1, "index": 0, "exact": 0
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [Temporal(needles=2), Labels()], ids=["temporal", "labels"])
def test_a_lucky_guesser_is_right_as_often_as_chance_says(protocol):
    """By lot among the choices; for Q3 these are all codes, and chance knows which ones the context has."""
    lot = random.Random(0)
    found = rows(protocol, lambda question: lot.choice(question.choices), 12, 150)
    for (metric, depth), row in found.items():
        if depth is None and metric != "Q3":
            assert row.low < row.chance < row.high, (metric, row)


def answer(metric_right, depth, setting="s", ms=1.0):
    question = Question("k", "?", "a", depth)
    return Answer(setting, 4, question, "a", Verdict(metric_right, True), ms, 5.0, 8, 16, 100)


class OneMetric(Temporal):
    def chance(self, images):
        return {"m": 0.25}


def test_rows_by_depth_and_all_together():
    answers = [answer({"m": True}, 0.5, ms=3.0), answer({"m": False}, 0.0), answer({"m": True}, 0.0, "t")]
    found = rows_of([*answers, answer({"m": True}, None, ms=9.0)], OneMetric())
    assert [(row.setting, row.depth, row.right, row.samples) for row in found] == [
        ("s", None, 2, 3), ("s", 0.0, 0, 1), ("s", 0.5, 1, 1), ("t", None, 1, 1), ("t", 0.0, 1, 1),
    ]  # fmt: skip
    assert (found[0].ms, found[0].read_ms, found[0].cache_bytes, found[0].peak_bytes) == (3.0, 5.0, 8, 100)


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_against_published_values(right, samples, low, high):
    assert wilson(right, samples) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share(counts):
    right, samples = counts
    low, high = wilson(right, samples)
    assert 0 <= low <= right / samples <= high <= 1
    assert wilson(samples - right, samples) == pytest.approx((1 - high, 1 - low))
