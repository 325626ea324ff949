"""When frames are shown, from time stamps that may be rounded, uneven, or none."""

from bisect import bisect_right
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mminfer.inputs.timeline import Timeline

TICK = Fraction(1, 1000)


@pytest.mark.parametrize("rate", ["30000/1001", "24000/1001", "25/2", "240", "1/3"])
@pytest.mark.parametrize("count", [2, 7, 1000])
def test_even_videos_keep_the_rate_of_their_header(rate, count):
    """Stamps in milliseconds are rounded."""
    rate = Fraction(rate)
    timeline = Timeline.of(count, rate, [round(n / rate / TICK) + 5 for n in range(count)], 0, TICK)
    assert (timeline.times, timeline.rate, timeline.total) == ((), rate, count)
    assert timeline.chosen(2, count) == [0, count // 2]


def test_a_header_whose_rate_is_wrong_is_not_believed():
    assert Timeline.of(100, Fraction(90_000), range(0, 4000, 40), 0, TICK).rate == 25
    assert Timeline.of(100, None, range(0, 4000, 40), 0, TICK).rate == 25


@pytest.mark.parametrize("stamps", [[], [7], [7, 7, 7]])
def test_without_stamps_the_header_is_all_there_is(stamps):
    timeline = Timeline.of(9, Fraction(10), stamps, 0, TICK)
    assert (timeline.times, timeline.rate, timeline.total) == ((), 10, len(stamps) or 9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=3, max_size=40), st.integers(1, 50), st.randoms())
def test_frames_are_those_that_a_player_shows(gaps, count, chance):
    stamps = [sum(gaps[:n]) for n in range(len(gaps))]
    mixed = sorted(stamps, key=lambda _: chance.random())  # as B-frames come
    timeline = Timeline.of(0, None, mixed, gaps[-1], TICK)
    total = len(stamps)
    count = min(count, total)
    chosen, indices = timeline.chosen(count, total), timeline.indices(count, total)
    assert len(chosen) == len(indices) == count and chosen == sorted(chosen) and indices == sorted(indices)
    if not timeline.times or count == total:
        assert count < total or chosen == list(range(total))
        return
    assert indices == [k * total // count for k in range(count)]
    for frame, index in zip(chosen, indices, strict=True):
        assert frame == bisect_right(stamps, index / timeline.rate / TICK + 1) - 1
