"""Settings of any kind: refused by name, or a config that answers a short request."""

import copy
import dataclasses
import json
from typing import Any

from hypothesis import strategies as st

from mminfer import ConfigError, Engine, InferenceConfig
from mminfer.config import PRESETS, TECHNIQUES
from mminfer.technique import Stage
from tests.chat_files.fuzzing import change
from tests.fuzz import content
from tests.fuzz.watching import (
    OUTCOMES,
    Refused,
    ask,
    check_answers,
    check_equal,
    check_goes_on,
    check_words,
    engine_of,
)
from tests.inputs.test_chunk_tokens import content_of
from tests.test_config import configs

JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from([*(s.value for s in Stage), "technique", "ratio"]), inner, max_size=3),
    ),
    max_leaves=8,
)
NUMBERS = st.one_of(
    st.integers(-2, 9), st.floats(-0.5, 2), st.floats(), st.integers(), st.booleans(), st.none(), content.odd,
    st.sampled_from(["auto", "pivot", "average", "none", "all", "last", "evict", "keep", "farthest"]),
)  # fmt: skip
VALUES = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=6), st.lists(st.integers(0, 5), max_size=3))
KINDS = ["config", "preset", "preset", "json", "fields", "fields", "changed", "changed"]


def fuzz_config(data: st.DataObject) -> None:
    """One config, made in one of the ways that there are; if it is taken, a request on it.

    Args:
        data: what examples are drawn from.

    Raises:
        AssertionError: a refusal is no `ConfigError` of few words, comes behind a pass, or an answer is none.
    """
    make = _MAKES[data.draw(st.sampled_from(KINDS), "kind")]
    off = engine_of("off")
    try:
        config = make(data)
        engine = Engine(off.model, off.processor, config)
    except ConfigError as error:
        check_words(error)
        OUTCOMES["refused"] += 1
        return
    _check_json(config)
    size = data.draw(st.sampled_from([None, None, 70]), "chunk size")
    out = ask(engine, lambda: engine.generate(_chat(), 2, output_logits=True, prefill_chunk_size=size))
    OUTCOMES["request refused" if isinstance(out, Refused) else "answered"] += 1
    if not isinstance(out, Refused):
        check_answers([out], 2)
    if config == InferenceConfig():
        check_equal(out, off.generate(_chat(), 2, output_logits=True), f"all off, chunks of {size} and at once")
    check_goes_on("off")


def _chat() -> list[Any]:
    """Three pictures, text and a question."""
    kinds = ["IMAGE", "A cat:", "IMAGE", "ROWS", "IMAGE"]
    return [{"role": "user", "content": [*content_of(kinds, content.WIDTH), "What is the code of owl?"]}]


def _check_json(config: InferenceConfig) -> None:
    again = InferenceConfig.from_json(config.to_json())
    assert again == config, f"{config} is {again} behind JSON"


def _drawn_config(data: st.DataObject) -> Any:
    return data.draw(configs, "config")


def _preset(data: st.DataObject) -> Any:
    return InferenceConfig.from_preset(data.draw(st.sampled_from(list(PRESETS)) | content.odd, "preset"))


def _json(data: st.DataObject) -> Any:
    given = data.draw(JSON, "json")
    return (
        InferenceConfig.from_json(json.dumps(given)) if data.draw(st.booleans()) else InferenceConfig.from_dict(given)
    )


def _fields(data: st.DataObject) -> Any:
    """A technique with one to three fields that anything may stand in, by its class or from a dictionary."""
    name = data.draw(st.sampled_from(sorted(TECHNIQUES)), "technique")
    known = [*(field.name for field in dataclasses.fields(TECHNIQUES[name])), "nonsense"]
    names = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True), "fields")
    fields = {field: data.draw(VALUES, field) for field in names}
    if "nonsense" in fields or data.draw(st.booleans(), "as a dictionary"):
        return InferenceConfig.from_dict({TECHNIQUES[name].stage.value: {"technique": name, **fields}})
    return InferenceConfig.of(TECHNIQUES[name](**fields))


def _changed(data: st.DataObject) -> Any:
    """A preset's data in which one or two places are others."""
    given = copy.deepcopy(InferenceConfig.from_preset(data.draw(st.sampled_from(list(PRESETS)), "preset")).to_dict())
    for _ in range(data.draw(st.integers(1, 2))):
        change(data, given)
    return InferenceConfig.from_dict(given)


_MAKES = {"config": _drawn_config, "preset": _preset, "json": _json, "fields": _fields, "changed": _changed}
