"""Conversations of drawn turns: what a chat says is what the tokens that it has read say, wherever it goes."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from mminfer import Engine
from mminfer.chat import Chat
from tests.fuzz import content
from tests.fuzz.watching import (
    CONFIGS,
    OUTCOMES,
    TOLERANCE,
    Refused,
    ask,
    check_answers,
    check_equal,
    check_goes_on,
    engine_of,
    host_logits,
)

STEPS = ("read", "send", "send", "fork", "file", "wrong turn", "wrong option")
QUESTION = "Which code?"


@dataclass
class Conversation:
    """A chat under way.

    Args:
        engine: whose chat it is.
        chat: at its last turn.
        options: of all turns.
        heard: the contents that were taken in.
    """

    engine: Engine
    chat: Chat
    options: dict[str, Any]
    heard: list[Any] = field(default_factory=list)

    @property
    def state(self) -> tuple[Any, ...]:
        return self.chat.cache.tokens, self.chat._transcript


def fuzz_conversation(data: st.DataObject) -> None:
    """A chat through up to five steps.

    Args:
        data: what examples are drawn from.

    Raises:
        AssertionError: an answer is another than that of its tokens, a copy or a saved chat goes on otherwise, or a
            refused turn changed something.
    """
    name = data.draw(st.sampled_from(sorted(CONFIGS)), "techniques")
    size = data.draw(st.sampled_from([None, None, 70, 10_000]), "chunk size")
    system = data.draw(st.one_of(st.none(), content.texts(), content.odd), "system")
    options = {"prefill_chunk_size": size, "output_logits": True, "max_new_tokens": 2}
    engine = engine_of(name)
    try:
        talk = Conversation(engine, engine.chat(system=system, **options), options)
    except Exception as error:
        talk = Conversation(engine, _refused_chat(engine, error, options), options)
    for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=5), "steps"):
        _STEPS[step](talk, data)
    check_goes_on(name)


def _refused_chat(engine: Engine, error: Exception, options: dict[str, Any]) -> Chat:
    """A chat without the system's words, which were refused."""

    def again() -> None:
        raise error

    assert isinstance(ask(engine, again), Refused)
    OUTCOMES["refused"] += 1
    return engine.chat(**options)


def _turn(talk: Conversation, act: Any, given: Any) -> Any:
    """One turn; a refused one leaves the chat as it was."""
    before = talk.state
    out = ask(talk.engine, act, late=talk.options["prefill_chunk_size"] is not None)
    OUTCOMES["refused" if isinstance(out, Refused) else "answered"] += 1
    if isinstance(out, Refused):
        assert talk.state == before, f"a refused turn changed the chat: {out}"
    else:
        talk.heard.append(given)
    return out


def _read(talk: Conversation, data: st.DataObject) -> None:
    given = data.draw(content.contents(False), "read")
    before = talk.chat.cache.tokens

    def act() -> bool:
        talk.chat.read(given)
        if talk.chat.cache.tokens == before:  # nothing in it to be read
            ask_nothing(talk.engine)
        return True

    _turn(talk, act, given)


def ask_nothing(engine: Engine) -> None:
    """A pass of no consequence, where `ask` wants one."""
    engine.generate(QUESTION, 1)


def _send(talk: Conversation, data: st.DataObject) -> None:
    given = data.draw(content.contents(False), "send")
    unread = talk.chat._transcript.unread
    out = _turn(talk, lambda: talk.chat.send(given), given)
    if isinstance(out, Refused):
        return
    check_answers([out], 2)
    assert talk.chat._transcript.unread == tuple(out.token_ids[-1:]), f"unread before: {unread}"
    _check_against_the_host(talk, out)


def _check_against_the_host(talk: Conversation, out: Any) -> None:
    """With all off: the unpatched model's logits behind the very tokens that the chat says it has read."""
    if talk.engine is not engine_of("off") or any("embedding" in content.shown(given) for given in talk.heard):
        return
    parts = [part for given in talk.heard for part in ([given] if isinstance(given, str) else list(given))]
    pictures = [part for part in parts if isinstance(part, dict) and part["type"] != "text"]
    inputs = dict(talk.engine.prepare([[{"role": "user", "content": [*pictures, QUESTION]}]]))
    ids = talk.chat._transcript.ids[: len(talk.chat._transcript.ids) - len(out.token_ids) + 1]
    prompt = torch.tensor([ids])
    inputs |= {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    difference = float((host_logits(talk.engine, inputs) - out.logits[0]).abs().max())
    assert difference <= TOLERANCE, f"the host's logits behind the same {len(ids)} tokens are {difference:.3g} off"


def _fork(talk: Conversation, data: st.DataObject) -> None:
    """A copy and the chat itself answer alike, and the copy's turn leaves the chat alone."""
    before, copied = talk.state, talk.chat.fork()
    _check_goes_on_alike(talk, copied, "a fork")
    assert talk.state == before, "the turn of a fork changed the chat"


def _file(talk: Conversation, data: st.DataObject) -> None:
    """A saved chat goes on where this one stands; from here on it stands for it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat"
        talk.chat.save(path)
        loaded = talk.engine.load_chat(path, **talk.options)
        assert [entry.name for entry in Path(folder).iterdir()] == ["chat"]
    _check_goes_on_alike(talk, loaded.fork(), "a saved chat")
    talk.chat = loaded


def _check_goes_on_alike(talk: Conversation, other: Chat, what: str) -> None:
    wanted = talk.chat.fork().send(QUESTION)
    check_equal(other.send(QUESTION), wanted, what)


def _wrong_turn(talk: Conversation, data: st.DataObject) -> None:
    given = data.draw(content.contents(True), "wrong turn")
    method = data.draw(st.sampled_from(["read", "send"]), "method")
    kept = talk.chat.fork()

    def act() -> bool:
        getattr(talk.chat, method)(given)
        ask_nothing(talk.engine)
        return True

    if not isinstance(_turn(talk, act, given), Refused):
        talk.chat = kept  # it was sound after all
        talk.heard.pop()


def _wrong_option(talk: Conversation, data: st.DataObject) -> None:
    given = data.draw(content.options(True), "wrong options")
    kept = talk.chat.fork()
    if not isinstance(_turn(talk, lambda: talk.chat.send(QUESTION, **given), QUESTION), Refused):
        talk.chat = kept
        talk.heard.pop()


_STEPS = {
    "read": _read,
    "send": _send,
    "fork": _fork,
    "file": _file,
    "wrong turn": _wrong_turn,
    "wrong option": _wrong_option,
}
