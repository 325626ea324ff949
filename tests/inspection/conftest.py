"""The bundled pictures under three settings."""

import functools

import pytest

from mminfer import Engine, InferenceConfig, nano
from mminfer.inspection import inspect_chat


@pytest.fixture(scope="session")
def nano_inspection():
    """Inspections of the bundled prompt by preset."""
    loaded = Engine.from_pretrained("nano")

    @functools.cache
    def of(preset):
        engine = Engine(loaded.model, loaded.processor, InferenceConfig.from_preset(preset))
        return inspect_chat(engine, nano.sample_messages(), 4, name="nano")

    return of
