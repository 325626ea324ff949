"""Every technique, preset and baseline answers in every type that people load a model in, through every door."""

import pytest
import torch

from mminfer import Engine, InferenceConfig
from mminfer.config import PRESETS, TECHNIQUES
from mminfer.nano import sample_messages
from mminfer.technique import CacheTechnique, is_bundled

DTYPES = (torch.bfloat16, torch.float16, torch.float64)
CONFIGS = {name: PRESETS[name] for name in PRESETS} | {
    name: InferenceConfig.of(technique()) for name, technique in TECHNIQUES.items() if is_bundled(technique)
}
CACHES = [name for name in TECHNIQUES if name in CONFIGS and issubclass(TECHNIQUES[name], CacheTechnique)]


PARTS = sample_messages()[0]["content"]
FIRST = [n for n, part in enumerate(PARTS) if part["type"] == "image"][1]
CONTENT = [*PARTS[: FIRST + 1], PARTS[-1]]  # two pictures and the question
MESSAGES = [{"role": "user", "content": CONTENT}]


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def loaded(request):
    return Engine.from_pretrained("nano", dtype=request.param, device="cpu")


def with_config(loaded, name):
    return Engine(loaded.model, loaded.processor, CONFIGS[name])


def images(engine):
    return engine.generate(MESSAGES, max_new_tokens=2, output_logits=True)


def in_chunks(engine):
    return engine.generate(MESSAGES, max_new_tokens=2, output_logits=True, prefill_chunk_size=64)


def streamed(engine):
    stream = engine.stream(MESSAGES, max_new_tokens=2)
    for _ in stream:
        pass
    return stream.output


def in_a_chat(engine):
    chat = engine.chat(max_new_tokens=2)
    chat.send(CONTENT)
    return chat.send("And?")


def assert_sound(answer):
    assert len(answer.token_ids) > 0
    if answer.logits is not None:
        assert bool(torch.as_tensor(answer.logits).isfinite().all())


@pytest.mark.parametrize("name", CONFIGS)
def test_images(loaded, name):
    assert_sound(images(with_config(loaded, name)))


@pytest.mark.parametrize("door", [in_chunks, streamed, in_a_chat])
@pytest.mark.parametrize("name", CACHES)
def test_caches_through_every_door(loaded, name, door):
    assert_sound(door(with_config(loaded, name)))
