"""A conversation that keeps its compressed cache: each turn runs only what is new."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mminfer.config import InferenceConfig
from mminfer.errors import InputError
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.native_build import prepare_kernels
from mminfer.forward.storage import cache_facts, cache_tensors, restore_cache
from mminfer.inputs.messages import count_parts
from mminfer.inputs.pieces import Reading
from mminfer.output import GenerationOutput
from mminfer.running import Runner, RunOptions

FILE_FORMAT = 2
_ANSWER = "\u27e6mminfer:answer:{}\u27e7"


class ChatHost(Protocol):
    """What a chat needs of the engine that holds it."""

    runner: Runner
    config: InferenceConfig

    @property
    def device(self) -> torch.device: ...

    @property
    def fingerprint(self) -> str: ...

    def load(self, content: Any, media: dict[str, Any]) -> Iterator[dict[str, Any]]: ...


class Chat:
    """Turns of one conversation over one cache; `engine.chat()` makes it.

    The template is rendered with marks in place of answers, and a turn is whatever the new rendering adds to the old
    one: nothing that is in the cache is ever tokenised or computed again.

    Attributes:
        cache: the compressed cache of all turns so far.
    """

    def __init__(self, engine: ChatHost, media: dict[str, Any], options: RunOptions, **generation_kwargs: Any) -> None:
        self._engine = engine
        self._media, self._options = media, options
        self._generation_kwargs = generation_kwargs
        self.cache = CompressedCache()
        self._messages: list[dict[str, Any]] = []
        self._rendered = ""
        self._ids: list[int] = []  # what the cache holds, as the host counts it
        self._unread: list[int] = []  # generated, but not yet run through the model

    def read(self, content: Any) -> None:
        """Takes content in and compresses it without answering; the user's turn stays open for more.

        With `prefill_chunk_size` the content may come from an iterator and is loaded, encoded and compressed piece by
        piece.

        Args:
            content: a string, or text, image and video parts from a list or any iterable.

        Raises:
            InputError: the content is wrong; the chat is as it was.
        """
        prepare_kernels(self._engine.device)
        reading = self._reading(content, closes=False)
        with self._kept_on_errors():
            self._engine.runner.read([reading], [self.cache], self._options)
        self._commit(reading, [])

    def send(self, content: Any, max_new_tokens: int = 64, **generation_kwargs: Any) -> GenerationOutput:
        """Ends the user's turn with this content and answers.

        Args:
            content: a string, or text, image and video parts from a list or any iterable; "" to answer what was read.
            max_new_tokens: tokens to generate at most.
            generation_kwargs: the host's, on top of those the chat was made with.

        Raises:
            InputError: the content is wrong; the chat is as it was.
        """
        prepare_kernels(self._engine.device)
        start = time.perf_counter()
        kwargs = {**self._generation_kwargs, "max_new_tokens": max_new_tokens, **generation_kwargs}
        copies = self._engine.runner.copies(kwargs)
        if copies != 1:
            raise InputError(
                f"num_beams or num_return_sequences is {copies}: a chat goes on from one answer; use generate()"
            )
        reading = self._reading(content, closes=True)
        with self._kept_on_errors():
            (output,) = self._engine.runner.answer([reading], [self.cache], start, self._options, **kwargs)
        answered = len(output.token_ids)
        mark = _ANSWER.format(len(reading.messages))
        reading.messages.append({"role": "assistant", "content": [{"type": "text", "text": mark}]})
        reading.rendered += mark
        reading.ids += output.token_ids[: answered - 1]
        self._commit(reading, output.token_ids[answered - 1 :])
        return output

    def fork(self) -> Chat:
        """An independent copy: several questions can be asked of what was read once."""
        other = copy.copy(self)
        other.cache = self.cache.clone()
        other._messages, other._ids, other._unread = list(self._messages), list(self._ids), list(self._unread)
        return other

    def save(self, path: str | Path) -> None:
        """Writes the chat to a safetensors file: cache, turns so far, and what made them. Pixels are not kept."""
        facts = {
            "format": FILE_FORMAT,
            "model": self._engine.fingerprint,
            "config": self._engine.config.to_dict(),
            "cache": cache_facts(self.cache),
            "messages": self._messages,
            "rendered": self._rendered,
            "ids": self._ids,
            "unread": self._unread,
        }
        save_file(cache_tensors(self.cache), path, {"mminfer_chat": json.dumps(facts)})

    def restore(self, path: str | Path) -> Chat:
        """Takes up a saved chat in place of this one's turns; `engine.load_chat(path)` is the usual way in.

        Raises:
            InputError: there is no such file, it holds no chat, or another model or config made it.
        """
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["mminfer_chat"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            cache = restore_cache(tensors, facts["cache"], self._engine.device)
            state = [facts[name] for name in ("messages", "rendered", "ids", "unread")]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: no saved chat ({error!r}): pass a file that chat.save() wrote") from error
        ours = {"format": FILE_FORMAT, "model": self._engine.fingerprint, "config": self._engine.config.to_dict()}
        for name, value in json.loads(json.dumps(ours)).items():
            if facts.get(name) != value:
                raise InputError(
                    f"{path}: its {name} is {facts.get(name)}, this engine's {value}: load it where it fits"
                )
        self.cache = cache
        self._messages, self._rendered, self._ids, self._unread = state
        return self

    def _reading(self, content: Any, *, closes: bool) -> Reading:
        messages = self._messages
        if not messages or messages[-1]["role"] != "user":
            messages = [*messages, {"role": "user", "content": []}]
            parts = self._engine.load(content, self._media)
        elif isinstance(content, str) and not content.strip():
            parts = iter(())  # the turn ends as it stands
        else:
            parts = self._engine.load(content, self._media)
        if self._options.chunk_size is None:
            parts = iter(list(parts))  # mistakes are found before anything runs
        return Reading(
            self._engine.runner.host,
            messages,
            parts,
            rendered=self._rendered,
            ids=self._ids,
            unread=self._unread,
            closes=closes,
            piece_size=self._options.chunk_size,
            parts_expected=count_parts(content),
        )

    @contextmanager
    def _kept_on_errors(self) -> Iterator[None]:
        """If anything raises, what came in is gone and the cache is as it was."""
        restore = self.cache.snapshot()
        try:
            yield
        except BaseException:
            restore()
            raise

    def _commit(self, reading: Reading, unread: list[int]) -> None:
        self._messages, self._rendered = reading.messages, reading.rendered
        self._ids, self._unread = reading.ids, unread
