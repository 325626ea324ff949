"""What is no model and no switch is refused at both doors, by its name and before anything is run."""

import copy

import pytest
import torch

from mminfer import ConfigError, Engine, InferenceConfig, UnsupportedModelError, patch
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    "given", [None, "nano", 3, {}, torch.nn.Linear(2, 2), type(tiny_model("llava")), torch.zeros(2)]
)
def test_what_is_no_model(given):
    for build in (lambda: patch(given, InferenceConfig()), lambda: Engine(given, None)):
        with pytest.raises(
            UnsupportedModelError, match=rf"of type {type(given).__name__}: .*from_pretrained"
        ) as raised:
            build()
        assert len(str(raised.value)) < 700


@pytest.mark.parametrize("name", ["compile", "verify"])
@pytest.mark.parametrize("value", [None, 1, 0, "no", "", torch.tensor(True)])
def test_what_is_neither_true_nor_false(name, value):
    model = copy.deepcopy(tiny_model("llava"))
    for build in (
        lambda **given: patch(model, InferenceConfig(), **given),
        lambda **given: Engine(model, None, **given),
    ):
        with pytest.raises(ConfigError, match=rf"{name}=.*: wanted True or False"):
            build(**{name: value})
    assert "forward" not in vars(model)
