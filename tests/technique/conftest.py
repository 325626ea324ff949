"""Techniques that these tests define are forgotten behind each module: tables of other tests must not hold them."""

import pytest

from mminfer.config import TECHNIQUES
from mminfer.technique import registry


@pytest.fixture(autouse=True, scope="module")
def _known_techniques():
    assert len(TECHNIQUES)  # the library's are loaded
    kept = {name: dict(getattr(registry, name)) for name in ("_classes", "_homes")}
    yield
    for name, before in kept.items():
        getattr(registry, name).clear()
        getattr(registry, name).update(before)
