"""Chats as users write them become typed messages: mistakes are found here, before any forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from mminfer.errors import InputError, shown
from mminfer.inputs.content import Content, Entry, MediaOptions, PendingPart
from mminfer.inputs.parts import ROLES, Message, Part, is_blank


@dataclass(frozen=True)
class ParsedMessage:
    """A message whose form was checked, and whose media were not opened yet.

    Args:
        role: who speaks.
        content: what was written.
        given: the same as a typed message, if it came as one.
    """

    role: str
    content: Content
    given: Message | None = None

    def load(self, load_entry: Callable[[Entry], Iterable[Part]]) -> Message:
        """The typed message. One that came typed, and of which every part stays as it is, is given back itself.

        Args:
            load_entry: the parts that an entry becomes.
        """
        parts = [part for entry in self.content for part in load_entry(entry)]
        as_it_was = self.given is not None and list(map(id, parts)) == list(map(id, self.given.parts))
        return self.given if self.given is not None and as_it_was else Message(self.role, tuple(parts))


def is_batch(messages: Any) -> TypeGuard[Sequence[Any]]:
    """Whether this is a list of chats; else it is one chat. Of strings alone, each is a chat of its own."""
    return _holds_chats(messages) or (
        isinstance(messages, (list, tuple)) and bool(messages) and all(isinstance(chat, str) for chat in messages)
    )


def _holds_chats(messages: Any) -> bool:
    return isinstance(messages, (list, tuple)) and any(isinstance(chat, (list, tuple)) for chat in messages)


def normalise_messages(messages: Any, options: MediaOptions | None = None) -> list[Message]:
    """Checks one chat and loads its media; what was given is left as it is.

    Args:
        messages: a list of {"role", "content"} or of typed messages, a single typed message, or the content of a single
            user message: a string, a typed part or parts. Parts are a list or any iterable, which is gone through
            once. Dictionaries may be mappings of any kind; a key of None is none, and others than these are refused. A
            part is a typed one, a string or
            {"type": "text", "text": ...},
            {"type": "image", "image" | "path" | "url": ...},
            {"type": "images", "images": an iterable of what "image" takes},
            {"type": "video", "video" | "path" | "url": ...} or
            {"type": "embedding", "embedding": [n, C] tensor of the model's width, "modality": "visual" or "text"}.
        options: how media are taken; `max_video_tokens` is a matter of the model, and does nothing here.

    Returns:
        The chat, which can be passed on in place of what was given: nothing of it is checked or opened again.

    Raises:
        InputError: the chat is malformed or empty, does not end with the user, or a medium cannot be loaded.
    """
    checked = [message.load(load_entry) for message in parse_chat(messages, options or MediaOptions())]
    refuse_empty(part for message in checked for part in message.parts)
    return checked


def parse_chat(messages: Any, options: MediaOptions) -> list[ParsedMessage]:
    """One chat, checked as far as one can see without opening its media or asking its iterators; else as above.

    What comes back can also be passed on in place of what was given.
    """
    given = _as_messages(messages)
    _check_order([_role(message) for message in given])
    return [_parse_message(n, message, options) for n, message in enumerate(given)]


def _parse_message(n: int, message: Any, options: MediaOptions) -> ParsedMessage:
    if isinstance(message, ParsedMessage):
        return message
    if isinstance(message, Message):
        return ParsedMessage(message.role, Content(message.parts, f"message {n}", options), message)
    return ParsedMessage(message["role"], Content(message["content"], f"message {n}", options))


def load_entry(entry: Entry) -> list[Part]:
    """An entry's part, opened if it was not."""
    return [entry.part.load() if isinstance(entry.part, PendingPart) else entry.part]


def refuse_empty(parts: Iterable[Part | PendingPart]) -> None:
    """Raises `InputError` if a prompt of these parts holds nothing."""
    if all(not isinstance(part, PendingPart) and is_blank(part) for part in parts):
        raise InputError("the prompt is empty: wanted text, an image or a video")


def _as_messages(messages: Any) -> list[Any]:
    if _holds_chats(messages):  # strings may be the parts of a chat that is one of a list
        raise InputError("a list of chats where one chat was wanted: pass them one by one, or to generate()")
    if isinstance(messages, (str, Part, Message)):
        messages = [messages]
    if isinstance(messages, Iterable) and not isinstance(messages, (list, tuple, Mapping, str, bytes)):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, (list, tuple)) or not messages:
        found = "an empty list" if isinstance(messages, (list, tuple)) else type(messages).__name__
        raise InputError(f'the messages are {found}: wanted a string or a list of {{"role", "content"}}')
    if not any(_is_message(message) for message in messages):
        return [{"role": "user", "content": list(messages)}]
    for n, message in enumerate(messages):
        _check_message(n, message)
    return list(messages)


def _is_message(given: Any) -> bool:
    return isinstance(given, Message | ParsedMessage) or (
        isinstance(given, Mapping) and ("role" in given or "content" in given)
    )


def _check_message(n: int, message: Any) -> None:
    if isinstance(message, Message | ParsedMessage):
        return
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        keys = shown(list(message)) if isinstance(message, Mapping) else type(message).__name__
        raise InputError(f'message {n} is {keys}: wanted a dict with "role" and "content"')
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"message {n} has role {shown(role)}: wanted one of {', '.join(ROLES)}")
    unknown = [key for key, value in message.items() if value is not None and key not in ("role", "content")]
    if unknown:  # a host's template may know it, but it would not be honoured here
        raise InputError(f'message {n} has {shown(unknown[0])}: wanted "role" and "content" alone: leave it out')


def _role(message: Any) -> str:
    return message.role if isinstance(message, Message | ParsedMessage) else message["role"]


def _check_order(roles: Sequence[str]) -> None:
    if "system" in roles[1:]:
        raise InputError(f"message {roles.index('system', 1)} is the system's: wanted at most one, in front")
    if roles[-1] != "user":
        raise InputError(f"the last message is the {roles[-1]}'s: wanted the user's, to be answered")
