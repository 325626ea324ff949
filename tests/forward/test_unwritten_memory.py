"""Memory that nobody has written holds what it likes: with nan in all of it nothing changes."""

import pytest
import torch

from mminfer import Engine, InferenceConfig, patched
from mminfer.config import PRESETS
from mminfer.nano import sample_messages
from tests.tiny import IMAGE, tiny_inputs, tiny_model

GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def nan_in_memory():
    """torch then fills whatever it hands out empty."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("preset", ["off", "lookm-20", "replay-20"])
def test_steps_over_whole_buffers(traced, nan_in_memory, preset):
    """A compiled step attends to spare columns, too, under a mask, which does not take a nan away."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[5, IMAGE, 30], [4, IMAGE]])
    config = InferenceConfig.from_preset(preset)
    with patched(model, config):
        want = model.generate(**inputs, **GREEDY)
    with patched(model, config, compile=True) as handle:
        ours = model.generate(**inputs, **GREEDY)
        assert len(handle.step_ms) >= 2
    assert torch.equal(ours.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(want.logits))


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.endswith(("-8k", "-auto"))])
def test_every_preset_in_a_batch(nan_in_memory, preset):
    engine = Engine.from_pretrained("nano", InferenceConfig.from_preset(preset))
    asked = [sample_messages(), [{"role": "user", "content": "What is the code of nest?"}]]
    found = [out.text for out in engine.generate(asked, max_new_tokens=4)]
    torch.use_deterministic_algorithms(False)
    assert found == [out.text for out in engine.generate(asked, max_new_tokens=4)]
