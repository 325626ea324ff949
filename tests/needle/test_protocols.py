"""Contexts are a function of the seed; the needle is there once, where it is said to be, or not at all."""

import math
import re
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from mminfer import InputError
from mminfer.nano.data import COLOUR_NAMES
from mminfer.needle import Labels, MMNeedle, Temporal, pictures, temporal
from mminfer.needle import labels as labels_module
from mminfer.needle import mmneedle as mmneedle_module
from mminfer.needle.answers import ABSENT
from mminfer.needle.pictures import COLOURS, caption, draw, stitch

pytest.importorskip("sklearn")

PROTOCOLS = [
    (MMNeedle(picture_size=32), 2),
    (MMNeedle(grid=3, needles=2, picture_size=32, image_size=60, depths=(0.0, 1.0)), 3),
    (Temporal(needles=2, picture_size=32), 5),
    (Labels(needles=2), 14),
]
IDS = [protocol.name for protocol, _ in PROTOCOLS]


@pytest.fixture
def drawn(monkeypatch):
    """What pictures show, in order, in place of drawing them: the combo as the picture's brightness."""
    shown = []

    def plain(combos, seed, side):
        for combo in combos:
            shown.append(combo)
            yield Image.new("RGB", (side, side), (combo, combo, combo))

    for module in (mmneedle_module, temporal, labels_module):
        monkeypatch.setattr(module, "draw", plain)
    return shown


def told(sample, video=False):
    """A sample as plain data, pixels included."""
    parts = [
        part["text"] if part["type"] == "text" else np.asarray(part[part["type"]]).tobytes()
        for part in sample.content(video)
    ]
    return [parts, sample.questions]


@pytest.mark.parametrize(("protocol", "images"), PROTOCOLS, ids=IDS)
def test_contexts_depend_on_the_seed_alone(protocol, images):
    first, again, other = ([told(s) for s in protocol.samples(images, 2, seed)] for seed in (3, 3, 4))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    sample = next(protocol.samples(images, 1, 3))
    assert told(sample) == told(sample) == first[0]  # content can be made more than once


@pytest.mark.parametrize(("protocol", "images"), PROTOCOLS, ids=IDS)
def test_a_context_has_its_length_and_size(protocol, images):
    for sample in protocol.samples(images, 1, 0):
        sizes = [part["image"].size for part in sample.content(False) if part["type"] == "image"]
        side = getattr(protocol, "image_size", None) or protocol.picture_size * getattr(protocol, "grid", 1)
        assert sizes == [(side, side)] * images == [(side, side)] * sample.images


@pytest.mark.parametrize("depths", [(), (0.0, 0.5, 1.0)])
@pytest.mark.parametrize("needles", [1, 3])
def test_mmneedles_are_there_once_or_not_at_all(drawn, needles, depths):
    protocol = MMNeedle(grid=3, needles=needles, picture_size=8, depths=depths)
    count = 8
    samples = list(protocol.samples(5, count, 1))
    assert len(samples) == count * max(1, len(depths))
    for n, sample in enumerate(samples):
        drawn.clear()
        list(sample.content(False))
        (question,) = sample.questions
        captions = re.findall(r"^Caption.*: (.*)$", question.text, re.M)
        haystack = [caption(combo) for combo in drawn]
        assert len(haystack) == 5 * 9 and len(set(captions)) == needles
        if n % 2:
            assert question.kind == "negative" and question.expected == (ABSENT,) * needles
            assert not set(captions) & set(haystack) and question.depth is None
            continue
        assert [haystack.count(text) for text in captions] == [1] * needles
        for text, place in zip(captions, question.expected, strict=True):
            assert haystack[(place.image - 1) * 9 + (place.row - 1) * 3 + place.column - 1] == text
        if depths:
            assert question.depth == depths[n // count]
            assert question.expected[0].image == 1 + round(question.depth * 4)


def test_the_needle_is_in_the_named_row_and_column(drawn):
    """Read back from the pixels of the stitched image."""
    sample = next(MMNeedle(grid=4, picture_size=8).samples(3, 1, 5))
    (question,) = sample.questions
    (place,) = question.expected
    images = [np.asarray(part["image"])[..., 0] for part in sample.content(False)]
    cell = images[place.image - 1][8 * (place.row - 1) : 8 * place.row, 8 * (place.column - 1) : 8 * place.column]
    assert caption(cell[0, 0]) == question.text.rpartition(": ")[2] and (cell == cell[0, 0]).all()


def test_stitching_puts_pictures_row_by_row():
    cells = [Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(9)]
    image = np.asarray(stitch(cells, 3))[..., 0]
    assert image.shape == (12, 12)
    assert (image[::4, ::4] == np.arange(9).reshape(3, 3)).all()
    assert (image == np.kron(image[::4, ::4], np.ones((4, 4)))).all()


def test_pictures_are_drawn_as_they_are_taken(monkeypatch):
    """A thousand frames cost no more than a chunk before the first one is there."""
    taken = []
    shown = draw((taken.append(n) or n % 60 for n in range(1000)), 0, 32)
    first = [np.asarray(picture) for picture in islice(shown, 3)]
    assert len(taken) == pictures.CHUNK
    whole = [np.asarray(picture) for picture in draw(range(3), 0, 32)]
    assert first[0].shape == (32, 32, 3) and len(whole) == 3
    large = next(draw([7], 0, 96))
    small = next(draw([7], 0, 32))
    np.testing.assert_array_equal(np.asarray(small.resize((96, 96), Image.Resampling.BICUBIC)), np.asarray(large))


@pytest.mark.parametrize("needles", [1, 2, 5])
def test_a_temporal_needle_is_the_only_frame_in_its_colour(drawn, needles):
    protocol = Temporal(needles=needles, picture_size=8, depths=(0.0, 0.3, 1.0))
    for sample in protocol.samples(9, 2, 0):
        drawn.clear()
        parts = list(sample.content(False))
        colours = [COLOUR_NAMES[combo % COLOURS] for combo in drawn]
        what, when, *order = sample.questions
        asked = re.search(r"One digit is (\w+)", what.text)[1]
        assert colours.count(asked) == 1 and len(parts) == len(colours) == 9
        place = colours.index(asked)
        assert place == round(what.depth * 8) and what.expected == str(drawn[place] // COLOURS)
        assert when.expected == ("first", "middle", "last")[place // 3]
        assert len(order) == (needles > 1)
        for question in order:
            assert question.expected == min(question.choices, key=colours.index)
            assert [colours.count(colour) for colour in question.choices] == [1, 1]


def test_models_that_take_videos_get_clips(monkeypatch):
    monkeypatch.setattr(temporal, "CLIP", 4)
    sample = next(Temporal(picture_size=16).samples(10, 1, 0))
    clips = list(sample.content(True))
    assert [part["type"] for part in clips] == ["video"] * 3
    assert [len(part["video"]) for part in clips] == [4, 4, 2]
    frames = [np.asarray(part["image"]) for part in sample.content(False)]
    np.testing.assert_array_equal(np.concatenate([part["video"] for part in clips]), frames)


@pytest.mark.parametrize("needles", [1, 3])
def test_labelled_pictures_stand_at_their_depths_and_frames_show_nothing_asked(drawn, needles):
    protocol = Labels(needles=needles, depths=(1.0, 0.0, 0.5))
    images = 3 * needles + 40
    for sample in protocol.samples(images, 3, 0):
        drawn.clear()
        kinds = [part.get("text", "picture") for part in sample.content(False)]
        assert len(drawn) == images
        at, labelled, frames = {}, {}, []
        shown = iter(drawn)
        for before, kind in zip(["", *kinds], kinds, strict=False):
            if kind != "picture":
                at[kind] = len(frames) / 40
            elif before.startswith("Image "):
                labelled[before.removeprefix("Image ").rstrip(":")] = caption(next(shown))
            else:
                frames.append(caption(next(shown)))
        assert len(frames) == 40 and len(labelled) == 3 * needles
        by_kind = {}
        for question in sample.questions:
            by_kind.setdefault(question.kind, []).append(question)
            check_question(question, labelled, frames, at)
        assert {len(by_kind["q1"]), len(by_kind.get("q2_digit", [])) + len(by_kind.get("q2_colour", []))} == {
            len(labelled)
        }
        assert len(by_kind["q1_none"]) == 1 and len(by_kind["q3"]) == 3
        assert {q.depth for q in by_kind["q1"]} == {q.depth for q in by_kind["q3"]} == {0.0, 0.5, 1.0}


def check_question(question, labelled, frames, at):
    assert question.expected in question.choices
    if question.kind == "q3":
        (fact,) = (text for text in at if f" {question.text.split()[-1][:-1]} is" in text)
        assert fact.endswith(f"is {question.expected}.") and at[fact] == question.depth
    elif question.kind.startswith("q2"):
        label = question.text.split()[-1][:-1]
        assert question.expected in labelled[label].split() and at[f"Image {label}:"] == question.depth
    else:
        asked = question.text.removeprefix("Which image shows ").rstrip("?")
        assert asked not in frames
        if question.kind == "q1":
            assert [label for label, shows in labelled.items() if shows == asked] == [question.expected]
            assert at[f"Image {question.expected}:"] == question.depth
        else:
            assert asked not in labelled.values() and question.expected == "none" and question.depth is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MMNeedle(grid=0), "grid=0: wanted a whole number, 1 to 32"),
        (lambda: MMNeedle(picture_size=4), "picture_size=4"),
        (lambda: MMNeedle(image_size=2.5), "image_size=2.5"),
        (lambda: MMNeedle(needles=31), "needles=31"),
        (lambda: MMNeedle(depths=(0.5, 1.5)), "depth 1.5: wanted a number from 0"),
        (lambda: MMNeedle(depths=(math.nan,)), "depth nan"),
        (lambda: MMNeedle(needles=5).check(1), "needles=5 in 1 images of 2 x 2: wanted 4 at most"),
        (lambda: MMNeedle().check(0), "images=0"),
        (lambda: Temporal(needles=6), "needles=6: wanted a whole number, 1 to 5"),
        (lambda: Temporal(needles=3).check(2), "needles=3 in 2 frames"),
        (lambda: Temporal(depths=()), "no depths"),
        (lambda: Temporal(depths=(0.5, 0.5)), "each of them once"),
        (lambda: Labels(needles=12), "5 depths of 12 labelled pictures: wanted 1 to 58"),
        (lambda: Labels(needles=2).check(9), "images=9: wanted 10 or more"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(InputError, match=re.escape(says)):
        make()


def test_missing_scikit_learn_names_the_way_out(monkeypatch):
    def missing(split):
        raise ImportError("scikit-learn is not installed: pip install mminfer[nano]")

    monkeypatch.setattr(pictures, "load_digit_split", missing)
    with pytest.raises(InputError, match=r"pip install mminfer\[nano\]"):
        pictures.check_available()
