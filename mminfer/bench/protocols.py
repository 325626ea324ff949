"""The three ways of asking about a context; what compression costs depends on which, so no figure mixes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

from mminfer.engine import Engine
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.native_build import prepare_kernels
from mminfer.inputs.content import MediaOptions
from mminfer.inputs.transcript import Transcript
from mminfer.output import GenerationOutput
from mminfer.running import RunOptions

Part = dict[str, Any]
Ask = Callable[..., GenerationOutput]  # ask(question, **generation_kwargs)
AskAll = Callable[..., list[GenerationOutput]]  # ask_all(questions, **generation_kwargs)


class Protocol(StrEnum):
    """How a context and a question about it meet.

    IN_PROMPT: the question stands in the prompt; scores know it, and the first token never sees the compressed cache.
    NEXT_TURN: the context is read and compressed, then the question comes.
    STREAMED: so too, but the context is read in chunks and compressed behind each.
    """

    IN_PROMPT = "in-prompt"
    NEXT_TURN = "next-turn"
    STREAMED = "streamed"


def reader(engine: Engine, content: Sequence[Part], protocol: Protocol, chunk_size: int) -> Ask:
    """Takes a context in by a protocol.

    Args:
        engine: who is asked.
        content: parts of the user's message, the question left out.
        protocol: how.
        chunk_size: tokens of a chunk, for streamed contexts.

    Returns:
        A function that answers a question about the context, again and again; keyword arguments are the host's.
    """
    if protocol is Protocol.IN_PROMPT:

        def ask(question: str, **kwargs: Any) -> GenerationOutput:
            chat = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
            return engine.generate(chat, **kwargs)

        return ask
    chat = engine.chat(prefill_chunk_size=chunk_size if protocol is Protocol.STREAMED else None)
    chat.read(content)
    return lambda question, **kwargs: chat.fork().send(question, **kwargs)


def batch_reader(engine: Engine, content: Sequence[Part], protocol: Protocol, chunk_size: int) -> AskAll:
    """Takes a context in by a protocol, as `reader` does; what comes back answers many questions in one batch.

    Each question is asked on its own, and gets what `reader` gives it.
    """
    if protocol is Protocol.IN_PROMPT:

        def ask_in_prompt(questions: Sequence[str], **kwargs: Any) -> list[GenerationOutput]:
            chats = [[{"role": "user", "content": [*content, {"type": "text", "text": q}]}] for q in questions]
            return engine.generate(chats, **kwargs)

        return ask_in_prompt
    options = RunOptions(chunk_size if protocol is Protocol.STREAMED else None)
    prepare_kernels(engine.device)
    cache, media = CompressedCache(), MediaOptions()
    reading = engine.reader.turn(Transcript(), content, media, closes=False, size=options.chunk_size)
    engine.runner.read([reading], [cache], options)
    read = reading.transcript

    def ask(questions: Sequence[str], **kwargs: Any) -> list[GenerationOutput]:
        start, settings = time.perf_counter(), engine.runner.settings(kwargs)
        turns = [engine.reader.turn(read, q, media, closes=True, size=options.chunk_size) for q in questions]
        return engine.runner.answer(turns, [cache.clone() for _ in turns], start, options, settings)

    return ask
