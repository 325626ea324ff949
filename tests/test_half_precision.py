"""In half precision every setting answers what it answers in float32, wherever that is more certain than rounding."""

from functools import cache

import pytest
import torch

from benchmarks.quality.settings import GROUPS
from mminfer import Engine, InferenceConfig
from mminfer.config import PRESETS, TECHNIQUES
from mminfer.nano import sample_messages
from mminfer.technique import is_bundled

HALVES = (torch.bfloat16, torch.float16)
PARTS = sample_messages("What digit is in image NJ?")[0]["content"]
THIRD = [n for n, part in enumerate(PARTS) if part["type"] == "image"][2]
MESSAGES = [{"role": "user", "content": [*PARTS[: THIRD + 1], PARTS[-1]]}]  # three pictures and the question
TOKENS = 2

BUNDLED = [technique for technique in TECHNIQUES.values() if is_bundled(technique)]
VARIANTS = {name: InferenceConfig.of(own) for technique in BUNDLED for name, own in technique.variants().items()}
SETTINGS = {**PRESETS} | {name: config for name, config in VARIANTS.items() if config not in PRESETS.values()}
# What benchmarks compare, sweeps and their own baselines among it: in the coarser type, which is the faster one here.
NAMES = {config: name for group in GROUPS.values() for name, config in group.items()}
COMPARED = {name: config for config, name in NAMES.items() if config not in SETTINGS.values()}
CASES = [(name, dtype) for name in SETTINGS for dtype in HALVES]
CASES += [(name, torch.bfloat16) for name in COMPARED]
CONFIGS = SETTINGS | COMPARED
pytestmark = pytest.mark.filterwarnings("ignore:V2PE", "ignore:LookM")


@cache
def loaded(dtype):
    return Engine.from_pretrained("nano", dtype=dtype, device="cpu")


def answer(config, dtype):
    """Tokens, and logits of each."""
    engine = Engine(loaded(dtype).model, loaded(dtype).processor, config)
    out = engine.generate(MESSAGES, max_new_tokens=TOKENS, output_logits=True)
    return out.token_ids, out.logits.double()


@cache
def single(config):
    return answer(config, torch.float32)


@cache
def noise(dtype):
    """By how much logits of the host, as its users load it in this type, differ from those of float32."""
    found = []
    for own in (torch.float32, dtype):
        inputs = loaded(own).processor.apply_chat_template(
            MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(own)
        with torch.no_grad():
            found.append(loaded(own).model(**inputs).logits[0, -1].double())
    return float((found[0] - found[1]).abs().max())


def margins(config):
    """[TOKENS]: how far the best token is ahead of the second in float32."""
    best = single(config)[1].topk(2).values
    return (best[:, 0] - best[:, 1]).tolist()


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda x: str(x).removeprefix("torch."))
def test_answers_are_float32s_beyond_the_types_noise(name, dtype):
    tokens, logits = answer(CONFIGS[name], dtype)
    assert logits.isfinite().all()
    for ours, theirs, margin in zip(tokens, single(CONFIGS[name])[0], margins(CONFIGS[name]), strict=False):
        if margin <= 2 * noise(dtype):  # each of the two may be off by as much
            return
        assert ours == theirs, (margin, noise(dtype))


def test_most_answers_are_beyond_the_noise():
    first = [margins(config)[0] for config in PRESETS.values()]
    for dtype in HALVES:
        assert 0 < noise(dtype) < 1
        assert sum(margin > 2 * noise(dtype) for margin in first) > 0.9 * len(first)


@pytest.fixture
def half_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@cache
def plainly(name):
    return answer(VARIANTS[name], torch.bfloat16)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_default_type_changes_nothing(name, request):
    """Programs set it before they make models; what techniques count and draw is in a type of its own."""
    tokens, logits = plainly(name)
    request.getfixturevalue("half_by_default")
    again, same = answer(VARIANTS[name], torch.bfloat16)
    assert again == tokens and torch.equal(same, logits)
