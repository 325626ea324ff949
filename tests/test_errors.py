"""What errors say of values: a line of at most 200 characters, whatever the value is and does."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mminfer import AIMPrune, ConfigError, Digest, InferenceConfig
from mminfer.config import TECHNIQUES
from mminfer.errors import MOST, shortened, shown

ROOT = Path(__file__).parents[1]


class Mute:
    """Whose own text cannot be had."""

    def __repr__(self):
        raise RuntimeError("no text")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        10**5000,
        "x" * 10**6,
        list(range(10**6)),
        {n: n for n in range(999)},
        nested(10**5),
        Mute(),
        [Mute()],
        b"x" * 999,
    ],
    ids=["number", "text", "list", "dict", "nested", "mute", "list of mute", "bytes"],
)
def test_a_value_is_quoted_in_a_line(value):
    assert 0 < len(shown(value)) <= MOST and "\n" not in shown(value)


@pytest.mark.parametrize("value", [None, True, 0, -1, 0.5, 1e300, "auto", [1, 2], (1,), {"a": 1}, "x" * 150])
def test_a_short_value_is_quoted_as_python_writes_it(value):
    assert shown(value) == repr(value)


def test_of_a_long_text_both_ends_are_there():
    text = shortened("/home/" + "x" * 500 + "/image.png")
    assert len(text) <= MOST and text.startswith("/home/") and text.endswith("/image.png")
    assert shortened("\udcff").isascii()  # any console can print it


def test_a_text_is_quoted_on_one_line_that_no_console_obeys():
    assert shortened("not found:\r\n\x1b[31mred\u2028\x00") == "not found:  \\x1b[31mred \\x00"


@pytest.mark.parametrize("technique", [cls for cls in TECHNIQUES.values() if cls.__module__.startswith("mminfer.")])
@pytest.mark.parametrize("value", [np.array([0.5, 1]), torch.tensor([0, 1]), Mute(), [Mute()]])
def test_no_setting_is_an_array_or_what_cannot_be_shown(technique, value):
    for name in (field.name for field in dataclasses.fields(technique)):
        with pytest.raises(ConfigError, match=rf"{name}|{name.rpartition('_')[2]}"):
            technique(**{name: value})


def test_a_config_that_cannot_be_shown_is_refused():
    for build in (InferenceConfig.of, InferenceConfig.from_preset, InferenceConfig.from_dict):
        with pytest.raises(ConfigError, match="Mute"):
            build(Mute())
    with pytest.raises(ConfigError, match="Mute"):
        InferenceConfig(prune=Mute())
    with pytest.raises(ConfigError) as raised:
        Digest(spread="x" * 150, join=[0] * 9999)
    assert len(str(raised.value)) < 600
    assert InferenceConfig.of(AIMPrune()).prune == AIMPrune()


def test_there_is_one_way_to_quote():
    """Formats such as {value!r:.200} write the whole text first, and fail with a value that has none."""
    loose = re.compile(r"\{(?!error\b)[^{}\"]*!r:\.\d+\}")
    found = {str(path): loose.findall(path.read_text("utf-8")) for path in (ROOT / "mminfer").rglob("*.py")}
    assert {path: texts for path, texts in found.items() if texts} == {}
