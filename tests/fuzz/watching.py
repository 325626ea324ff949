"""What is held of every call that is drawn: an answer, or a typed error in few words before any layer ran."""

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from mminfer import V2PE, AIMMerge, Digest, Engine, InferenceConfig, LookM, MminferError, Replay, nano

CONFIGS = {
    "off": InferenceConfig(),
    "v2pe": InferenceConfig(V2PE(1 / 16)),
    "merge": InferenceConfig(merge=AIMMerge(0.5)),
    "balanced": InferenceConfig.from_preset("balanced"),
    "lookm": InferenceConfig(cache=LookM(0.4, 0.2)),
    "digest": InferenceConfig(cache=Digest(0.5)),
    "replay": InferenceConfig(cache=Replay(0.5)),
}
WHOLE_BY_CHUNKS = ("off", "v2pe")  # whose prompt may come in chunks with no other answer
LONGEST_MESSAGE, LONGEST_VALUE = 1000, 200
TOLERANCE = 1e-4  # of logits

OUTCOMES: Counter[str] = Counter()  # of the target that is running


class Refused:
    """A call that was refused.

    Args:
        error: which was raised.
    """

    def __init__(self, error: MminferError) -> None:
        self.error = error

    def __repr__(self) -> str:
        return f"Refused({type(self.error).__name__}: {self.error!s:.300})"


@functools.cache
def engine_of(name: str) -> Engine:
    """The bundled model with the techniques of this name; all share the model."""
    if name == "off":
        return Engine.from_pretrained("nano")
    shared = engine_of("off")
    return Engine(shared.model, shared.processor, CONFIGS[name])


@functools.cache
def known_answer(name: str) -> list[int]:
    return _fixed_answer(engine_of(name))


def _fixed_answer(engine: Engine) -> list[int]:
    return engine.generate(_fixed_chat(), 3, min_new_tokens=3).token_ids


@functools.cache
def _fixed_chat() -> list[Any]:
    """Two labelled pictures and the bundled question, loaded once."""
    chat = nano.sample_messages()
    content = chat[0]["content"]
    return engine_of("off").check([{"role": "user", "content": [*content[:4], content[-1]]}])


def check_goes_on(name: str) -> None:
    """Raises `AssertionError` unless the engine of this name answers as it did at first."""
    found = _fixed_answer(engine_of(name))
    assert found == known_answer(name), f"the fixed question has another answer: {found}, not {known_answer(name)}"


def ask(engine: Engine, act: Callable[[], Any], late: bool = False) -> Any:
    """What a call gives, or `Refused`.

    Args:
        engine: whose model runs.
        act: the call.
        late: whether layers may have run before it is refused: content comes piece by piece.

    Raises:
        AssertionError: it was refused too late, or in too many words; or it was answered without a pass.
    """
    began: list[int] = []

    def begins(*_: Any) -> None:
        began.append(1)
        hook.remove()  # decode steps take another way where a layer is watched

    hook = engine.adapter.layers[0].register_forward_pre_hook(begins)
    try:
        out = act()
    except MminferError as error:
        check_words(error)
        assert late or not began, f"refused behind the first layer: {error}"
        return Refused(error)
    finally:
        hook.remove()
    assert began, "answered without a pass"
    return out


def check_words(error: MminferError) -> None:
    """Raises `AssertionError` if the message is long, quotes a long value, or cannot be printed."""
    message = str(error)
    message.encode()
    assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters: {message[:300]}..."
    long = re.search(rf"(.)\1{{{LONGEST_VALUE}}}", message)
    assert long is None, f"a message quotes a value of more than {LONGEST_VALUE} characters: {message[:300]}..."


def check_answers(outputs: list[Any], most_tokens: int) -> None:
    """Raises `AssertionError` unless these are answers of at most so many tokens, their logits finite."""
    for output in outputs:
        assert 1 <= len(output.token_ids) <= most_tokens and isinstance(output.text, str)
        if output.logits is not None:
            assert len(output.logits) == len(output.token_ids) and not bool(output.logits.isnan().any())


def check_equal(ours: Any, theirs: Any, what: str) -> None:
    """Raises `AssertionError` unless logits agree as long as the tokens do, and part only where two are as likely.

    Args:
        ours: an answer with logits.
        theirs: the same question asked another way.
        what: the ways, for messages.
    """
    for k, (one, other) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=False)):
        difference = float((ours.logits[k] - theirs.logits[k]).abs().max())
        assert difference <= TOLERANCE, f"{what}: logits of token {k} are off by {difference:.3g}"
        if one != other:
            gap = abs(float(ours.logits[k][one] - ours.logits[k][other]))
            assert gap <= TOLERANCE, f"{what}: token {k} is {one} and {other}, {gap:.3g} apart"
            return
    assert len(ours.token_ids) == len(theirs.token_ids), f"{what}: {ours.token_ids} and {theirs.token_ids}"


def host_logits(engine: Engine, inputs: dict[str, Any]) -> torch.Tensor:
    """[V]: what the unpatched model says behind the last token."""
    with torch.no_grad():
        return engine.model(**inputs).logits[0, -1].float()
