"""Requests on their way to the scheduler: prompts, settings of generation, and what is told of an answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import cached_property
from threading import Lock
from typing import Any

from mminfer.chat_files import ChatIdentity
from mminfer.config import InferenceConfig
from mminfer.engine import Engine
from mminfer.inputs.parts import ImagePart, Part, TextPart
from mminfer.running import GenerationSettings
from mminfer.scheduling import AnswerRequest, Scheduler, Ticket
from mminfer.scheduling.scheduler import chunk_size_for
from mminfer.serving.answering import AnswerOptions, Piece, TextListener
from mminfer.serving.budget import Budget, Share
from mminfer.serving.content import Chat, SentImage, read_chat
from mminfer.serving.disk import DiskStore, EngineShelf
from mminfer.serving.errors import RequestError, request_error
from mminfer.serving.limits import ServerSettings
from mminfer.serving.prefixes import ChainPrompt, PrefixStore
from mminfer.serving.schema import ChatRequest

MOST_CHARACTERS = 32  # that a token of a text is expected to have; the longest have more, and stand for spaces
MOST_SETTINGS = 256  # of generation, kept between requests


class Service:
    """Answers checked requests by one scheduler.

    Args:
        engine: the model and its processor.
        scheduler: of the model.
        server: what the operator allows.
        store: what was read before.
        disk: likewise, on disk; None: nothing is kept there.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        server: ServerSettings,
        store: PrefixStore,
        disk: DiskStore | None = None,
    ) -> None:
        self.scheduler, self.server, self.store = scheduler, server, store
        self.budget = Budget(server.limits.held_bytes)
        self._engine, self._lock = engine, Lock()
        self._disk, self._shelves = disk, dict[str, EngineShelf]()
        self._resolved: dict[tuple[Any, ...], GenerationSettings] = {}

    def prepare(self, request: ChatRequest, share: Share) -> Prepared:
        """Checks a request and decodes its images; for a thread beside the server's own.

        Args:
            request: as it was sent.
            share: what it holds of all memory.

        Raises:
            RequestError: it is not answered.
        """
        if request.model != self.server.model_id:
            raise RequestError(404, "no such model here: ask /v1/models", param="model", code="model_not_found")
        config, limits = self._config(request), self.server.limits
        asked = request.new_tokens
        if asked is not None and asked > limits.new_tokens:
            raise RequestError(400, f"wanted {limits.new_tokens} tokens at most", param="max_tokens")
        least = request.mminfer.min_tokens or 0
        if least > (asked or limits.new_tokens):
            raise RequestError(400, f"wanted {asked or limits.new_tokens} at most", param="mminfer.min_tokens")
        if request.mminfer.min_tokens is not None and request.keeps_to_schema:
            raise RequestError(
                400,
                "a schema says where its answers end: leave one of the two out",
                param="mminfer.min_tokens",
                code="schema_and_min_tokens",
            )
        if request.n > min(limits.answers, self.scheduler.limits.running):
            raise RequestError(400, f"wanted {limits.answers} answers at most", param="n")
        if request.top_logprobs is not None and not request.logprobs:
            raise RequestError(400, "top_logprobs: wanted logprobs=true beside it", param="top_logprobs")
        chat = read_chat(request, self.server, share)
        self._check_text(chat)
        try:
            messages = self._engine.check(list(chat.messages))
            settings = self._settings(request, asked or limits.new_tokens)
            size = chunk_size_for(config, self.scheduler.limits.chunk_size)
            chat = replace(chat, messages=tuple(messages))
            prompt = ChainPrompt(self._engine.reader, self.store, chat, config, size)
            if self._disk is not None:
                prompt.use(self._shelf_of(request, self._disk))
            prompt.open_images(_opener(share))
            return Prepared(request, prompt, config, [self._guided(request, settings) for _ in range(request.n)])
        except Exception as error:
            raise request_error(error) from None

    def _shelf_of(self, request: ChatRequest, disk: DiskStore) -> EngineShelf:
        """The store on disk for a request's preset."""
        name = request.mminfer.preset or next(iter(self.server.settings))
        with self._lock:
            if name not in self._shelves:
                engine = self._engine
                identity = ChatIdentity(engine.adapter, engine.processor, self.server.settings[name])
                self._shelves[name] = EngineShelf(disk, identity, engine.device)
            return self._shelves[name]

    def _check_text(self, chat: Chat) -> None:
        """Refuses more words than a prompt may have tokens, before anybody waits for them."""
        most = self.server.limits.text_tokens
        texts = [part.text for message in chat.messages for part in message.parts if isinstance(part, TextPart)]
        too_long = sum(map(len, texts)) > MOST_CHARACTERS * most
        if not too_long and sum(map(len, texts)) > most // MOST_CHARACTERS:
            too_long = sum(len(self._engine.reader.tokens_of(text)) for text in texts) > most
        if too_long:
            raise RequestError(400, f"wanted {most} tokens of text at most", param="messages", code="text_too_long")

    def begin(self, prepared: Prepared, emit: Callable[[Piece], object]) -> Answering:
        """Submits it; `emit` gets the pieces, from the scheduler's thread.

        Raises:
            RequestError: too many wait.
        """
        request, prompt = prepared.request, prepared.prompt
        options = AnswerOptions(
            request.stops,
            prepared.settings[0].end_ids,
            (request.top_logprobs or 0) if request.logprobs else None,
            request.mminfer.min_tokens or 0,
        )
        tokenizer = self._engine.processor.tokenizer
        listeners = [TextListener(n, tokenizer, options, emit, prompt.answered) for n in range(request.n)]
        seed = secrets.randbits(62) if request.seed is None else request.seed
        try:
            requests = [
                AnswerRequest(settings, listener, seed + n)
                for n, (settings, listener) in enumerate(zip(prepared.settings, listeners, strict=True))
            ]
            return Answering(self.scheduler.submit(prompt, prepared.config, requests), prompt, listeners)
        except Exception as error:
            raise request_error(error) from None

    @cached_property
    def _grammars(self) -> Any:
        from mminfer.serving.guidance import Grammars

        return Grammars(self._engine.processor.tokenizer, self._engine.adapter.spec.vocab_size)

    def _guided(self, request: ChatRequest, settings: GenerationSettings) -> GenerationSettings:
        """The settings, with a processor of one answer's own where it keeps to a schema."""
        wanted = request.response_format
        if wanted is None or not request.keeps_to_schema:
            return settings
        schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
        processor = self._grammars.processor(schema)
        return replace(settings, arguments={**settings.arguments, "logits_processor": [processor]})

    def _config(self, request: ChatRequest) -> InferenceConfig:
        settings, name = self.server.settings, request.mminfer.preset
        if name is None:
            return next(iter(settings.values()))
        if name not in settings:
            raise RequestError(
                400, f"preset: wanted one of {', '.join(settings)}", param="mminfer.preset", code="preset_not_allowed"
            )
        return settings[name]

    def _settings(self, request: ChatRequest, new_tokens: int) -> GenerationSettings:
        given: dict[str, Any] = {"max_new_tokens": new_tokens}
        if request.mminfer.min_tokens is not None:
            given["min_new_tokens"] = request.mminfer.min_tokens
        if request.temperature == 0:
            given["do_sample"] = False
        elif request.temperature is not None or request.top_p is not None:
            given |= {"do_sample": True, "top_k": 0, "temperature": float(request.temperature or 1.0)}
            given["top_p"] = float(request.top_p or 1.0)
        with self._lock:
            key = tuple(given.items())
            if key not in self._resolved:
                if len(self._resolved) >= MOST_SETTINGS:
                    self._resolved.clear()
                self._resolved[key] = self._engine.runner.settings(given)
            return self._resolved[key]


class Prepared:
    """A request that can be submitted: its prompt, techniques and settings of generation, for each answer."""

    def __init__(
        self, request: ChatRequest, prompt: ChainPrompt, config: InferenceConfig, settings: list[GenerationSettings]
    ) -> None:
        self.request, self.prompt, self.config, self.settings = request, prompt, config, settings


def _opener(share: Share) -> Callable[[Part], Part]:
    """Decodes images, the same one once."""
    opened: dict[bytes, Part] = {}

    def open_part(part: Part) -> Part:
        if not isinstance(part, SentImage):
            return part
        if part.digest not in opened:
            share.take(part.decoded_bytes)
            opened[part.digest] = ImagePart(part.image)
        return opened[part.digest]

    return open_part


class Answering:
    """A request that is being answered.

    Args:
        ticket: its place with the scheduler.
        prompt: what is read.
        listeners: of each answer.
    """

    def __init__(self, ticket: Ticket, prompt: ChainPrompt, listeners: list[TextListener]) -> None:
        self.ticket, self.prompt, self.listeners = ticket, prompt, listeners

    def usage(self, start: float) -> dict[str, Any]:
        """Tokens and times, as OpenAI names them and beyond; start: `time.perf_counter()` when the request came."""
        facts, new = self.prompt.facts, sum(len(one.token_ids) for one in self.listeners)
        first = min((one.first_at for one in self.listeners if one.first_at), default=start)
        steps = [one for one in self.listeners if len(one.token_ids) > 1]
        tpot = [1e3 * (one.last_at - one.first_at) / (len(one.token_ids) - 1) for one in steps]
        return {
            "prompt_tokens": len(self.prompt.ids),
            "completion_tokens": new,
            "total_tokens": len(self.prompt.ids) + new,
            "prompt_tokens_details": {"cached_tokens": facts.cached},
            "mminfer": {
                "visual_tokens": facts.visual,
                "merged_tokens": facts.merged,
                "kept_tokens": facts.kept,
                "ttft_ms": round(1e3 * (first - start), 3),
                "tpot_ms": round(sum(tpot) / len(tpot), 3) if tpot else None,
            },
        }


def pieces_of(service: Service, prepared: Prepared, deadline: float) -> tuple[Answering, AsyncIterator[Piece]]:
    """Submits a request from within an event loop; gives its pieces as they come.

    Args:
        service: that answers it.
        prepared: the request.
        deadline: by `time.monotonic()`.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece]()
    answering = service.begin(prepared, lambda piece: loop.call_soon_threadsafe(queue.put_nowait, piece))

    async def pieces() -> AsyncIterator[Piece]:
        left = len(answering.listeners)
        while left:
            try:
                piece = await asyncio.wait_for(queue.get(), deadline - time.monotonic())
            except TimeoutError:
                raise RequestError(504, "the answer took too long", "server_error", code="timeout") from None
            if piece.error is not None:
                raise request_error(piece.error)
            left -= piece.reason is not None
            yield piece

    return answering, pieces()
