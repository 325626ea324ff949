"""Answers are read as what they say, in whatever form models put them; what says several things is no answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mminfer.needle.answers import ABSENT, Place, find_word, parse_places

NUMBERS = st.integers(1, 40)
FORMS = (
    "{0}, {1}, {2}",
    "{0},{1},{2}",
    " ({0}, {1}, {2}).",
    "[{0}, {1}, {2}]\n",
    "{0} {1} {2}",
    "index, row, column: {0}, {1}, {2}",
    "The answer is {0}, {1}, {2}.",
    "Image {0}, row {1}, column {2}",
    "Image {0}, Row {1}, Col {2}.",
    "index: {0}, row: {1}, column: {2}",
    "image-{0} row-{1} column-{2}",
    "It is in row {1} and column {2} of image {0}.",
    "**Index**: {0}\n**Row**: {1}\n**Column**: {2}",
    "Image {0}: {0}, {1}, {2}",
)


@given(st.sampled_from(FORMS), NUMBERS, NUMBERS, NUMBERS)
def test_every_form_of_a_place(form, image, row, column):
    assert parse_places(form.format(image, row, column)) == (Place(image, row, column),)


@pytest.mark.parametrize(
    "text",
    ["-1", " -1.\n", "'-1'", "\u22121", "-1, -1, -1", "index: -1, row: -1, column: -1", "None", "none of them",
     "No match.", "There is no such sub-image.", "It does not appear in any image.",
     "Answer: -1", "-1 (no match in the 10 images)"],
)  # fmt: skip
def test_absent(text):
    assert parse_places(text) == (ABSENT,)


@pytest.mark.parametrize(
    "text",
    ["", "red", "row 2", "1, 2", "1, 2, 3, 4", "0, 1, 1", "-1, 2, 3", "1.5, 2", "1, 2, 3 or 2, 2, 3", "-1 or 1, 2, 3",
     "I cannot see the images.", "Image 3 or image 4", "12 images"],
)  # fmt: skip
def test_no_answer(text):
    assert parse_places(text) is None


@pytest.mark.slow
@given(st.text())
def test_any_text_is_read_or_refused(text):
    for needles in (1, 2):
        places = parse_places(text, needles)
        assert places is None or len(places) == needles


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("The third image, first row, second column", Place(3, 1, 2)),
        ("3rd image, 1st row, 2nd column", Place(3, 1, 2)),
        ("1st column of the 2nd row in the 3rd image", Place(3, 2, 1)),
        ("1, 2, 3. None of the others fits.", Place(1, 2, 3)),
        ("4, 4, 1; that is 4, 4, 1", Place(4, 4, 1)),
        ("Image 3", Place(3)),
        ("3.", Place(3)),
    ],
)
def test_in_words(text, place):
    assert parse_places(text) == (place,)


def test_an_image_alone_is_a_place_where_it_has_one_picture():
    assert parse_places("Image 3", grid=1) == parse_places("3", grid=1) == (Place(3, 1, 1),)
    assert parse_places("Image 3", grid=2) == (Place(3),)


@pytest.mark.parametrize(
    "text", ["1, 2, 3; -1", "1, 2, 3\n-1", "1. 1, 2, 3\n2. -1", "(1, 2, 3), (-1)", "Image 1, row 2, column 3; none"]
)
def test_several_needles(text):
    assert parse_places(text, needles=2) == (Place(1, 2, 3), ABSENT)


def test_several_needles_all_absent_or_too_few():
    assert parse_places("-1", needles=3) == parse_places("-1; -1; -1", needles=3) == (ABSENT,) * 3
    assert parse_places("1, 2, 3", needles=2) is None
    assert parse_places("1, 2, 3; 1, 2, 3; 1, 1, 1", needles=2) is None


DIGITS = tuple("0123456789")


@pytest.mark.parametrize(
    ("text", "choices", "word"),
    [
        ("7", DIGITS, "7"),
        ("The digit is seven.", DIGITS, "7"),
        ("One frame shows a 7", DIGITS, "7"),
        ("A 7 in frame 12", DIGITS, "7"),
        ("3 or 7", DIGITS, None),
        ("17", DIGITS, None),
        ("Red.", ("red", "blue"), "red"),
        ("The red one, not the blue one", ("red", "blue"), None),
        ("hundred", ("red", "blue"), None),
        ("QX", ("QX", "none"), "QX"),
        ("None", ("QX", "none"), "none"),
        ("", DIGITS, None),
    ],
)
def test_one_word_of_several(text, choices, word):
    assert find_word(text, choices) == word
