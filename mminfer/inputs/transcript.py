"""What the cache of a chat holds, as text: the turns so far, and the tokens that were read of them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any


def new_mark(what: str) -> str:
    """A text that stands for something in what a template renders; it is drawn, so that nobody can have written it."""
    return f"\u27e6mminfer:{what}:{secrets.token_hex(16)}\u27e7"


@dataclass(frozen=True)
class Transcript:
    """The turns of a chat as far as they were read. Nothing in it is ever changed in place.

    An answer stands in it as a mark in place of its text, so that what was read before is a prefix of every later
    rendering, and no answer is tokenised again.

    Args:
        messages: as chat templates take them: a medium is its kind alone, an embedding is a text of fillers.
        rendered: what the template made of them.
        ids: the token ids that were read.
        unread: token ids that were generated, but not yet run through the model.
    """

    messages: tuple[dict[str, Any], ...] = ()
    rendered: str = ""
    ids: tuple[int, ...] = ()
    unread: tuple[int, ...] = ()

    @property
    def turn_is_open(self) -> bool:
        """Whether the user's turn goes on with what comes next."""
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def with_open_turn(self) -> Transcript:
        """The same with a turn of the user's at its end."""
        if self.turn_is_open:
            return self
        return replace(self, messages=(*self.messages, {"role": "user", "content": []}))

    def answered(self, token_ids: list[int]) -> Transcript:
        """The same with an answer, of which the last token was not run through the model."""
        mark = new_mark("answer")
        answer = {"role": "assistant", "content": [{"type": "text", "text": mark}]}
        return Transcript(
            (*self.messages, answer), self.rendered + mark, (*self.ids, *token_ids[:-1]), tuple(token_ids[-1:])
        )

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"messages": self.messages, "rendered": self.rendered, "ids": self.ids, "unread": self.unread}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Transcript:
        """What `to_dict` gave; raises `KeyError` or `TypeError` where something is missing."""
        messages, ids, unread = (tuple(facts[name]) for name in ("messages", "ids", "unread"))
        return cls(messages, facts["rendered"], ids, unread)
