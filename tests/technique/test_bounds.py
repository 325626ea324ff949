"""No setting of any technique takes a number without bounds, whichever door it comes in by."""

import dataclasses
import json
import math
import typing

import pytest
from typer.testing import CliRunner

from mminfer import ConfigError, InferenceConfig, MminferError
from mminfer.cli.main import app
from mminfer.config import TECHNIQUES
from mminfer.models.spec import ModelSpec
from mminfer.technique import LayerRange, PositionTechnique, is_bundled

BEYOND = (
    2**32,
    2**45,
    2**60,
    2**63,
    2**64,
    2**70,
    -(2**32),
    -(2**70),
    10**5000,
    1e10,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
)
STRANGE = (True, False, "8", "x" * 10_000, [], {}, b"8", 3j, object())
LAYERS = 6


SPEC = ModelSpec(
    family="test", num_layers=LAYERS, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=128, vocab_size=500, max_position_embeddings=32768,
)  # fmt: skip


def numeric(annotation):
    """Whether a field of this annotation holds numbers, by themselves or in a sequence."""
    parts = {annotation, *typing.get_args(annotation)}
    return bool(parts & {int, float}) or any(numeric(x) for x in parts - {annotation} if typing.get_args(x))


def fields(wanted):
    """(technique, field) of the library's own, as parameters."""
    found = []
    for name, technique in TECHNIQUES.items():
        if is_bundled(technique):
            hints = typing.get_type_hints(technique)
            found += [(name, f.name) for f in dataclasses.fields(technique) if wanted(hints[f.name])]
    return [pytest.param(*x, id=".".join(x)) for x in found]


NUMBERS = fields(numeric)
OTHERS = fields(lambda hint: not numeric(hint))


def stage_of(name):
    return TECHNIQUES[name].stage.value


def make(name, field, value):
    """Settings with one field changed, and what that one needs beside it."""
    beside = {"budget": 64} if field == "recent" and "budget" in TECHNIQUES[name].__dataclass_fields__ else {}
    return TECHNIQUES[name](**beside | {field: value})


def test_there_are_such_fields():
    assert len(NUMBERS) > 40 and {x.values[0] for x in NUMBERS + OTHERS} >= {"AIMPrune", "Digest", "OperatorSkip"}


@pytest.mark.parametrize(("name", "field"), NUMBERS)
def test_numbers_have_bounds(name, field):
    for value in BEYOND:
        for given in (value, (value,), [value] * LAYERS):
            with pytest.raises(ConfigError) as error:
                make(name, field, given)
            assert len(str(error.value)) < 500


@pytest.mark.parametrize(("name", "field"), NUMBERS)
def test_negative_numbers_are_refused(name, field):
    for value in (-1, -0.5):
        with pytest.raises(ConfigError):
            make(name, field, value).check(SPEC)


@pytest.mark.parametrize(("name", "field"), NUMBERS + OTHERS)
def test_other_types_are_refused(name, field):
    default = getattr(TECHNIQUES[name](), field)
    for value in STRANGE:
        if type(value) is type(default) and not (isinstance(value, str) and value not in ("auto",)):
            continue  # another value of the field's own type
        if value == [] and isinstance(default, tuple):
            continue
        with pytest.raises(ConfigError):
            make(name, field, value).check(SPEC)


@pytest.mark.parametrize("field", ["start", "end", "interval"])
def test_ranges_of_layers_have_bounds(field):
    for value in BEYOND:
        with pytest.raises(ConfigError):
            LayerRange(**{field: value})


@pytest.mark.parametrize(("name", "field"), NUMBERS)
def test_json_is_held_to_the_same(name, field):
    for value in ("1e999", "NaN", str(2**60), str(2**64)):
        text = json.dumps({stage_of(name): {"technique": name, field: "here"}}).replace('"here"', value)
        with pytest.raises(ConfigError, match=field):
            InferenceConfig.from_json(text)


def test_the_command_line_says_it_in_one_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"prune": {"technique": "AIMPrune", "iterations": 2**60}}), "utf-8")
    result = CliRunner().invoke(app, ["generate", "--config", str(path)])
    assert result.exit_code == 2 and "iterations" in result.stderr


def test_a_technique_of_ones_own_is_held_to_it_too():
    @dataclasses.dataclass(frozen=True)
    class _Own(PositionTechnique, register=False):
        pace: float = math.inf  # a default is the author's own affair
        fractional = False

        def check(self, spec):
            pass

        def apply(self, layout, max_positions):
            return layout

    assert _Own().pace == math.inf and _Own(3).pace == 3
    for value in (math.inf, 2**40):
        with pytest.raises(MminferError, match=r"_Own\.pace="):
            _Own(value)
        with pytest.raises(MminferError, match=r"_Own\.pace="):
            _Own(pace=value)
