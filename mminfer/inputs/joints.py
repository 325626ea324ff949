"""Joints: where rendered text may be cut so that the tokens of the pieces are those of the whole.

A processor writes text for a medium: "Frame1: <img>...", the second of each frame, line breaks around an image. A
tokenizer cuts at the tokens of marks and nowhere else for sure, so that this text may grow together with what the user
wrote beside it. What a medium becomes is asked of the processor, and each cut is tried with the tokenizer.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mminfer.inputs.model_inputs import InputBuilder
from mminfer.inputs.parts import ImagePart, Part, VideoPart

SIDE = 64  # pixels of the medium that the processor is asked about
NEAR = 100  # characters on a side of a mark that may change how the text there is cut into tokens


class Cut(NamedTuple):
    """How a piece ends.

    Args:
        carried: text at its end that the next piece begins with.
        before: text that the processor wrote behind its last medium, and that goes with the carried one.
        dropped: the tokens of that text, which leave the piece.
    """

    carried: str = ""
    before: str = ""
    dropped: tuple[int, ...] = ()


class _Expansion(NamedTuple):
    """What becomes of a placeholder: text up to the first mark and behind the last one, as far as there is any."""

    head: str  # with the first mark
    begins_with_mark: bool
    last_mark: int
    rest: str
    rest_ids: tuple[int, ...]


class Joints:
    """Finds cuts for one processor.

    Args:
        builder: makes model inputs.
    """

    def __init__(self, builder: InputBuilder) -> None:
        self._builder = builder
        self._tokenizer: Any = builder.processor.tokenizer
        self._expansions: dict[str, _Expansion | None] = {}

    def cut(self, last: str | None, tail: str, following: str) -> Cut | None:
        """How a piece ends before a placeholder or filler; None: it cannot, without other tokens than the whole's.

        Args:
            last: the piece's last placeholder or filler; None: it has none.
            tail: the piece's text behind that.
            following: what the next piece begins with.
        """
        coming = self._expansion(following)
        behind = None if last is None else self._expansion(last)
        if coming is None or (last is not None and behind is None):
            return None
        rest = "" if behind is None else behind.rest
        near = (rest + tail)[-NEAR:]
        if coming.begins_with_mark and self._ids(near + coming.head) == self._ids(near) + self._ids(coming.head):
            return Cut()
        if behind is None:
            return None
        near, mark = (rest + tail + coming.head)[:NEAR], str(self._tokenizer.convert_ids_to_tokens(behind.last_mark))
        if self._ids(mark + near) != [behind.last_mark, *self._ids(near)]:
            return None
        return Cut(tail, rest, behind.rest_ids)

    @cached_property
    def pads_videos(self) -> bool:
        """Whether what the processor writes for a video follows from a longer one beside it."""
        markers = self._builder.markers
        mark = next((mark for mark, kind in markers.kinds.items() if kind == "video"), None)
        if mark is None:
            return False
        short, long = (VideoPart(np.zeros((count, SIDE, SIDE, 3), np.uint8), {"fps": 1.0}) for count in (2, 4))
        try:
            alone, beside = (
                self._builder.piece("\n".join([mark] * len(videos)), videos, first=False)["input_ids"][0].tolist()
                for videos in ([short], [short, long])
            )
        except Exception:  # processors raise anything; one that takes no two lengths refuses the whole, too
            return False
        last = max(place for place, token in enumerate(alone) if token in markers.added_ids)
        return bool(alone[: last + 1] != beside[: last + 1])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _expansion(self, placeholder: str) -> _Expansion | None:
        """None where the processor does not tell."""
        if placeholder not in self._expansions:
            try:
                self._expansions[placeholder] = self._asked(placeholder)
            except Exception:  # processors raise anything; what they do not tell is not cut
                self._expansions[placeholder] = None
        return self._expansions[placeholder]

    def _asked(self, placeholder: str) -> _Expansion | None:
        markers = self._builder.markers
        if placeholder == markers.filler:
            return _Expansion(placeholder, True, markers.filler_id, "", ())
        found = markers.medium.search(placeholder)
        if found is None:
            return None
        part: Part = ImagePart(Image.new("RGB", (SIDE, SIDE)))
        if markers.kinds[found[1]] == "video":
            part = VideoPart(np.zeros((2, SIDE, SIDE, 3), np.uint8), {"fps": 1.0})
        ids = self._builder.piece(placeholder, [part], first=False)["input_ids"][0].tolist()
        marks = [place for place, token in enumerate(ids) if token in markers.added_ids]
        rest_ids = tuple(ids[marks[-1] + 1 :])
        rest, head = self._text(rest_ids), self._text(ids[: marks[0] + 1])
        if self._ids(rest) != list(rest_ids):
            return None
        return _Expansion(head, marks[0] == 0, ids[marks[-1]], rest, rest_ids)

    def _text(self, ids: Any) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
