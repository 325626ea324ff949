"""The host's chat template as a stream of text: what a turn adds, and where its media stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from mminfer.errors import InputError
from mminfer.inputs.embeddings import filler_token
from mminfer.inputs.messages import Message, Part

_OPEN = "\u27e6mminfer:open\u27e7"


class Template:
    """Renders chats whose media are bare placeholders; it never sees pixels.

    Args:
        processor: the host's, with a chat template.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        found = {kind: getattr(processor, f"{kind}_token", None) for kind in ("image", "video")}
        self._kinds = {mark: kind for kind, mark in found.items() if mark}
        begin = re.escape(getattr(processor, "vision_start_token", None) or "")
        self.filler = filler_token(processor)  # of a ready-made row
        self._mark = re.compile(f"(?:{begin})?({'|'.join(map(re.escape, self._kinds))})")

    def closed(self, messages: Sequence[Message]) -> str:
        """The chat up to where the answer goes."""
        return self._render(messages, True)

    def open(self, messages: Sequence[Message]) -> str:
        """The chat up to where the user's last turn would go on; white space there belongs to what follows."""
        return self._opened(messages).rstrip()

    def before_last_medium(self, messages: Sequence[Message], rows: int = 0) -> str:
        """The chat up to the last image or video of the user's last turn; up to its last `rows` fillers, if any."""
        text = self._opened(messages)
        return text[: self._last(text, rows)]

    def between_media(self, parts: Sequence[Part], rows: int = 0) -> str:
        """What stands from the first medium or filler of these parts of one turn up to the last one, as above."""
        text = self._opened([{"role": "user", "content": list(parts)}])
        first = self._places(text, least=0)[:1]
        if self.filler and self.filler in text:
            first.append(text.index(self.filler))
        if not first:
            raise _no_placeholder()
        return text[min(first) : self._last(text, rows)]

    def begins_with_rows(self, segment: str) -> bool:
        """Whether a segment begins with a ready-made row."""
        return bool(self.filler) and segment.startswith(str(self.filler))

    def _last(self, text: str, rows: int) -> int:
        if not rows:
            return self._places(text)[-1]
        filler = str(self.filler)
        return text.rindex(filler) + len(filler) - rows * len(filler)

    def segments(self, text: str) -> list[tuple[str | None, str]]:
        """The text cut before each medium: pairs of "image" or "video" (None: before the first one) and text."""
        places = self._places(text, least=0)
        ends = [*places, len(text)]
        head: list[tuple[str | None, str]] = [(None, text[: ends[0]])] if ends[0] else []
        return head + [(self._kind(text, a), text[a:b]) for a, b in pairwise(ends)]

    def without_mark(self, segment: str) -> str:
        """A segment without the placeholder that it begins with."""
        found = self._mark.match(segment)
        return segment[found.end() :] if found else segment

    def _kind(self, text: str, place: int) -> str | None:
        found = self._mark.match(text, place)
        return self._kinds[found[1]] if found else None

    def _places(self, text: str, least: int = 1) -> list[int]:
        places = [m.start() for m in self._mark.finditer(text)]
        if len(places) < least:
            raise _no_placeholder()
        return places

    def _opened(self, messages: Sequence[Message]) -> str:
        last = messages[-1]
        marked = [*messages[:-1], {**last, "content": [*last["content"], {"type": "text", "text": _OPEN}]}]
        text, found, _ = self._render(marked, False).partition(_OPEN)
        if not found:
            raise InputError("the model's chat template drops text of an open turn: use send() instead of read()")
        return text

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        rendered: str = self._processor.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
        return rendered


def _no_placeholder() -> InputError:
    return InputError("the model's chat template shows no placeholder for an image, video or embedding")
