"""A conversation that keeps its compressed cache: each turn runs only what is new."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mminfer.cache.kv_cache import CACHE_NAME, CompressedCache
from mminfer.cache.storage import cache_facts, cache_tensors, restore_cache
from mminfer.errors import InputError
from mminfer.request import GenerationOutput, build_piece

if TYPE_CHECKING:
    from mminfer.engine import Engine

FILE_FORMAT = 1
_OPEN = "\u27e6mminfer:open\u27e7"
_ANSWER = "\u27e6mminfer:answer:{}\u27e7"


class Chat:
    """Turns of one conversation over one cache; `engine.chat()` makes it.

    The template is rendered with marks in place of answers, and a turn is whatever the new rendering adds to the old
    one: nothing that is in the cache is ever tokenised or computed again.

    Attributes:
        cache: the compressed cache of all turns so far.
    """

    def __init__(self, engine: Engine, media: dict[str, Any], **generation_kwargs: Any) -> None:
        self._engine = engine
        self._media = media
        self._generation_kwargs = generation_kwargs
        self.cache = CompressedCache()
        self._messages: list[dict[str, Any]] = []
        self._rendered = ""
        self._ids: list[int] = []  # what the cache holds, as the host counts it
        self._unread: list[int] = []  # generated, but not yet run through the model

    def read(self, content: Any) -> None:
        """Takes content in and compresses it without answering; the user's turn stays open for more.

        Args:
            content: a string or a list of text, image and video parts.

        Raises:
            InputError: the content is wrong; the chat is as it was.
        """
        messages, parts = self._with(content)
        rendered = self._render(messages, open_turn=True)
        piece, new = self._piece(rendered, parts)
        self._engine.read(piece, self.cache)
        self._commit(messages, rendered, new, [])

    def send(self, content: Any, max_new_tokens: int = 64, **generation_kwargs: Any) -> GenerationOutput:
        """Ends the user's turn with this content and answers.

        Args:
            content: a string or a list of text, image and video parts; "" to answer what was read.
            max_new_tokens: tokens to generate at most.
            generation_kwargs: the host's, on top of those the chat was made with.

        Raises:
            InputError: the content is wrong; the chat is as it was.
        """
        start = time.perf_counter()
        messages, parts = self._with(content)
        rendered = self._render(messages, open_turn=False)
        piece, new = self._piece(rendered, parts)
        past = len(self._ids)
        ids = torch.tensor([self._ids + new], device=piece["input_ids"].device)
        piece |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE_NAME: self.cache}
        positions = piece["position_ids"]
        piece["position_ids"] = torch.cat([positions.new_zeros(*positions.shape[:-1], past), positions], -1)
        kwargs = {**self._generation_kwargs, "max_new_tokens": max_new_tokens, **generation_kwargs}
        for name in ("num_beams", "num_return_sequences"):
            if kwargs.get(name, 1) != 1:
                raise InputError(f"{name}={kwargs[name]}: a chat goes on from one answer; use generate() for several")
        restore = self.cache.snapshot()
        try:
            output = self._engine.run(piece, start, **kwargs)[0]
        except BaseException:
            restore()
            raise
        answered = len(output.token_ids)
        mark = _ANSWER.format(len(messages))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": mark}]})
        self._commit(
            messages,
            rendered + mark,
            new + output.token_ids[: answered - 1],
            output.token_ids[answered - 1 :],
        )
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

    def _with(self, content: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The messages with this content in the user's open turn, and its parts, media loaded."""
        open_turn = bool(self._messages) and self._messages[-1]["role"] == "user"
        if open_turn and isinstance(content, str) and not content.strip():
            return list(self._messages), []  # the turn ends as it stands
        checked = self._engine.check([{"role": "user", "content": content}], **self._media)
        parts = checked[0]["content"]
        bare = [p if p["type"] == "text" else {"type": p["type"]} for p in parts]
        messages = list(self._messages)
        if open_turn:
            messages[-1] = {"role": "user", "content": messages[-1]["content"] + bare}
        else:
            messages.append({"role": "user", "content": bare})
        return messages, parts

    def _render(self, messages: list[dict[str, Any]], open_turn: bool) -> str:
        if not open_turn:
            return self._template(messages, True)
        last = messages[-1]
        marked = [
            *messages[:-1],
            {"role": "user", "content": [*last["content"], {"type": "text", "text": _OPEN}]},
        ]
        text, found, _ = self._template(marked, False).partition(_OPEN)
        if not found:
            raise InputError("the model's chat template drops text of an open turn: use send() instead of read()")
        return text.rstrip()  # white space belongs to what follows, as tokenizers have it

    def _template(self, messages: list[dict[str, Any]], generation_prompt: bool) -> str:
        return self._engine.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt
        )

    def _piece(self, rendered: str, parts: list[dict[str, Any]]) -> tuple[dict[str, Any], list[int]]:
        """Model inputs for what the rendering adds, and its token ids, unread ones first."""
        if not rendered.startswith(self._rendered):
            raise InputError(
                "the model's chat template rewrites earlier turns: start a new chat with the whole history"
            )
        engine = self._engine
        piece = build_piece(
            engine.processor,
            rendered[len(self._rendered) :],
            parts,
            first=not self._rendered,
            device=engine.device,
            dtype=engine.model.dtype,
        )
        ids: Tensor = piece["input_ids"]
        unread = self._unread if self._unread != ids[0, :1].tolist() else []
        if unread:
            prefix = ids.new_tensor([unread])
            piece["input_ids"] = ids = torch.cat([prefix, ids], 1)
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in piece:
                    piece[name] = torch.cat([piece[name].new_zeros(1, len(unread)), piece[name]], 1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        piece["position_ids"] = engine.adapter.host_positions(piece, mask)[:, None]
        if engine.adapter.position_axes == 1:
            piece["position_ids"] = piece["position_ids"][0]
        return piece, ids[0].tolist()

    def _commit(self, messages: list[dict[str, Any]], rendered: str, fed: list[int], unread: list[int]) -> None:
        self._messages, self._rendered = messages, rendered
        self._ids, self._unread = self._ids + fed, unread
