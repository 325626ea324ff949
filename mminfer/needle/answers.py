"""Free text read as an answer: places in a haystack, or one word out of several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """A sub-image, counted from 1; row and column are 0 where only the image was named."""

    image: int
    row: int = 0
    column: int = 0


ABSENT = Place(-1, -1, -1)

_CARDINALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_NUMBERS = {word: str(n) for n, word in enumerate(_CARDINALS)} | {word: str(n + 1) for n, word in enumerate(_ORDINALS)}
_NUMBER_WORD = re.compile(rf"\b({'|'.join(_NUMBERS)})\b")
_LABELS = ("(?:index|image)", "row", "col(?:umn)?")
_RUN = re.compile(r"(?<![\w.])-?\d+(?:(?:\s*[,/]\s*|[ ]+)-?\d+)*(?![\w%])")
_NONE = re.compile(
    r"\b(none|nothing(?! else)|nowhere|absent|no (such|match|matching|sub-?image|picture|image)|there(?: is|'s| are) no"
    r"|not (found|present|there|any|in|visible)|do(?:es)?(?: not|n't) (match|fit|exist|appear))\b"
)


def parse_places(text: str, needles: int = 1, grid: int = 0) -> tuple[Place, ...] | None:
    """Reads an answer in the format "index, row, column" or "-1", one for each needle, parted by ";".

    Also understood: brackets, "Image 3, row 1, column 2", "the third image, first row, second column", "none", and an
    image alone, which is a place without row and column. Several places where one was asked for are no answer.

    Args:
        text: the answer.
        needles: places asked for.
        grid: sub-images a side; with 1 of them, naming the image names the place.

    Returns:
        A place for each needle, or None if the text is no answer.
    """
    plain = _plain(text)
    whole = _place(plain)
    if needles == 1:
        places = [whole]
    elif whole == ABSENT:
        places = [ABSENT] * needles
    else:
        pieces = [piece for piece in re.split(r"[;\n]+", plain) if piece.strip()]
        places = [_place(piece) for piece in pieces] if len(pieces) == needles else [*_runs(plain)]
    if len(places) != needles or None in places:
        return None
    return tuple(Place(p.image, 1, 1) if grid == 1 and p.row == 0 else p for p in places if p is not None)


def find_word(text: str, choices: Sequence[str]) -> str | None:
    """The only one of the choices that the text names; numbers may be written out. None: no one, or several."""
    words = re.findall(r"[A-Za-z]+|\d+", text)
    for reading in (words, [_NUMBERS.get(word.lower(), word) for word in words]):
        found = {choice for word in reading for choice in choices if choice in (word, word.lower())}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _plain(text: str) -> str:
    """Lower case, number words and ordinals as digits, minus signs as hyphens."""
    text = text.lower().replace("\u2212", "-").replace("\u2013", "-")
    text = _NUMBER_WORD.sub(lambda match: _NUMBERS[match[1]], text)
    return re.sub(r"\b(\d+)(?:st|nd|rd|th)\b", r"\1", text)


def _place(text: str) -> Place | None:
    """The only place that a text names."""
    named = _labelled(text)
    if named is not None and named.row:
        return named
    found = set(_runs(text))
    if found:
        return found.pop() if len(found) == 1 else None
    if named is not None:
        return named
    alone = re.fullmatch(r"\W*(\d+)\W*", text)
    if alone:
        return _as_place([int(alone[1])])
    return ABSENT if _NONE.search(text) else None


def _runs(text: str) -> list[Place]:
    """Whole places and "-1" as bare numbers, in order."""
    read = [_as_place([int(n) for n in re.findall(r"-?\d+", run)]) for run in _RUN.findall(text)]
    return [place for place in read if place is not None and place.row != 0]


def _labelled(text: str) -> Place | None:
    """Numbers that stand all behind, or all before, the words index or image, row and column."""
    forward = [re.findall(rf"{label}(?:-|\W*?)(-?\d+)", text) for label in _LABELS]
    backward = [re.findall(rf"(?<![\w.-])(\d+)[- ]*{label}", text) for label in _LABELS]
    for numbers in (forward, backward):
        if all(len(set(found)) == 1 for found in numbers):
            return _as_place([int(found[0]) for found in numbers])
    if len(set(forward[0])) == 1 and not any(forward[1:]) and not any(backward[1:]):
        return _as_place([int(forward[0][0])])
    return None


def _as_place(numbers: list[int]) -> Place | None:
    if all(n == -1 for n in numbers):
        return ABSENT
    if len(numbers) in (1, 3) and min(numbers) > 0:
        return Place(*numbers)
    return None
