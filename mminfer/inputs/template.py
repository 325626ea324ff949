"""The host's chat template as a stream of text: what a turn adds, and where media and embeddings stand in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from mminfer.errors import InputError, shortened
from mminfer.inputs.markers import Markers
from mminfer.inputs.transcript import new_mark


class Segment(NamedTuple):
    """A stretch of rendered text that begins with a medium or an embedding.

    Args:
        kind: "image" or "video"; None: it begins with an embedding, or is text before the first medium.
        text: placeholder or fillers first; embeddings may also stand within.
    """

    kind: str | None
    text: str


class Template:
    """Renders chats whose media are bare placeholders; it never sees pixels.

    Args:
        processor: the host's, with a chat template.
        markers: its marks.
    """

    def __init__(self, processor: Any, markers: Markers) -> None:
        self._processor, self._markers = processor, markers

    def closed(self, messages: Sequence[dict[str, Any]]) -> str:
        """The chat up to where the answer goes."""
        return self._render(messages, True)

    def open(self, messages: Sequence[dict[str, Any]]) -> str:
        """The chat up to where the user's last turn would go on; white space there belongs to what follows."""
        return self._opened(messages).rstrip()

    def before_last_medium(self, messages: Sequence[dict[str, Any]], rows: int = 0) -> str:
        """The chat up to the last image or video of the user's last turn; up to its last `rows` fillers, if any."""
        text = self._opened(messages)
        return text[: self._last(text, rows)]

    def between_media(self, parts: Sequence[dict[str, Any]], rows: int = 0) -> str:
        """What stands from the first medium or filler of these parts of one turn up to the last one, as above."""
        text = self._opened([{"role": "user", "content": list(parts)}])
        first = self._places(text, least=0)[:1]
        if self._markers.filler and self._markers.filler in text:
            first.append(text.index(self._markers.filler))
        if not first:
            raise _no_placeholder()
        return text[min(first) : self._last(text, rows)]

    def _last(self, text: str, rows: int) -> int:
        if not rows:
            return self._places(text)[-1]
        filler = str(self._markers.filler)
        return text.rindex(filler) + len(filler) - rows * len(filler)

    def segments(self, text: str, rows_before: Sequence[int] = ()) -> list[Segment]:
        """The text cut before each medium, and before some embeddings.

        Args:
            text: rendered.
            rows_before: for each embedding to cut before, the rows of embeddings that stand in the text before it.
        """
        kinds: dict[int, str | None] = {}
        if rows_before:
            fillers = [found.start() for found in re.finditer(re.escape(str(self._markers.filler)), text)]
            kinds |= {fillers[rows]: None for rows in rows_before if rows < len(fillers)}
        for found in self._markers.medium.finditer(text):
            kinds[found.start()] = self._markers.kinds[found[1]]
        places = sorted(kinds)
        ends = [*places, len(text)]
        head = [Segment(None, text[: ends[0]])] if ends[0] else []
        return head + [Segment(kinds[a], text[a:b]) for a, b in pairwise(ends)]

    def rows_in(self, text: str) -> int:
        """How many rows of embeddings a text without fillers of the user's holds."""
        return text.count(self._markers.filler) if self._markers.filler else 0

    def begins_with_rows(self, text: str) -> bool:
        """Whether a text begins with an embedding."""
        return bool(self._markers.filler) and text.startswith(str(self._markers.filler))

    def last_mark(self, text: str, has_rows: bool) -> tuple[str | None, str]:
        """A segment's last placeholder or filler, and the text behind it; None: it has none.

        Args:
            text: the segment's.
            has_rows: whether fillers in it stand for rows.
        """
        filler = str(self._markers.filler) if has_rows else ""
        if filler and filler in text:
            return filler, text[text.rindex(filler) + len(filler) :]
        placeholder = self._markers.placeholder_in_front(text)
        return placeholder or None, text[len(placeholder) :]

    def first_mark(self, text: str) -> str:
        """The placeholder or filler that a segment begins with; "" where there is none."""
        if self.begins_with_rows(text):
            return str(self._markers.filler)
        return self._markers.placeholder_in_front(text)

    def without_placeholder(self, segment: str) -> str:
        """A segment without the placeholder that it begins with."""
        found = self._markers.medium.match(segment)
        return segment[found.end() :] if found else segment

    def _places(self, text: str, least: int = 1) -> list[int]:
        places = [m.start() for m in self._markers.medium.finditer(text)]
        if len(places) < least:
            raise _no_placeholder()
        return places

    def _opened(self, messages: Sequence[dict[str, Any]]) -> str:
        last, mark = messages[-1], new_mark("open")
        marked = [*messages[:-1], {**last, "content": [*last["content"], {"type": "text", "text": mark}]}]
        text, found, _ = self._render(marked, False).partition(mark)
        if not found:
            raise InputError("the model's chat template drops text of an open turn: use send() instead of read()")
        return text

    def _render(self, messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        try:
            rendered: str = self._processor.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # templates raise anything
            raise _refused(self._processor, "chat", error) from error
        try:
            rendered.encode()
        except UnicodeEncodeError as error:  # a lone surrogate: no tokenizer takes it
            raise _refused(self._processor, "turn", error) from error
        return rendered


def _refused(processor: Any, what: str, error: Exception) -> InputError:
    return InputError(f"{type(processor).__name__} refused the {what}: {shortened(error)}")


def _no_placeholder() -> InputError:
    return InputError("the model's chat template shows no placeholder for an image, video or embedding")
