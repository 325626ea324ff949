"""Requests, sound and hostile, asked in every way that there is: the ways must agree."""

from typing import Any

from hypothesis import strategies as st

from mminfer import Engine
from tests.fuzz import content
from tests.fuzz.watching import (
    CONFIGS,
    OUTCOMES,
    WHOLE_BY_CHUNKS,
    Refused,
    ask,
    check_answers,
    check_equal,
    check_goes_on,
    engine_of,
)

SIZES = [1, 40, 70, 200, 10_000]
MOST_TOKENS = 64  # which the host's default gives where no length is asked for
DRAWN = ("do_sample",)  # arguments with which no two answers are alike
BEAMS = ("num_beams",)
OURS = ("num_frames", "fps", "max_video_tokens", "allow_remote", "allow_private_hosts", "progress")
SECOND = [{"role": "user", "content": ["What is the code of owl?"]}]


def fuzz_request(data: st.DataObject) -> None:
    """One request at once, and then in one or two other ways.

    Args:
        data: what examples are drawn from.

    Raises:
        AssertionError: an answer that is none, two ways that disagree, or a refusal that is late or long.
    """
    name = data.draw(st.sampled_from(sorted(CONFIGS)), "techniques")
    hostile = data.draw(st.sampled_from(["", "", "chat", "options"]), "hostile")
    chat = data.draw(content.chats(hostile == "chat"), "chat")
    options = data.draw(content.options(hostile == "options"), "options")
    engine = engine_of(name)
    options = {"output_logits": True, **options}
    whole = ask(engine, lambda: engine.generate(chat, **options))
    OUTCOMES["refused" if isinstance(whole, Refused) else "answered"] += 1
    if not isinstance(whole, Refused):
        check_answers(whole if isinstance(whole, list) else [whole], MOST_TOKENS)
    for way in data.draw(st.lists(st.sampled_from(sorted(WAYS)), min_size=1, max_size=2, unique=True), "ways"):
        size = data.draw(st.sampled_from(SIZES), "chunk size") if "chunks" in way else None
        WAYS[way](engine, name, chat, options, whole, size)
    check_goes_on(name)


def _same(ours: Any, whole: Any, options: dict[str, Any], what: str) -> None:
    """Both were refused, or both answered alike."""
    refused = [isinstance(one, Refused) for one in (ours, whole)]
    assert refused[0] == refused[1], f"{what}: {ours!r:.400} and {whole!r:.400}"
    comparable = not any(refused) and isinstance(whole, type(ours)) and ours.logits is not None
    if comparable and not any(name in options for name in DRAWN):
        check_equal(ours, whole, what)


def _in_chunks(engine: Engine, name: str, chat: Any, options: dict[str, Any], whole: Any, size: int | None) -> None:
    ours = ask(engine, lambda: engine.generate(chat, prefill_chunk_size=size, **options), late=_comes_late(chat))
    if isinstance(ours, Refused) and not isinstance(whole, Refused):
        assert "prefill_chunk_size" in str(ours.error) or "chunk" in str(ours.error), f"{ours}, at once {whole!r:.300}"
    elif isinstance(whole, list) or name not in WHOLE_BY_CHUNKS:
        assert isinstance(ours, Refused) == isinstance(whole, Refused), f"{ours!r:.300} and {whole!r:.300}"
    else:
        _same(ours, whole, options, f"chunks of {size} and at once")


def _in_a_batch(engine: Engine, name: str, chat: Any, options: dict[str, Any], whole: Any, size: int | None) -> None:
    if isinstance(whole, list) or not isinstance(chat, (list, str)):
        return
    ours = ask(engine, lambda: engine.generate([SECOND, chat], **options))
    _same(ours if isinstance(ours, Refused) else ours[1], whole, options, "in a batch and alone")


def _as_a_stream(engine: Engine, name: str, chat: Any, options: dict[str, Any], whole: Any, size: int | None) -> None:
    if isinstance(whole, list) or any(beams in options for beams in BEAMS):
        return

    def act() -> Any:
        stream = engine.stream(chat, **options)
        text = "".join(stream)
        assert stream.output is not None and text == stream.output.text, f"{text!r} and {stream.output!r:.200}"
        return stream.output

    _same(ask(engine, act), whole, options, "as a stream and at once")


def _as_a_turn(engine: Engine, name: str, chat: Any, options: dict[str, Any], whole: Any, size: int | None) -> None:
    """The last message of a chat of one turn, sent."""
    messages = chat if isinstance(chat, list) and all(isinstance(message, dict) for message in chat) else []
    roles = [message.get("role") for message in messages]
    plain = all(message.keys() == {"role", "content"} for message in messages)
    if isinstance(whole, list) or roles != ["user"] or not plain or any(beams in options for beams in BEAMS):
        return

    def act() -> Any:
        return engine.chat(**options).send(messages[-1]["content"])

    _same(ask(engine, act), whole, options, "as a turn and at once")


def _by_the_host(engine: Engine, name: str, chat: Any, options: dict[str, Any], whole: Any, size: int | None) -> None:
    """With all off the unpatched model generates the same from the same inputs."""
    if name != "off" or isinstance(whole, (list, Refused)) or "embedding" in content.shown(chat):
        return
    media = {key: value for key, value in options.items() if key in OURS and key != "progress"}
    given = {key: value for key, value in options.items() if key not in OURS}
    inputs = dict(engine.prepare([chat], **media))
    if "given" in inputs or given.get("do_sample") or any(name in options for name in BEAMS):
        return
    tokenizer = {"tokenizer": engine.processor.tokenizer} if "stop_strings" in given else {}
    host = engine.model.generate(**inputs, **given, **tokenizer, return_dict_in_generate=True)
    ids = host.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert ids == whole.token_ids, f"the host's tokens are {ids}, ours {whole.token_ids}"
    for k, logits in enumerate(host.logits or ()):
        difference = float((logits[0].float() - whole.logits[k]).abs().max())
        assert difference <= 1e-4, f"logits of token {k} are off the host's by {difference:.3g}"


WAYS = {
    "chunks": _in_chunks,
    "batch": _in_a_batch,
    "stream": _as_a_stream,
    "turn": _as_a_turn,
    "host": _by_the_host,
}


def _comes_late(chat: Any) -> bool:
    """Whether a part is opened or taken only when those before it have gone in."""
    found = content.shown(chat)
    return "Parts(" in found or "cut.png" in found
