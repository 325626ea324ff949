"""What is no model, no processor and no switch is refused at both doors, by its name and before anything is run."""

import copy

import pytest
import torch

from mminfer import ConfigError, Engine, InferenceConfig, InputError, UnsupportedModelError, patch
from tests.processors import model_and_processor
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


def test_what_is_no_processor():
    model, processor = model_and_processor("internvl")
    for given in (processor.tokenizer, processor.image_processor, "nano", model, 3):
        with pytest.raises(InputError, match=rf"the processor is {type(given).__name__}: .*AutoProcessor"):
            Engine(model, given)
    with pytest.raises(InputError, match="the processor is NoneType"):
        Engine(model, None).generate("Hi", 1)


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
