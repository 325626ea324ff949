"""Text of an answer while its tokens come: whole characters, no stop words, no white space around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what a decoder gives for the first bytes of a character


class Detokenizer:
    """Gives the text of tokens that come one by one.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._ids = tokenizer, list[int]()
        self._start = self._told = 0  # tokens before which all is told, and by which the next are spelt

    def add(self, token_id: int) -> str:
        """The text that this token makes certain: none where a character may go on."""
        self._ids.append(token_id)
        return self._added(waits=True)

    def flush(self) -> str:
        """What no other token will go on with."""
        return self._added(waits=False)

    def _added(self, waits: bool) -> str:
        before = self._decoded(self._ids[self._start : self._told])
        text = self._decoded(self._ids[self._start :])
        if text.endswith(BROKEN) and waits:
            return ""
        self._start, self._told = self._told, len(self._ids)
        return text[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class StopWords:
    """Holds text back that may be the beginning of a stop word, or white space at the end of the answer.

    Attributes:
        found: whether a stop word came; what was given ends before it.

    Args:
        words: that end an answer.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words, self._held, self._begun, self.found = tuple(words), "", False, False

    def add(self, text: str, may_end: bool = True) -> str:
        """The text that can be told now; may_end: whether a stop word in it ends the answer."""
        held, words = self._held + text, self._words if may_end else ()
        places = [place for word in words if (place := held.find(word)) >= 0]
        if places:
            self.found, self._held = True, ""
            return self._told(held[: min(places)].rstrip())
        keep = max((self._overlap(held, word) for word in words), default=0)
        certain = held[: len(held) - keep].rstrip()
        self._held = held[len(certain) :]
        return self._told(certain)

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return self._told(held.rstrip())

    def _told(self, text: str) -> str:
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        return text

    @staticmethod
    def _overlap(text: str, word: str) -> int:
        """Characters at the end of a text with which a word begins."""
        return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
