"""A model that a test may wrap, copy and patch, and what to ask it."""

import copy

import pytest

from tests.tiny import IMAGE, tiny_inputs, tiny_model


@pytest.fixture
def model():
    """One of the test's own. That of a first call is not copied: the host's marks of it cannot be pickled."""
    return copy.deepcopy(tiny_model("llava"))


@pytest.fixture
def inputs():
    return tiny_inputs("llava", [[4, IMAGE, 5]])
