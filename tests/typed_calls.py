"""What type checkers know of the door. Nothing here runs: mypy reads it, and fails where a type is another one."""

from collections.abc import Iterator
from typing import Any, assert_type

from mminfer.engine import Engine
from mminfer.inputs.parts import Message, TextPart
from mminfer.output import GenerationOutput

Chat = list[dict[str, Any]]


def one_chat_gives_one_output(engine: Engine, chat: Chat, parts: Iterator[dict[str, Any]]) -> None:
    assert_type(engine.generate("a"), GenerationOutput)
    assert_type(engine.generate(chat, 3, do_sample=True, num_frames=2), GenerationOutput)
    assert_type(engine.generate(parts, prefill_chunk_size=100), GenerationOutput)
    assert_type(engine.generate([TextPart("a"), "b"]), GenerationOutput)
    assert_type(engine.generate([Message("user", (TextPart("a"),))]), GenerationOutput)
    assert_type(engine.generate([{"role": "user", "content": ["a", TextPart("b")]}]), GenerationOutput)
    assert_type(engine.chat(system="b").send("a"), GenerationOutput)


def a_list_of_chats_gives_a_list(engine: Engine, chat: Chat, mixed: list[Chat | str]) -> None:
    assert_type(engine.generate([chat, chat]), list[GenerationOutput])
    assert_type(engine.generate([[Message("user", ())], chat]), list[GenerationOutput])
    assert_type(engine.generate(mixed, max_new_tokens=3), list[GenerationOutput])
    assert_type(engine.generate(["a", "b"]), list[GenerationOutput])
    assert_type(engine.generate([chat], num_return_sequences=2), list[GenerationOutput])


def several_answers_may_be_a_list(engine: Engine, chat: Chat) -> None:
    assert_type(engine.generate(chat, num_return_sequences=2), GenerationOutput | list[GenerationOutput])


def no_chat_is_an_error(engine: Engine) -> None:
    engine.generate(3)  # type: ignore[call-overload]
